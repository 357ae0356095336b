r"""C-DEQ inference: Alg. 1, and the command that uses a trained run.

    python infer.py --run runs/digits                         metric by NFE on the test split
    python infer.py --run runs/digits --tol 0.05 --max-nfe 16  each sample stops when it is ready
    python infer.py --run runs/digits --nfe 2 --files a.png    classes of your own files
    python infer.py --run runs/docstrings --nfe 2 --prompt "The"    continues a text

Alg. 1 (J steps, J evaluations of h):

    z_{j+1} = g(z_j, t_j) with h(z_{j-1}, t_{j-1}) kept from the step before, so that the Anderson
    step of Eq. 7 costs nothing new; t_j = eps + (1 - decay^j) (T - eps)                    (B.3)

NFE counts evaluations of f-sized networks, including the first: for every method, NFE = 1 is one
evaluation at z_0. The injection is computed once per input and the head once per answer; neither is
f-sized, so neither is counted.
"""

import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from anderson import Counter, anderson
from checkpoint import UsageError, plain_errors
from config import command_line, require
from models import Equilibrium
from runs import Run, open_run
from student import Student


@torch.no_grad()
def cdeq(student: Student, z: Tensor, u: Tensor, J: int, decay: float, last: bool = False):
    """Alg. 1 from z = z_0: all states z_{t_0} .. z_{t_J} as (J + 1, B, ...), or z_{t_J} alone;
    exactly J evaluations."""
    if not last:
        states = z.new_empty(J + 1, *z.shape)
        states[0] = z
    history = None
    for j, t in enumerate(student.times.schedule(J, decay)):
        z, history = student.step(z, t, u, history)  # Alg. 1, l. 1-2, then l. 5-6
        if not last:
            states[j + 1] = z
    return z if last else states  # Alg. 1, l. 9


@torch.no_grad()
def anytime(
    student: Student, z0: Tensor, u: Tensor, tol: float, max_nfe: int, decay: float
) -> tuple[Tensor, Tensor]:
    """Alg. 1 until |z_{j+1} - z_j| <= tol |z_{j+1}|, for each sample: (z, NFE per sample).

    Finished samples leave the batch, so that their evaluations are really saved.
    """
    answer, nfe = z0.clone(), torch.full((len(z0),), max_nfe, device=z0.device)
    active = torch.arange(len(z0), device=z0.device)
    z, history = z0, None
    for j, t in enumerate(student.times.schedule(max_nfe, decay)):
        z_next, history = student.step(z, t, u[active], history)
        change = (z_next - z).flatten(1).norm(dim=1)
        going = change > tol * z_next.flatten(1).norm(dim=1)
        answer[active], nfe[active[~going]] = z_next, j + 1
        if not going.any():
            break
        active, z, history = active[going], z_next[going], tuple(v[going] for v in history)
    return answer, nfe


@dataclass(frozen=True)
class Method:
    """A way to the equilibrium of net. solve(z_0, u, nfe, last=False): its states z_0 .. z_nfe, or
    z_nfe alone; inject(x, memory=None): the u that it needs; counter: of its evaluations."""

    net: Equilibrium
    solve: Callable[..., Tensor]
    inject: Callable[..., Tensor]
    counter: Counter

    def initial(self, u) -> Tensor:
        return self.net.initial(u)

    def remember(self, u, z: Tensor):
        """The memory that the next segment has of this one."""
        return self.net.remember(u, z)


def counted(net: Equilibrium, student: Student, decay: float) -> Method:
    """Alg. 1 with a student of `net`, as a method that counts evaluations of h."""
    h = Counter(student.h)
    student = copy.copy(student)  # shares all weights; only h is replaced, by one that counts
    student.h = h

    def solve(z0: Tensor, u: Tensor, nfe: int, last: bool = False) -> Tensor:
        return cdeq(student, z0, u, nfe, decay, last)

    return Method(net, solve, student.inject, h)


