r"""Side by side: every method at equal NFE, over seeds, with time and memory; ablations.

    python compare.py --task digits --seeds 0 1 2          its table   -> results/digits.json
    python compare.py --task docstrings --seeds 0 --tables 4    loss weights -> docstrings-grid.json
    python compare.py --task digits --figures 3            Anderson step -> digits-aa.json
    python compare.py --task digits --ablation             our recipe  -> digits-ablation.json
    python compare.py --task digits-hard --teachers        how they are trained -> -teachers.json
    python compare.py --task digits --peers                torchdeq's  -> digits-peers.json
    torchrun --nproc_per_node=2 compare.py --task wikitext2 --seeds 0 --finished    by two processes

Each run that is missing is trained first, by the train.py command that the JSON names. Beside every
JSON stand the same numbers as a Markdown table and a figure. Times are medians of methods that take
turns in one process, so that a busy machine slows them alike. What was not measured stays empty.
"""

import argparse
import collections
import copy
import dataclasses
import importlib.util
import itertools
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import infer
import runs
from anderson import Counter, Map, anderson, picard
from checkpoint import UsageError, plain_errors, provenance, versions
from config import TASKS, command_line, open_task, parse
from fpode import contraction
from infer import Method
from intervals import difference
from models import Equilibrium
from models.learned_solver import learned
from runs import Run
from student import Student
from tables import LAM1, LAM2, write
from tasks import Task, graphs, text

# Each ingredient of the default recipe removed in turn.
ABLATIONS = {
    "no-start": ["--no-start"],
    "teachers-injection": ["--no-own_injection"],
    "one-step": ["--rollout_max", "1"],
    "no-distance": ["--kl", "1"],
    "no-prediction": ["--kl", "0"],
    "anderson": ["--aa"],
    "paper": ["--recipe", "paper"],
}

# Fig. 3, of both recipes.
AA = {
    "anderson": ["--aa"],
    "paper": ["--recipe", "paper"],
    "paper-no-anderson": ["--recipe", "paper", "--no-aa"],
}
# Table 4.
GRID = {
    f"lam1-{lam1}-lam2-{lam2}": ["--recipe", "paper", "--lam1", lam1, "--lam2", lam2]
    for lam1 in LAM1
    for lam2 in LAM2
}
# The teacher that has its student's updates, too; and teachers with an ingredient changed.
LONGER = "teacher-longer"
TEACHERS = {
    "teacher-one-layer": ["--layers", "1"],
    "teacher-from-z0": ["--before", "0"],
    "teacher-growing": ["--growing", "0.7"],
    "teacher-not-growing": ["--growing", "0"],
    "teacher-jacobian": ["--jac_weight", "0.2"],
}
# Students beside the default one in a task's own table.
BESIDE = {"paper": ["--recipe", "paper"]}
# What the files of results/ are called, and the numbers of the paper that are in them.
TABLES = {1: "", 2: "", 3: "", 4: "grid", 5: ""}
FIGURES = {2: "", 3: "aa"}


def students(part: str) -> dict[str, list[str]]:
    """The students of a part of the results, by name, with their flags for train.py."""
    if part == "grid":
        return GRID
    if part == "teachers":
        return {}
    return {"": []} | {"": BESIDE, "peers": BESIDE, "aa": AA, "ablation": ABLATIONS}[part]


