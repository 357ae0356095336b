r"""C-DEQ inference: Alg. 1, the schedule's choice, evaluation by NFE, answers to a user's inputs.

    python infer.py --run runs/digits                         metric by NFE on the test split
    python infer.py --run runs/digits --tol 0.05 --max-nfe 16  anytime: each sample stops by itself
    python infer.py --run runs/digits --nfe 2 --files a.png    answers
    python infer.py --run runs/docstrings --nfe 2 --prompt "The"    a text goes on

Alg. 1 (J steps, J evaluations of h):

    z_{j+1} = g(z_j, t_j) with h(z_{j-1}, t_{j-1}) kept from the step before, so that the Anderson
    step of Eq. 7 costs nothing new; t_j = eps + (1 - decay^j) (T - eps)                    (B.3)

NFE counts evaluations of f-sized networks, the first included. NFE = 0 is head(z_0); NFE = 1 of
every method is one evaluation at z_0. The injection is computed once per input and the head once
per answer; neither is f-sized, and neither is counted.
"""

import collections
import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from anderson import Counter, anderson
from checkpoint import UsageError, plain_errors
from config import command_line, require
from models import Equilibrium, labels
from runs import Run, open_run
from student import Student
from tasks import Split, Task


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
    """Alg. 1 until |z_{j+1} - z_j| <= tol |z_{j+1}|, for each sample alone: (z, NFE per sample).

    Finished samples leave the batch, so their evaluations are really saved.
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
    """A way to the equilibrium of net. solve(z_0, u, nfe, last=False): all its states z_0 .. z_nfe,
    or z_nfe alone; inject(x, memory=None): the u it wants; counter: of its evaluations."""

    net: Equilibrium
    solve: Callable[..., Tensor]
    inject: Callable[..., Tensor]
    counter: Counter

    def initial(self, u) -> Tensor:
        return self.net.initial(u)

    def remember(self, u, z: Tensor):
        """The memory that the next segment wants of this one."""
        return self.net.remember(u, z)


def counted(net: Equilibrium, student: Student, decay: float) -> Method:
    """Alg. 1 with a student of `net` as a method; it counts evaluations of h."""
    h = Counter(student.h)
    student = copy.copy(student)  # shares the weights; only its h is the counted one
    student.h = h

    def solve(z0: Tensor, u: Tensor, nfe: int, last: bool = False) -> Tensor:
        return cdeq(student, z0, u, nfe, decay, last)

    return Method(net, solve, student.inject, h)


def ranks() -> tuple[int, int]:
    """(rank, world size)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def relative(a: Tensor, b: Tensor) -> Tensor:
    """|a - b| / |b| per sample: (B,)."""
    a, b = a.flatten(1).float(), b.flatten(1).float()
    return (a - b).norm(dim=1) / b.norm(dim=1).clamp(min=1e-12)


class Tally:
    """Sums over labels of what tables tell of one method's states at one NFE."""

    def __init__(self):
        self.sums: dict[str, float] = collections.defaultdict(float)
        self.items: list[Tensor] = []

    def add(self, found: dict[str, Tensor], y: Tensor, units: Tensor) -> None:
        """found: sums over each sample's labels, (B,), or for every label, the shape of y; the
        metric's come one by one into `items`, as what an interval draws from. units (B,): what
        each sample belongs to; of a graph, each node is one."""
        known = labels(y)
        for name, values in found.items():
            self.sums[name] += values.double().sum().item()
        self.sums["labels"] += int(known.sum())
        metric = found.get("value", found["nll"])
        if metric.numel() > len(y):  # a graph
            units, here = torch.arange(y.numel()), (y >= 0).flatten().cpu()
            units, metric, known = (v.flatten().cpu()[here] for v in (units, metric, y >= 0))
        self.items.append(torch.stack([v.cpu().double() for v in (units, metric, known)], dim=1))

    def row(self) -> dict:
        """Means over labels, perplexity where there is no other metric, and the items (n, 3): which
        unit of the sample each belongs to, its sum, its number of labels."""
        means = {name: value / self.sums["labels"] for name, value in self.sums.items()}
        means.setdefault("value", math.exp(min(means["nll"], 700.0)))
        means.pop("labels")
        return {**means, "items": torch.cat(self.items)}


def gathered(tallies: list[Tally]) -> list[Tally]:
    """The tallies of all ranks together, on every rank."""
    if not dist.is_initialized():
        return tallies
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, tallies)
    for total, *parts in zip(*everyone, strict=True):
        for part in parts:
            total.items += part.items
            for name, value in part.sums.items():
                total.sums[name] += value
    return everyone[0]