@torch.no_grad()
def answer(
    run: Run, name: str, files: list[Path], nfe: int, tol: float, max_nfe: int
) -> list[dict]:
    """The class, its probability and the NFE for each of a user's own inputs."""
    student, decay = run.students[name]
    x = torch.cat([run.task.read(path) for path in files]).to(run.device)
    u = student.inject(x)
    z0 = run.teacher.initial(u)
    if tol > 0:
        z, used = anytime(student, z0, u, tol, max_nfe, decay)
    else:
        z, used = cdeq(student, z0, u, nfe, decay, last=True), torch.full((len(x),), nfe)
    best = run.teacher.head(z).softmax(1).max(1)
    return [
        {"file": str(path), "answer": run.task.classes[c], "probability": p, "nfe": n}
        for path, c, p, n in zip(
            files, best.indices.tolist(), best.values.tolist(), used.tolist(), strict=True
        )
    ]


@torch.no_grad()
def generate(
    run: Run, method: Method, nfe: int, prompt: Tensor, tokens: int, temperature: float, top_k: int
) -> tuple[list[int], float]:
    """Words that continue the prompt (1, n), drawn one by one, and the words per second. The state
    of each word is solved once, with `nfe` evaluations, and kept."""
    net, memory, words = run.teacher, None, []
    x = torch.cat([prompt.new_zeros(1, 1), prompt], dim=1).to(run.device)  # after an <eos>
    for part, _ in net.segments(x, x):
        u = method.inject(part, memory)
        z = method.solve(method.initial(u), u, nfe, last=True)
        memory = method.remember(u, z)
    start = time.perf_counter()
    for _ in range(tokens):
        logits = net.head(z[:, -1:])[0, 0] / temperature
        best = logits.topk(min(top_k or len(logits), len(logits)))
        word = best.indices[torch.multinomial(best.values.softmax(0), 1)]
        words.append(int(word))
        u = method.inject(word[None], memory)
        z = method.solve(method.initial(u), u, nfe, last=True)
        memory = method.remember(u, z)
    return words, tokens / (time.perf_counter() - start)


def continuations(run: Run, name: str, nfe: int, args) -> list[dict]:
    """How the converged teacher and a student continue a prompt, with the same random numbers."""
    net, K, prompt = run.teacher, run.config["K"], run.task.read(args.prompt)

    def solve(z0: Tensor, u: Tensor, nfe: int, last: bool = True) -> Tensor:
        f = lambda z: net.f(z, u)  # noqa: E731
        return anderson(f, z0, nfe, last=last, sample_dims=net.sample_dims, **run.solver())

    rows = []
    teacher = Method(net, solve, net.inject, Counter(net.f))
    student = counted(net, *run.students[name])
    for title, method, budget in (("teacher", teacher, K), ("cdeq", student, nfe)):
        torch.manual_seed(args.seed)
        words, speed = generate(
            run, method, budget, prompt, args.tokens, args.temperature, args.top_k
        )
        continued = " ".join([args.prompt, *(run.task.classes[word] for word in words)])
        rows.append({"method": title, "nfe": budget, "tokens_per_second": speed, "text": continued})
    return rows


def check_inputs(run: Run, args) -> None:
    """UsageError for inputs that do not suit the task of the run."""
    text = run.teacher.memory > 0
    if args.prompt and not text:
        raise UsageError(f"--prompt: {run.task.name} is no text; its inputs are --files")
    if (args.files or args.tol) and text:
        raise UsageError(f"--files, --tol: {run.task.name} is a text; its inputs are a --prompt")


RANGES = {
    "--nfe": ">= 1 and <= 1000",
    "--max-nfe": ">= 1 and <= 1000",
    "--batch": ">= 1",
    "--decay": ">= 0 and < 1",
    "--tol": ">= 0",
    "--tokens": ">= 1 and <= 1000000",
    "--temperature": ">= 0.001",
    "--top-k": ">= 0",
    "--seed": ">= 0",
}