def methods(run: Run, peers: bool = False) -> dict[str, Method]:
    """Every solver of a run behind one signature, each with the counter of its evaluations.

    Where tokens have Anderson weights of their own, "-shared" is the same with one weight vector
    for a whole sequence, which lets the future leak into earlier predictions. peers: torchdeq's
    solvers of the same teacher.
    """
    net, dims, window = run.teacher, {"sample_dims": run.teacher.sample_dims}, run.solver()
    solvers = {"picard": picard_of(net), "anderson": partial(anderson, **dims, **window)}
    if net.sample_dims > 1:
        solvers["anderson-shared"] = partial(anderson, **window)
    if peers:
        solvers |= {f"torchdeq-{kind}": partial(peer, kind, **dims) for kind in PEERS}
    table = {name: solved_by(net, solver) for name, solver in solvers.items()}
    for name, solver in run.learned.items():
        method = partial(learned, solver=solver, **dims)
        table[name] = solved_by(net, method, solver.initial)
    for name, (student, decay) in run.students.items():
        table[label(name)] = infer.counted(net, student, decay)
        if not name:
            table["cdeq+anderson"] = JumpThenSolve(run, student, decay)
        if net.sample_dims > 1 and student.anderson and not name:
            shared = copy.copy(student)
            shared.two_point = student.two_point | {"sample_dims": 1}
            table["cdeq-shared"] = infer.counted(net, shared, decay)
    return table


def solved_by(net: Equilibrium, solver: Callable[..., Tensor], start=None) -> Method:
    """A solver of the teacher as a method. start(u): its own z_0."""
    f = Counter(net.f)

    def solve(z0: Tensor, u: Tensor, nfe: int, last: bool = False) -> Tensor:
        return solver(lambda z: f(z, u), z0 if start is None else start(u), nfe, last=last)

    return Method(net, solve, net.inject, f)


class JumpThenSolve(Method):
    """The student's first answer in place of z_0, then the teacher's Anderson acceleration: the
    jump of the one, the convergence of the other. Each has an injection of its own: u is a pair."""

    def __init__(self, run: Run, student: Student, decay: float):
        net, f = run.teacher, Counter(run.teacher.f)
        jump = infer.counted(net, student, decay)
        solver = partial(anderson, sample_dims=net.sample_dims, **run.solver())

        def inject(x: Tensor, memory=None) -> tuple:
            before = memory or (None, None)
            return net.inject(x, before[0]), student.inject(x, before[1])

        def solve(z0: Tensor, u: tuple, nfe: int, last: bool = False) -> Tensor:
            before, z1 = jump.counter.nfe, jump.solve(z0, u[1], 1, last=True)
            f.nfe += jump.counter.nfe - before
            states = solver(lambda z: f(z, u[0]), z1, nfe - 1) if nfe > 1 else z1[None]
            return states[-1] if last else torch.cat([z0[None], states])

        super().__init__(net, solve, inject, f)

    def initial(self, u: tuple) -> Tensor:
        return self.net.initial(u[0])

    def remember(self, u: tuple, z: Tensor) -> tuple:
        return tuple(self.net.remember(part, z) for part in u)


# torchdeq's solvers: the module, the function, the evaluations before its first answer.
PEERS = {
    "fixed-point": ("fp_iter", "fixed_point_iter", 1),
    "broyden": ("broyden", "broyden_solver", 2),
    "anderson": ("anderson", "anderson_solver", 3),
}


def peer(kind: str, f: Map, z0: Tensor, K: int, *, last=False, sample_dims: int = 1) -> Tensor:
    """A solver of torchdeq under our signature: its iterate after each evaluation; before its first
    one, z_0. Broyden's are states, of which f is not yet taken."""
    module = importlib.import_module(f"torchdeq.solver.{PEERS[kind][0]}")
    solver, first = getattr(module, PEERS[kind][1]), PEERS[kind][2]
    flat = z0.flatten(0, sample_dims - 1)
    wanted = [*range(first, K + 1)]
    options = dict(max_iter=K - (kind == "broyden"), indexing=wanted, tol=0.0, return_final=True)
    _, states, _ = solver(lambda z: f(z.view_as(z0)).reshape_as(z), flat, **options)
    states = [z0] * min(first, K + 1) + [z.view_as(z0) for z in states[: len(wanted)]]
    return states[-1] if last else torch.stack(states)


def label(student: str) -> str:
    """The method's name in tables: cdeq for the default recipe's student."""
    return f"cdeq-{student}" if student else "cdeq"


