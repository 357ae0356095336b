r"""C-DEQ inference: Alg. 1, the schedule's choice, evaluation by NFE, answers on a user's files.

    python infer.py --run runs/digits                         metric by NFE on the test split
    python infer.py --run runs/digits --tol 0.05 --max-nfe 16  anytime: each sample stops by itself
    python infer.py --run runs/digits --nfe 2 --files a.png    answers

Alg. 1 (J steps, J evaluations of h):

    z_{j+1} = g(z_j, t_j) with h(z_{j-1}, t_{j-1}) kept from the step before, so that the Anderson
    step of Eq. 7 costs nothing new; t_j = eps + (1 - decay^j) (T - eps)                    (B.3)

NFE counts evaluations of f-sized networks, the first included. NFE = 0 is head(z_0); NFE = 1 of
every method is one evaluation at z_0. The injection is computed once per input and the head once
per answer; neither is f-sized, and neither is counted.
"""

import copy
import ctypes
import io
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from anderson import Counter, anderson
from checkpoint import UsageError, contents_of, fingerprint, load, ours, plain_errors
from config import command_line, open_task
from fpode import TimeMap
from models import Equilibrium
from models.mdeq import published
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


@dataclass
class Run:
    """A run folder's networks, ready to answer: the teacher, and each finished student by name."""

    folder: Path
    task: Task
    config: dict
    teacher: Equilibrium
    students: dict[str, tuple[Student, float]]  # name -> (EMA student, decay)
    explicit: dict[str, nn.Module]
    device: torch.device

    def solver(self) -> dict:
        return {name: self.config[name] for name in ("m", "beta", "ridge")}


def student_path(folder: Path, name: str) -> Path:
    return folder / (f"student-{name}.pt" if name else "student.pt")


def load_student(path: Path, teacher: Equilibrium) -> dict:
    """A student's checkpoint; UsageError where it was distilled from another teacher."""
    saved = load(path, "student")
    if saved["teacher"] != fingerprint(teacher):
        raise UsageError(
            f"{path} was distilled from another teacher than the one beside it; delete it"
        )
    return saved