@torch.no_grad()
def evaluate(
    run: Run,
    methods: dict,
    split: Split,
    nfes=None,
    batch: int = 128,
    memory: str = "own",
    converge: bool = True,
) -> dict[object, list[dict]]:
    """Metric, residual under the teacher's f and distance to its equilibrium: of each method, a
    row by NFE; means over labels, and the metric's items.

    memory, for networks that see the segment before: of the states that the same method gave with
    the same NFE ("own"), of the teacher's equilibria ("teacher"), or "none". converge: whether
    there is an equilibrium to measure residual and distance by.
    Each rank takes every world-size-th sample; sums and counts are reduced, so that every sample
    counts once whatever the number of ranks.
    """
    net, nfes = run.teacher, nfes or run.task.nfes
    own = memory == "own" and net.memory > 0
    tallies = {(name, nfe): Tally() for name in methods for nfe in nfes}
    calls = 0
    for method in methods.values():
        method.counter.nfe = 0
    for x, y, samples in stream(run, split, batch):
        before, star, u = None, None, None
        pasts = {name: dict.fromkeys(nfes) for name in methods}
        for segment, (x, y) in enumerate(net.segments(x, y)):  # noqa: B020
            calls, units = calls + 1, samples + segment * len(split)
            if converge:
                u = net.inject(x, before)
                star = equilibrium(run, net.initial(u), u)
            for name, method in methods.items():
                left = star if memory == "teacher" else None
                for nfe, z in zip(nfes, answers(method, x, pasts[name], own, left), strict=True):
                    tallies[name, nfe].add(measures(run, z, u, star, y), y, units)
                del z  # a view of gigabytes on a graph: not beside the next method's
            before = net.remember(u, star) if memory != "none" and converge else None
    for name, method in methods.items():
        made, declared = method.counter.nfe, calls * (sum(nfes) if own else max(nfes))
        if made != declared:
            raise AssertionError(f"{name}: {made} evaluations were made, {declared} declared")
    rows: dict = {name: [] for name in methods}
    for (name, nfe), tally in zip(tallies, gathered([*tallies.values()]), strict=True):
        rows[name].append({"nfe": nfe, **tally.row()})
    return rows


def answers(method: Method, x: Tensor, past: dict, own: bool, left) -> Iterator[Tensor]:
    """z at each NFE of `past`, the memory by NFE. There the state itself is left for the next
    segment, with `own`, or `left`, the same for all, or nothing."""
    if not own:  # one solve passes through them all
        u = method.inject(x, next(iter(past.values())))
        states = method.solve(method.initial(u), u, max(past))
        past |= dict.fromkeys(past, None if left is None else method.remember(u, left))
        yield from (states[nfe] for nfe in past)
        return
    for nfe, memory in past.items():
        u = method.inject(x, memory)
        z = method.solve(method.initial(u), u, nfe, last=True)
        past[nfe] = method.remember(u, z)
        yield z