@torch.no_grad()
def cost(run: Run, table: dict, wanted: set[tuple], batch: int) -> dict:
    """Median seconds of one batch from the injected input to the logits, and the process's peak
    memory in bytes from the input to the logits: pairs by (method, NFE) for those wanted, the
    direct networks and the explicit ones, whose NFE is None, as is that of "injection", the step
    before. Of a text, a batch is a segment after another one, and the likelihoods of its words
    stand for logits."""
    net, task = run.teacher, run.task
    batch_of = task.test.batch(torch.arange(min(batch, len(task.test))))
    x, y = (v.to(run.device) for v in batch_of)
    parts = [*two_parts(net, x, y)]
    (first, _), (last, told) = parts[0], parts[-1]

    def past(method: Method):
        """What it remembers of the part before."""
        u = method.inject(first)
        return method.remember(u, method.initial(u)) if net.memory else None

    def answer(method: Method, nfe: int, memory, u=None) -> Tensor:
        u = method.inject(last, memory) if u is None else u
        z = method.solve(method.initial(u), u, nfe, last=True)
        return method.net.head(z) if task.score else method.net.nll(z, told)

    jobs = {key: (table[key[0]], key[1]) for key in sorted(wanted)}
    for J, direct in run.direct.items():
        jobs["direct", J] = solved_by(direct, picard_of(direct)), J
    jobs = {key: (method, nfe, past(method)) for key, (method, nfe) in jobs.items()}
    alone = {("injection", None): partial(net.inject, last, past(table["anderson"]))}
    for name, explicit in run.explicit.items():
        *_, inputs = two_parts(explicit, x, y)
        alone[name, None] = partial(explicit, inputs[0])
        if not task.score:
            alone[name, None] = partial(explicit.nll, *inputs)
    given = {job[0]: job[0].inject(last, job[2]) for job in jobs.values()}
    timed = {key: partial(answer, *job, given[job[0]]) for key, job in jobs.items()}
    spent = interleaved(timed | alone, 5, run.device, patience=60)
    seconds = {key: statistics.median(values) for key, values in spent.items()}
    timed.clear(), given.clear()  # gigabytes on a graph
    whole = {key: partial(answer, *job) for key, job in jobs.items()} | alone
    return {key: (seconds[key], peak_memory(whole[key], run.device)) for key in whole}


def two_parts(network, x: Tensor, y: Tensor):
    """The first two parts of inputs and labels, or the one that there is."""
    return itertools.islice(network.segments(x, y), 2)


def picard_of(net: Equilibrium) -> Callable[..., Tensor]:
    return partial(picard, sample_dims=net.sample_dims)