def teacher_weights(path: Path) -> dict[str, Tensor]:
    """The weights in a teacher's file under our names: a checkpoint of ours, or a state dict of
    locuslab/deq, which may lie within a larger checkpoint; no pickled code is run."""
    advice = "allowed are a teacher.pt of train.py and a state dict of locuslab/deq"
    raw = contents_of(path, advice)
    if ours(raw):
        return load(path, "teacher")["model"]
    try:
        state = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a foreign file makes the reader raise
        reason = str(error).splitlines()[0]
        raise UsageError(f"{path} holds no plain tensors ({reason}); {advice}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UsageError(f"{path} is no dict of tensors; {advice}")
    return published(state)


def build_student(teacher: Equilibrium, config: dict, rho: float) -> Student:
    """A fresh student with the clock and the options of a training configuration."""
    times = TimeMap(rho, config["K"], config["eps"], config["T"])
    options = ("gamma", "aa", "alpha_grad", "own_injection", "first")
    return Student(teacher, times, *(config[key] for key in options))


def open_run(folder: Path, data: str = "", device: str = "auto", names=None) -> Run:
    """Loads a run folder; names: students to load, all finished ones by default; data: where the
    data set is now, if not where it was in training."""
    device = torch.device(pick_device(device))
    saved = load(folder / "teacher.pt", "teacher")
    config = saved["config"]
    if saved["step"] < config["teacher_steps"]:
        raise UsageError(
            f"{folder}: the teacher has {saved['step']} of {config['teacher_steps']} updates; "
            "train.py continues it"
        )
    task = open_task(config | {"data": data or config["data"]})
    teacher = task.network(config)
    teacher.load_state_dict(saved["model"])
    teacher.to(device).eval().requires_grad_(False)
    if names is None:
        found = sorted(folder.glob("student*.pt"))
        names = [path.stem.removeprefix("student").removeprefix("-") for path in found]
    students = {}
    for name in names:
        saved = load_student(student_path(folder, name), teacher)
        if "decay" in saved:
            student = build_student(teacher, saved["config"], saved["rho"])
            student.load_state_dict(saved["ema"])
            students[name] = (student.to(device).eval().requires_grad_(False), saved["decay"])
            config = config | {"K": saved["config"]["K"]}
    explicit = {}
    for path in sorted(folder.glob("explicit-*.pt")):
        kind, saved = path.stem.removeprefix("explicit-"), load(path, "explicit")
        if saved["step"] >= saved["config"]["explicit_steps"]:
            net = task.explicit(saved["config"] | {"explicit": kind, "pretrained": False})
            net.load_state_dict(saved["model"])
            foreign = saved["config"].get("pretrained")
            name = f"{kind} (torchvision's weights)" if foreign else kind
            explicit[name] = net.to(device).eval()
    return Run(folder, task, config, teacher, students, explicit, device)


LIBC = ctypes.CDLL(None)  # the process's own symbols: the C library among them


def pick_device(name: str) -> str:
    """The device that a --device flag means; on a CPU, also lets glibc keep freed memory.

    It would map each large tensor anew, a page fault per 4 KB: two fifths of the time of an update
    on a graph of 169,343 nodes.
    """
    if hasattr(LIBC, "mallopt"):
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        LIBC.mallopt(M_MMAP_MAX, 0)
        LIBC.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: allowed is auto | cpu | cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA device is there; allowed is auto | cpu")
    return name


@dataclass(frozen=True)
class Method:
    """A way to the equilibrium. solve(z_0, u, nfe, last=False): all its states z_0 .. z_nfe, or
    z_nfe alone; inject(x): the u it wants; counter: of its evaluations."""

    solve: Callable[..., Tensor]
    inject: Callable[[Tensor], Tensor]
    counter: Counter


def counted(student: Student, decay: float) -> Method:
    """Alg. 1 as a method; it counts evaluations of h."""
    h = Counter(student.h)
    student = copy.copy(student)  # shares the weights; only its h is the counted one
    student.h = h

    def solve(z0: Tensor, u: Tensor, nfe: int, last: bool = False) -> Tensor:
        return cdeq(student, z0, u, nfe, decay, last)

    return Method(solve, student.inject, h)


def ranks() -> tuple[int, int]:
    """(rank, world size)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def relative(a: Tensor, b: Tensor) -> Tensor:
    """|a - b| / |b| per sample: (B,)."""
    a, b = a.flatten(1).float(), b.flatten(1).float()
    return (a - b).norm(dim=1) / b.norm(dim=1).clamp(min=1e-12)


@torch.no_grad()
def evaluate(
    run: Run, methods: dict, split: Split, nfes=None, batch: int = 128
) -> dict[object, list[dict]]:
    """Metric, residual under the teacher's f and distance to its equilibrium: of each method, a
    row by NFE.

    Each rank takes every world-size-th sample; sums and counts are reduced, so that every sample
    counts once whatever the number of ranks.
    """
    net, nfes = run.teacher, nfes or run.task.nfes
    names = ("value", "nll", "residual", "distance", *run.task.further)
    totals = torch.zeros(len(methods), len(nfes), len(names) + 1, dtype=torch.float64)
    calls = 0
    for method in methods.values():
        method.counter.nfe = 0
    for x, y in stream(run, split, batch):
        u = net.inject(x)
        z0 = net.initial(u)
        star = equilibrium(run, z0, u)
        calls += 1
        for method, total in zip(methods.values(), totals, strict=True):
            states = method.solve(z0, method.inject(x), max(nfes))
            for i, nfe in enumerate(nfes):
                found = measures(run, states[nfe], u, star, y)
                sums = [found[name].sum().item() for name in names]
                total[i] += torch.tensor([*sums, len(y)]).double()
            del states  # gigabytes on a graph: not beside the next method's
    for name, method in methods.items():
        made, declared = method.counter.nfe, calls * max(nfes)
        if made != declared:
            raise AssertionError(f"{name}: {made} evaluations were made, {declared} declared")
    if dist.is_initialized():
        dist.all_reduce(totals)
    return {
        name: [
            {"nfe": nfe, **dict(zip(names, (row[:-1] / row[-1]).tolist(), strict=True))}
            for nfe, row in zip(nfes, total, strict=True)
        ]
        for name, total in zip(methods, totals, strict=True)
    }


def stream(run: Run, split: Split, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """x and y of this rank's share of a split, on the device; of one graph, on one rank."""
    rank, world = ranks()
    rows = torch.arange(rank, len(split), world).split(batch)
    batches = ((part,) for part in rows if len(part))
    for x, y in split.stream(batches, run.config.get("workers", 0)):
        if len(y):
            yield x.to(run.device), y.to(run.device)


def measures(run: Run, z: Tensor, u: Tensor, star: Tensor, y: Tensor) -> dict[str, Tensor]:
    """What tables tell of a state z, each (B,): metrics, residual under the teacher's f, distance
    to its equilibrium."""
    net, logits = run.teacher, run.teacher.head(z)
    return {
        "value": run.task.score(logits, y),
        "nll": net.nll(z, y),
        "residual": relative(net.f(z, u), z),
        "distance": relative(z, star),
        **{name: score(logits, y) for name, score in run.task.further.items()},
    }


@torch.no_grad()
def evaluate_explicit(run: Run, net: nn.Module, split: Split, batch: int = 128) -> dict[str, float]:
    """The metrics of a network of finite depth over a split."""
    scores = {"value": run.task.score, **run.task.further}
    totals = torch.zeros(len(scores) + 2, dtype=torch.float64)
    for x, y in stream(run, split, batch):
        logits = net(x)
        sums = [*(score(logits, y) for score in scores.values()), net.nll(x, y)]
        totals += torch.tensor([*(v.sum().item() for v in sums), len(y)]).double()
    if dist.is_initialized():
        dist.all_reduce(totals)
    return dict(zip((*scores, "nll"), (totals[:-1] / totals[-1]).tolist(), strict=True))


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
    candidates = {decay: counted(student, decay) for decay in run.task.decays}
    scores = {
        decay: {key: statistics.fmean(row[key] for row in rows) for key in ("value", "distance")}
        for decay, rows in evaluate(run, candidates, run.task.valid).items()
    }
    best = max(sign * score["value"] for score in scores.values())
    good = [d for d in scores if sign * scores[d]["value"] >= best - 0.005 * abs(best)]
    return min(good, key=lambda decay: scores[decay]["distance"]), scores


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
def evaluate_anytime(run: Run, name: str, split: Split, tol: float, max_nfe: int) -> dict:
    """Metric and NFE of the anytime mode over a split."""
    student, decay = run.students[name]
    scores, used = [], []
    for x, y in stream(run, split, 128):
        u = student.inject(x)
        z, nfe = anytime(student, run.teacher.initial(u), u, tol, max_nfe, decay)
        scores.append(run.task.score(run.teacher.head(z), y))
        used.append(nfe)
    nfe = torch.cat(used).float()
    return {
        "tol": tol,
        "value": torch.cat(scores).mean().item(),
        "nfe_mean": nfe.mean().item(),
        "nfe_max": int(nfe.max()),
    }


def main(argv: list[str]) -> None:
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
    add("--data", default="", help="where the data set is now")
    add("--device", default="auto", help="auto, cpu, cuda")
    add("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    if min(args.nfe, default=1) < 1 or args.max_nfe < 1 or args.batch < 1:
        raise UsageError("--nfe, --max-nfe and --batch must be >= 1")
    if not 0 <= args.decay < 1 or args.tol < 0:
        raise UsageError(
            "--decay must be in (0, 1), or 0 for the validated one; --tol must be >= 0"
        )
    if not args.run.is_dir():
        raise UsageError(f"--run {args.run}: no such folder; train.py makes one")
    run = open_run(args.run, args.data, args.device)
    if args.student not in run.students:
        known = ", ".join(repr(name) for name in run.students) or "none: train one first"
        raise UsageError(
            f"--student {args.student!r} is not finished in {args.run}; there: {known}"
        )
    if args.decay:
        run.students = {name: (student, args.decay) for name, (student, _) in run.students.items()}
    split = getattr(run.task, args.split)
    if args.files:
        nfe = args.nfe[0] if len(args.nfe) == 1 else 2
        result = answer(run, args.student, args.files, nfe, args.tol, args.max_nfe)
        line = "{file}: {answer} ({probability:.1%}, NFE {nfe})"
    elif args.tol > 0:
        result = [evaluate_anytime(run, args.student, split, args.tol, args.max_nfe)]
        line = "value {value:.2f} at {nfe_mean:.2f} evaluations on average, {nfe_max} at most"
    else:
        nfes = tuple(sorted(set(args.nfe))) or run.task.nfes
        method = {"": counted(*run.students[args.student])}
        result = evaluate(run, method, split, nfes, args.batch)[""]
        line = "NFE {nfe:3d}: value {value:.2f}, distance {distance:.4f}, residual {residual:.4f}"
    lines = [line.format(**row) for row in result]
    print(json.dumps(result, indent=1) if args.json else "\n".join(lines))


if __name__ == "__main__":
    with plain_errors():
        main(sys.argv[1:])