def stream(run: Run, split: Split, batch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """x and y of this rank's share of a split, on the device, and the unit of each sample: samples
    of one picture are one unit; of one graph, on one rank."""
    rank, world = ranks()
    rows = torch.arange(rank, len(split), world).split(batch)
    batches = ((part,) for part in rows if len(part))
    first = 0
    for x, y in split.stream(batches, run.config.get("workers", 0)):
        if len(y):
            samples = rank + world * torch.arange(first, first + len(y))
            first += len(y)
            yield x.to(run.device), y.to(run.device), samples // split.draws


def measures(run: Run, z: Tensor, u: Tensor, star: Tensor, y: Tensor) -> dict[str, Tensor]:
    """What tables tell of a state z, sums over labels: metrics and, where there is an equilibrium
    star, the residual under the teacher's f and the distance to it."""
    net, wanted = run.teacher, scores(run.task)
    found = {"nll": net.nll(z, y) * labels(y)}
    if star is not None:
        found["residual"] = relative(net.f(z, u), z) * labels(y)
        found["distance"] = relative(z, star) * labels(y)
    logits = net.head(z) if wanted else None
    return found | {name: score(logits, y) for name, score in wanted.items()}


def scores(task: Task) -> dict[str, Callable]:
    """What a task tells of logits, by name."""
    return ({"value": task.score} if task.score else {}) | task.further


@torch.no_grad()
def evaluate_explicit(run: Run, net: nn.Module, split: Split, batch: int = 128) -> dict:
    """The metrics of a network of finite depth over a split, and the metric's items."""
    wanted, tally = scores(run.task), Tally()
    for x_all, y_all, samples in stream(run, split, batch):
        for segment, (x, y) in enumerate(net.segments(x_all, y_all)):
            logits = net(x) if wanted else None
            found = {"nll": net.nll(x, y) * labels(y)}
            found |= {name: score(logits, y) for name, score in wanted.items()}
            tally.add(found, y, samples + segment * len(split))
    return gathered([tally])[0].row()


def equilibrium(run: Run, z0: Tensor, u: Tensor) -> Tensor:
    """z*: the teacher's own solver for twice the trajectory's length. A reference, not counted."""
    net, steps = run.teacher, 2 * run.config["K"]
    return anderson(
        lambda z: net.f(z, u), z0, steps, last=True, sample_dims=net.sample_dims, **run.solver()
    )


def choose_decay(run: Run, student: Student) -> tuple[float, dict]:
    """The schedule's base on the validation split, and each candidate's mean metric and distance.

    Of all candidates whose metric, mean over the NFEs, is within half a per cent of the best, the
    one nearest to the equilibrium: differences below that are noise on a small split.
    """
    sign = 1 if run.task.higher_is_better else -1
    split = run.task.to_choose()
    candidates = {decay: counted(run.teacher, student, decay) for decay in run.task.decays}
    found = {
        decay: {key: statistics.fmean(row[key] for row in rows) for key in ("value", "distance")}
        for decay, rows in evaluate(run, candidates, split, memory="teacher").items()
    }
    best = max(sign * score["value"] for score in found.values())
    good = [d for d in found if sign * found[d]["value"] >= best - 0.005 * abs(best)]
    return min(good, key=lambda decay: found[decay]["distance"]), found


@torch.no_grad()
def answer(
    run: Run, name: str, files: list[Path], nfe: int, tol: float, max_nfe: int
) -> list[dict]:
    """Class, probability and NFE for a user's own inputs."""
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
    """Words that follow the prompt (1, n), drawn one by one, and the words per second. Each word's
    state is solved with `nfe` evaluations and kept, in place of solving it again."""
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
    """What the converged teacher and a student make of a prompt, from the same random numbers."""
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
        told = " ".join([args.prompt, *(run.task.classes[word] for word in words)])
        rows.append({"method": title, "nfe": budget, "tokens_per_second": speed, "text": told})
    return rows


@torch.no_grad()
def evaluate_anytime(run: Run, name: str, split: Split, tol: float, max_nfe: int) -> dict:
    """Metric and NFE of the anytime mode over a split."""
    student, decay = run.students[name]
    scores, used = [], []
    for x, y, _ in stream(run, split, 128):
        u = student.inject(x)
        z, nfe = anytime(student, run.teacher.initial(u), u, tol, max_nfe, decay)
        scores.append(run.task.score(run.teacher.head(z), y)[y >= 0])
        used.append(nfe)
    nfe = torch.cat(used).float()
    return {
        "tol": tol,
        "value": torch.cat(scores).mean().item(),
        "nfe_mean": nfe.mean().item(),
        "nfe_max": int(nfe.max()),
    }


def check_inputs(run: Run, args) -> None:
    """UsageError for inputs of another kind than the run's."""
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
    """The command line, its numbers within their ranges."""
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--run", type=Path, required=True, help="run folder of train.py")
    add("--student", default="", help="which student: '' (the default recipe), 'paper', ...")
    add("--nfe", type=int, nargs="+", default=[], help="budgets; one of them for --files")
    add("--split", choices=("valid", "test"), default="test")
    add("--batch", type=int, default=128)
    add("--decay", type=float, default=0, help="schedule base in (0, 1); 0: as validated")
    add("--tol", type=float, default=0, help="> 0: stop each sample when successive states agree")
    add("--max-nfe", type=int, default=16, help="most evaluations with --tol")
    add("--files", type=Path, nargs="+", help="answer for these inputs instead of a split")
    add("--prompt", default="", help="text to be continued, by the teacher and the student")
    add("--tokens", type=int, default=50, help="words of the continuation")
    add("--temperature", type=float, default=1.0, help="of their softmax")
    add("--top-k", type=int, default=40, help="draw from so many likeliest; 0: from all")
    add("--seed", type=int, default=0, help="of the draws")
    add(
        "--memory", choices=("own", "teacher", "none"), default="own", help="a text's: whose states"
    )
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
    split = getattr(run.task, args.split)
    nfe = args.nfe[0] if len(args.nfe) == 1 else 2
    if args.prompt:
        result = continuations(run, args.student, nfe, args)
        line = "{method}, NFE {nfe}, {tokens_per_second:.1f} tokens/s: {text}"
    elif args.files:
        result = answer(run, args.student, args.files, nfe, args.tol, args.max_nfe)
        line = "{file}: {answer} ({probability:.1%}, NFE {nfe})"
    elif args.tol > 0:
        result = [evaluate_anytime(run, args.student, split, args.tol, args.max_nfe)]
        line = "value {value:.2f} at {nfe_mean:.2f} evaluations on average, {nfe_max} at most"
    else:
        nfes = tuple(sorted(set(args.nfe))) or run.task.nfes
        method = {"": counted(run.teacher, *run.students[args.student])}
        result = evaluate(run, method, split, nfes, args.batch, args.memory)[""]
        for row in result:
            row.pop("items")
        line = "NFE {nfe:3d}: value {value:.2f}, distance {distance:.4f}, residual {residual:.4f}"
    lines = [line.format(**row) for row in result]
    print(json.dumps(result, indent=1) if args.json else "\n".join(lines))


if __name__ == "__main__":
    with plain_errors():
        main(sys.argv[1:])