def peak_memory(job: Callable[[], object], device: torch.device) -> int | None:
    """Bytes at the highest point of a job: allocated on a GPU, resident on Linux, else unknown."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        job()
        return torch.cuda.max_memory_allocated(device)
    if hasattr(runs.LIBC, "malloc_trim"):
        runs.LIBC.malloc_trim(0)  # what earlier jobs left is not this one's
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the high-water mark
    except OSError:
        return None
    job()
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def interleaved(
    jobs: dict, repeats: int, device: torch.device, warmup: int = 1, patience: float = math.inf
) -> dict[object, list[float]]:
    """Seconds of each job, all jobs taking turns, every second round in reverse order.

    patience: seconds after which three rounds are enough.
    """
    spent: dict = {key: [] for key in jobs}
    start = time.perf_counter()
    for repeat in range(-warmup, repeats):
        if repeat >= 3 and time.perf_counter() - start > patience:
            break
        for key in list(jobs)[:: -1 if repeat % 2 else 1]:
            synchronize(device)
            begin = time.perf_counter()
            jobs[key]()
            synchronize(device)
            if repeat >= 0:
                spent[key].append(time.perf_counter() - begin)
    return spent


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def equals(run: Run, table: dict, batch: int) -> dict[str, int | None]:
    """The fewest evaluations from which on each method's validation metric stays as good as the
    converged teacher's, less the task's margin; None where it never does within K."""
    task, K = run.task, run.config["K"]
    nfes = tuple(range(1, K + 1))
    curves = infer.evaluate(run, table, task.to_choose(), nfes, batch, memory="teacher")
    teacher = curves["anderson"][-1]["value"]
    fewest = {}
    for name, rows in curves.items():
        short = [row["nfe"] for row in rows if not task.as_good(row["value"], teacher)]
        first = max(short, default=0) + 1
        fewest[name] = first if first <= K else None
    return fewest


def measured(run: Run, table: dict, split: str, batch: int, further: set[tuple] = frozenset()):
    """A row for every method and NFE of the task's tables, for every direct and every explicit
    network; and, by (method, NFE), the metric and the seconds there and at the further ones."""
    data, nfes = getattr(run.task, split), {*run.task.nfes, *(nfe for _, nfe in further)}
    curves = infer.evaluate(run, table, data, tuple(sorted(nfes)), batch)
    points = {(name, row["nfe"]): row for name in table for row in curves[name]}
    wanted = {(name, nfe) for name in table for nfe in run.task.nfes}
    rows = [
        {"method": name, **points[name, nfe], "params": parameters(run, name)}
        for name in table
        for nfe in run.task.nfes
    ]
    for J, net in run.direct.items():
        method = {"direct": solved_by(net, picard_of(net))}
        alone = dataclasses.replace(run, teacher=net)
        (found,) = infer.evaluate(alone, method, data, (J,), batch, converge=False)["direct"]
        params = sum(p.numel() for p in net.parameters())
        rows.append({"method": "direct", **found, "params": params})
    for name, net in run.explicit.items():
        params = sum(p.numel() for p in net.parameters())
        found = infer.evaluate_explicit(run, net, data, batch)
        found["valid"] = infer.evaluate_explicit(run, net, run.task.valid, batch)["value"]
        rows.append({"method": name, "nfe": None, **found, "params": params})
    spent: dict = collections.defaultdict(lambda: (None, None))
    if not infer.ranks()[0]:  # one rank measures, the others wait; it is the one that writes
        spent |= cost(run, table, wanted | further, batch)
    for row in rows:
        seconds, memory = spent[row["method"], row["nfe"]]
        row |= {"std": None, "n": 1, "seconds_per_batch": seconds, "peak_memory_bytes": memory}
    return rows, points, spent


@torch.no_grad()
def report(run: Run, split: str = "test", batch: int = 128, peers: bool = False) -> dict:
    """Evaluates every method of a run; `merge` makes of it the form of report.json and results/."""
    task, table, K = run.task, methods(run, peers), run.config["K"]
    converged = {"anderson": table["anderson"]}
    valid = infer.evaluate(run, converged, task.valid, (K,), batch, "teacher")["anderson"][0]
    end = "anderson", run.config["K"]
    equal = {key for key in equals(run, table, batch).items() if key[1]}
    rows, points, spent = measured(run, table, split, batch, equal | {end})
    rows += [{"method": name, "nfe": None, "value": None, "n": 0} for name in task.unmeasured]
    equal_rows = [
        {
            "method": name,
            "nfe": [nfe],
            "value": points[name, nfe]["value"],
            "seconds_per_batch": spent[name, nfe][0],
        }
        for name, nfe in sorted(equal, key=lambda key: list(table).index(key[0]))
    ]
    note, each = task.note, run.teacher.cell.cost
    if each != 1:
        note = f"{note or task.name}, one NFE costs {each} evaluations of the other networks,"
    return {
        "task": task.name,
        "note": note,
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "split": split,
        "seeds": [run.config["seed"]],
        **provenance(),
        "versions": versions(),
        "device": torch.cuda.get_device_name() if run.device.type == "cuda" else "cpu",
        "dtype": run.config["dtype"],
        "batch": min(batch, len(getattr(task, split))),
        "teacher": {
            **points[end],
            "valid": valid["value"],
            "contraction": contraction_of(run),
            "params": parameters(run, "anderson"),
        },
        "memory": memories(run, table, split, batch),
        "rows": rows,
        "margin": task.margin,
        "equal": equal_rows,
        "injection_seconds": spent["injection", None][0],
        "decay": {label(name): [decay] for name, (_, decay) in run.students.items()},
    }


def memories(run: Run, table: dict, split: str, batch: int) -> list[dict]:
    """Of networks that see the segment before: rows of Anderson and the student by whose states
    these were. Empty for others."""
    if not run.teacher.memory:
        return []
    data, of = getattr(run.task, split), {k: table[k] for k in ("anderson", "cdeq") if k in table}
    return [
        {"method": name, "memory": kind, "nfe": row["nfe"], "value": row["value"]}
        for kind in ("teacher", "none")
        for name, rows in infer.evaluate(run, of, data, None, batch, kind).items()
        for row in rows
    ]


def parameters(run: Run, method: str) -> int:
    """Trainable numbers that a method needs: the teacher's, and the student's beside them."""
    method = method.removesuffix("-shared").removesuffix("+anderson")
    networks = [run.teacher, *(s for name, (s, _) in run.students.items() if label(name) == method)]
    networks += [solver for name, solver in run.learned.items() if name == method]
    return sum(p.numel() for net in networks for p in net.parameters())


def merge(reports: list[dict]) -> dict:
    """One report over seeds: means of every number, the metric's std (n - 1) and n, and in place of
    its items the intervals of its difference to the teacher and to the direct network."""
    result = dict(reports[0], seeds=[seed for r in reports for seed in r["seeds"]], **provenance())
    result["runs"] = [{"command": r["command"], "commit": r["commit"]} for r in reports]
    for report in reports:
        for row in (report["teacher"], *report["rows"]):
            row["seed"] = report["seeds"][0]
    teachers = [r["teacher"] for r in reports]
    result["teacher"] = mean(teachers)
    groups = {(rows[0]["method"], rows[0]["nfe"]): rows for rows in grouped(
        reports, "rows", ("method", "nfe"))}  # fmt: skip
    result["rows"] = [mean(rows) for rows in groups.values()]
    for row, rows in zip(result["rows"], groups.values(), strict=True):
        others = {"vs_teacher": teachers, "vs_direct": groups.get(("direct", row["nfe"]))}
        for name, other in others.items():
            if other and other is not rows and row["value"] is not None:
                sides = ({r["seed"]: r["items"] for r in side} for side in (rows, other))
                row[name] = difference(*sides, perplexity=result["metric"] == "perplexity")
    result["injection_seconds"] = statistics.fmean(r["injection_seconds"] for r in reports)
    result["equal"] = [  # only methods that get there with every seed
        {**mean(rows), "nfe": [nfe for row in rows for nfe in row["nfe"]]}
        for rows in grouped(reports, "equal", ("method",))
        if len(rows) == len(reports)
    ]
    result["memory"] = [
        mean(rows) for rows in grouped(reports, "memory", ("method", "memory", "nfe"))
    ]
    result["decay"] = {
        name: [base for r in reports for base in r["decay"].get(name, [])]
        for name in {name: None for r in reports for name in r["decay"]}
    }
    return result


def mean(rows: list[dict]) -> dict:
    """The means of rows of several seeds, and the metric's spread over them."""
    metrics = ("value", "valid", "top5", "nll", "residual", "distance", "contraction")
    numbers = (*metrics, "seconds_per_batch", "peak_memory_bytes")
    known = [key for key in numbers if rows[0].get(key) is not None]
    means = {key: statistics.fmean(r[key] for r in rows) for key in known}
    values = [r["value"] for r in rows if r["value"] is not None]
    spread = statistics.stdev(values) if len(values) > 1 else None
    kept = {key: value for key, value in rows[0].items() if key not in ("items", "seed")}
    return {**kept, **means, "std": spread, "n": len(values)}