def arguments(argv: list[str]):
    """The command line; UsageError for numbers outside their ranges."""
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--run", type=Path, required=True, help="run folder of train.py")
    add("--student", default="", help="which student: '' (the default recipe), 'paper', ...")
    add("--nfe", type=int, nargs="+", default=[], help="evaluations; one number with --files")
    add("--split", choices=("valid", "test"), default="test")
    add("--batch", type=int, default=128)
    add("--decay", type=float, default=0, help="schedule base in (0, 1); 0: as validated")
    add("--tol", type=float, default=0, help="> 0: stop a sample when its last two states agree")
    add("--max-nfe", type=int, default=16, help="most evaluations with --tol")
    add("--files", type=Path, nargs="+", help="classify these files instead of a split")
    add("--prompt", default="", help="a text that teacher and student continue")
    add("--tokens", type=int, default=50, help="words of the continuation")
    add("--temperature", type=float, default=1.0, help="of their softmax")
    add("--top-k", type=int, default=40, help="draw from this many likeliest words; 0: from all")
    add("--seed", type=int, default=0, help="of the draws")
    add("--data", default="", help="where the data set is now")
    add("--unreadable", choices=("refuse", "skip"), help="what to do with damaged pictures")
    add("--device", default="auto", help="auto, cpu, cuda")
    add("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    for flag, allowed in RANGES.items():
        value = getattr(args, flag.strip("-").replace("-", "_"))
        for number in value if isinstance(value, list) else [value]:
            require(flag, number, allowed)
    return args


def main(argv: list[str]) -> None:
    from evidence.evaluate import evaluate, evaluate_anytime  # measuring is no part of Alg. 1

    args = arguments(argv)
    if not args.run.is_dir():
        raise UsageError(f"--run {args.run}: no such folder; train.py makes one")
    now = {key: getattr(args, key) for key in ("data", "unreadable") if getattr(args, key)}
    run = open_run(args.run, now, args.device)
    if args.student not in run.students:
        known = ", ".join(repr(name) for name in run.students) or "none: train one first"
        raise UsageError(
            f"--student {args.student!r} is not finished in {args.run}; there: {known}"
        )
    if args.decay:
        run.students = {name: (student, args.decay) for name, (student, _) in run.students.items()}
    if len(args.nfe) > 1 and (args.files or args.prompt):
        raise UsageError(f"--nfe {' '.join(map(str, args.nfe))}: --files and --prompt take one")
    check_inputs(run, args)
    nfe = args.nfe[0] if len(args.nfe) == 1 else 2
    if args.prompt:
        result = continuations(run, args.student, nfe, args)
        line = "{method}, NFE {nfe}, {tokens_per_second:.1f} tokens/s: {text}"
    elif args.files:
        result = answer(run, args.student, args.files, nfe, args.tol, args.max_nfe)
        line = "{file}: {answer} ({probability:.1%}, NFE {nfe})"
    elif args.tol > 0:
        result = [evaluate_anytime(run, args.student, args.split, args.tol, args.max_nfe)]
        line = "value {value:.2f} at {nfe_mean:.2f} evaluations on average, {nfe_max} at most"
    else:
        nfes, split = tuple(sorted(set(args.nfe))) or run.task.nfes, getattr(run.task, args.split)
        method = {"": counted(run.teacher, *run.students[args.student])}
        result = evaluate(run, method, split, nfes, args.batch)[""]
        for row in result:
            row.pop("items")
        line = "NFE {nfe:3d}: value {value:.2f}, distance {distance:.4f}, residual {residual:.4f}"
    lines = [line.format(**row) for row in result]
    print(json.dumps(result, indent=1) if args.json else "\n".join(lines))


if __name__ == "__main__":
    with plain_errors():
        main(sys.argv[1:])