def grouped(reports: list[dict], part: str, keys: tuple[str, ...]) -> list[list[dict]]:
    """The rows of a part of all reports, those that agree in these keys together."""
    groups: dict[tuple, list[dict]] = {}
    for row in (row for report in reports for row in report[part]):
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(groups.values())


def train(*flags: str) -> None:
    """Runs train.py as its own process, as a user would; a finished stage returns at once."""
    command = [sys.executable, str(Path(__file__).with_name("train.py")), *flags]
    print("running: python train.py", *flags, file=sys.stderr, flush=True)
    code = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
    if code:
        raise UsageError(f"train.py {' '.join(flags)} ended with exit code {code}, see its message")


def table_over_seeds(
    task: str, seeds: list[int], variants: dict[str, list[str]], extra: list[str],
    finished: bool = False, part: str = "",
) -> dict:  # fmt: skip
    """Trains what is missing and reports the named students of every seed in one table; with
    `finished` nothing is trained, and what is missing is said and has no part in the means.

    In a task's own table its references (explicit networks), direct networks, learned solvers and
    rivals (teachers beside the first one, solved under the names "picard (eignn)", ...) have rows
    too; in the part "peers" torchdeq's solvers, in "teachers" those of TEACHERS.
    """
    kind, whole = open_task({"task": task, "data": data_folder(extra)}), part in ("", "peers")
    if not whole:
        none = dict.fromkeys(("directs", "references", "learned", "rivals", "unmeasured"), ())
        kind = dataclasses.replace(kind, **none)
    if part == "teachers":
        kind = dataclasses.replace(kind, rivals=tuple(TEACHERS))
    reports = []
    for seed in seeds:
        folder = Path(f"runs/{task}-seed{seed}")
        rivals = {name: folder.with_name(f"{folder.name}-{name}") for name in kind.rivals}
        if not finished:
            train_seed(
                ["--task", task, "--seed", str(seed), *extra], folder, variants, kind, rivals
            )
        run = runs.open_run(folder)
        missing = {*variants} - {*run.students}
        run.students = {name: run.students[name] for name in variants if name in run.students}
        others = {"explicit": kind.references, "learned": kind.learned, "direct": kind.directs}
        for kinds, wanted in others.items():
            there = {name: net for name, net in getattr(run, kinds).items() if whole}
            setattr(run, kinds, there)
            missing |= {f"{kinds} {name}" for name in {*wanted} - {*there}}
        for name in sorted(missing):
            print(f"{folder}: {name or 'the student'} is not finished", file=sys.stderr)
        result = report(run, peers=part == "peers")
        for rival, other in rivals.items():
            try:
                opened = runs.open_run(other)
            except UsageError as error:
                print(error, file=sys.stderr)
                continue
            result["rows"] += rival_rows(opened, rival, result["split"])
        reports.append(result)
    return {} if infer.ranks()[0] else merge(reports)


def rival_rows(run: Run, name: str, split: str, batch: int = 128) -> list[dict]:
    """The rows of another teacher: of the same network trained otherwise, its equilibrium alone."""
    if name != LONGER and name not in TEACHERS:
        rows, _, _ = measured(run, methods(run), split, batch)
        return [{**row, "method": f"{row['method']} ({name})"} for row in rows]
    table, K = {"anderson": methods(run)["anderson"]}, run.config["K"]
    (row,) = infer.evaluate(run, table, getattr(run.task, split), (K,), batch)["anderson"]
    more = {"params": parameters(run, "anderson"), "contraction": contraction_of(run)}
    more |= dict.fromkeys(("seconds_per_batch", "peak_memory_bytes"))
    return [{"method": name, **row, **more}]


@torch.no_grad()
def contraction_of(run: Run, batch: int = 128) -> float:
    """The error factor per Anderson step of a teacher, measured on a batch to validate."""
    net, split = run.teacher, run.task.valid
    x, y = split.batch(torch.arange(min(batch, len(split))))
    u = net.inject(next(net.segments(x.to(run.device), y))[0])
    options = dict(sample_dims=net.sample_dims, **run.solver())
    states = anderson(lambda z: net.f(z, u), net.initial(u), run.config["K"], **options)
    return contraction(states, net.sample_dims)


def train_seed(
    base: list[str], folder: Path, variants: dict[str, list[str]], kind: Task, rivals: dict
) -> None:
    """Every run that one seed's part of a table needs, by train.py's own command."""
    here = [*base, "--out", str(folder)]
    train(*here, "--stage", "teacher")
    for name, flags in variants.items():
        named = ["--name", name] if name not in ("", "paper") else []
        train(*here, "--stage", "student", *flags, *named)
    for J in kind.directs:
        train(*here, "--stage", "direct", "--direct", str(J))
    for name in kind.references:
        train(*here, "--stage", "explicit", "--explicit", name)
    for name in kind.learned:
        train(*here, "--stage", name)
    for rival, other in rivals.items():
        flags = TEACHERS.get(rival, ["--preset", rival])
        if rival == LONGER:
            flags = ["--teacher_steps", str(longer(base))]
        train(*base, *flags, "--stage", "teacher", "--out", str(other))


def longer(flags: list[str]) -> int:
    """Updates of a teacher and its student together."""
    config, _ = parse(flags)
    return config.teacher_steps + config.student_steps


def data_folder(flags: list[str]) -> Path:
    """The --data among flags for train.py."""
    return Path(flags[flags.index("--data") + 1] if "--data" in flags else "data")


def main(argv: list[str]) -> None:
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--task", choices=tuple(TASKS), default="digits")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--tables", type=int, nargs="+", default=[], help="the paper's, 1 to 5: 1 of a text, 2 of "
        "images, 3 of a graph, 4 loss weights, 5 memory by NFE")  # fmt: skip
    add("--figures", type=int, nargs="+", default=[], help="2: residual by NFE; 3: Anderson step")
    add("--ablation", action="store_true", help="each ingredient of the recipe removed in turn")
    add("--teachers", action="store_true", help="teachers with an ingredient changed")
    add("--finished", action="store_true", help="train nothing, report what is there")
    add("--peers", action="store_true", help="torchdeq's solvers beside all others")
    add("--results", type=Path, default=Path("results"), help="where to write")
    add("--flags", nargs=argparse.REMAINDER, default=[], help="more flags for train.py, last")
    args = parser.parse_args(argv)
    if len({*args.seeds}) < len(args.seeds) or min(args.seeds) < 0:
        raise UsageError(f"--seeds {' '.join(map(str, args.seeds))}: each once, and >= 0")
    parts = wanted_parts(args)
    if "RANK" in os.environ:
        if not args.finished:
            raise UsageError("under torchrun, compare.py trains nothing: add --finished")
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    for part in parts:
        result = table_over_seeds(
            args.task, args.seeds, students(part), args.flags, args.finished, part
        )
        if result:  # the first process writes
            stem = args.results / (f"{args.task}-{part}" if part else args.task)
            print(write(result, stem))
    if dist.is_initialized():
        runs.leave()


def wanted_parts(args) -> list[str]:
    """The parts of the results that a command line asks for; UsageError where there is no such."""
    own = 1 if args.task in text.TASKS else 3 if args.task in graphs.TASKS else 2
    for flag, numbers, known in (
        ("--tables", args.tables, {number: TABLES[number] for number in (own, 4, 5)}),
        ("--figures", args.figures, FIGURES),
    ):
        for number in numbers:
            if number not in known:
                allowed = " | ".join(map(str, known))
                raise UsageError(f"{flag} {number}: of {args.task}, allowed is {allowed}")
    parts = [TABLES[n] for n in args.tables] + [FIGURES[n] for n in args.figures]
    if args.peers and importlib.util.find_spec("torchdeq") is None:
        raise UsageError('--peers: torchdeq is missing (pip install ".[peers]")')
    parts += [part for part in ("ablation", "peers", "teachers") if getattr(args, part)]
    return list(dict.fromkeys(parts)) or [""]


if __name__ == "__main__":
    with plain_errors():
        main(sys.argv[1:])
