"""The chains of tasks/chains.py: test accuracy by the length of a chain.

    python -m evidence.chains                                  -> results/chains.json, .md, .png
    python -m evidence.chains --tasks chains-10 chains-20 --seeds 0 1

A run that is missing is trained first, by the commands of train.py and evidence/rivals.py. The
teacher of preset ignn-far is taken over from preset ignn: the presets differ only in the start of
their students.
"""

import statistics
import sys
from functools import partial
from pathlib import Path

import torch

import runs
from checkpoint import plain_errors, provenance, versions
from config import command_line
from evidence import compare, tables
from evidence.evaluate import evaluate
from evidence.figures import by_column
from evidence.measure import BATCH, direct_row, evaluate_explicit
from evidence.methods import methods
from evidence.rivals import Rivals, open_rivals
from evidence.timing import interleaved
from runs import Run
from tasks import chains

FAR = "ignn-far"
# Teachers of other kinds, with the peak rate that suits them.
OTHERS = {"eignn": ["--preset", "eignn"], "mignn": ["--preset", "mignn", "--teacher_lr", "0.005"]}
RIVALS = ("direct-4", "explicit-gcn", "explicit-gat", "explicit-gcnii")
FEW = (1, 4, 8)  # evaluations
TITLES = {
    "2": "test accuracy, %, by method and evaluations and by L, a chain's nodes; two classes",
    "10": "test accuracy, %, the same; ten classes",
    "seconds": "seconds from the injected input to the state, the same; two classes",
}
# The lines of the figure: rows of the table, each with a label and a style.
SHOWN = {
    "ignn by picard, 4 L": ("IGNN, equilibrium", "C0-"),
    "eignn by picard, 4 L": ("EIGNN, equilibrium", "C2--"),
    "mignn by picard, 4 L": ("MIGNN, equilibrium", "C4:"),
    f"cdeq {FAR}, 1": ("C-DEQ, far start, 1 NFE", "C3-o"),
    "cdeq, 8": ("C-DEQ, 8 NFE", "C3--s"),
    "cdeq, 1": ("C-DEQ, 1 NFE", "C3:v"),
    "anderson, 8": ("Anderson, 8 NFE", "C1--s"),
    "direct, 4": ("trained directly, 4 NFE", "C5--d"),
    "gcnii": ("GCNII, 16 layers", "C7-^"),
    "gcn": ("GCN, 3 layers", "C8-x"),
    "gat": ("GAT, 2 layers", "C9-+"),
}


def train_task(task: str, seed: int, folder: Path, flags: list[str]) -> None:
    """Every run of one task and seed."""
    here = ["--task", task, "--seed", str(seed), *flags]
    at = [*here, "--out", str(folder)]
    for stage in ("teacher", "student"):
        compare.train("train", *at, "--stage", stage)
    train_beside(folder, FAR, here)
    for name, more in OTHERS.items():
        compare.train("train", *here, *more, "--stage", "teacher", "--out", f"{folder}-{name}")
    for kind in RIVALS:
        compare.train("evidence.rivals", kind, *at)


def train_beside(folder: Path, preset: str, flags: list[str]) -> None:
    """Trains a student of another preset for a folder's teacher, in a folder beside it."""
    where = [*flags, "--preset", preset, "--teacher", f"{folder}/teacher.pt"]
    for stage in ("teacher", "student"):
        compare.train("train", *where, "--out", f"{folder}-{preset}", "--stage", stage)


@torch.no_grad()
def measure(folder: Path) -> dict[str, float]:
    """Test accuracy of every method of one task and seed, by method and evaluations."""
    run = runs.open_run(folder)
    rivals, test = open_rivals(run), run.task.test
    found = at_equilibrium(run, "ignn")
    for name in OTHERS:
        found |= at_equilibrium(beside(folder, name), name)
    found |= after_few(run, "picard") | after_few(run, "anderson") | after_few(run, "cdeq")
    far = after_few(beside(folder, FAR), "cdeq")
    found |= {name.replace("cdeq", f"cdeq {FAR}"): value for name, value in far.items()}
    for J, net in rivals.direct.items():
        found[f"direct, {J}"] = direct_row(run, J, net, test)["value"]
    for name, net in rivals.explicit.items():
        found[name] = evaluate_explicit(run, net, test)["value"]
    return found


def beside(folder: Path, name: str) -> Run:
    return runs.open_run(Path(f"{folder}-{name}"))


def table(run: Run) -> dict:
    return methods(run, Rivals({}, {}, {}))


def after_few(run: Run, name: str) -> dict[str, float]:
    """A method of the run after 1, 4 and 8 evaluations."""
    rows = evaluate(run, {name: table(run)[name]}, run.task.test, FEW, converge=False)[name]
    return {f"{name}, {row['nfe']}": row["value"] for row in rows}


def at_equilibrium(run: Run, name: str) -> dict[str, float]:
    """A teacher by either solver, after K, K / 2 and K / 4 evaluations: 4, 2 and 1 per node."""
    both, K = {key: table(run)[key] for key in ("picard", "anderson")}, run.config["K"]
    rows = evaluate(run, both, run.task.test, (K // 4, K // 2, K), converge=False)
    return {f"{name} by {key}, {times}": row["value"] for key, found in rows.items()
            for times, row in zip(("L", "2 L", "4 L"), found, strict=True)}  # fmt: skip


@torch.no_grad()
def seconds(run: Run, far: Run, steps: int, label: str) -> dict[str, float]:
    """Medians of one evaluation of f, of both starts, and of whole answers, from the injected input
    to the state. far: the run with the far start; steps: of the solvers, named by label."""
    net, task = run.teacher, run.task
    x, _ = task.test.batch(torch.arange(min(BATCH, len(task.test))))
    u = net.inject(x.to(run.device))
    z0 = net.initial(u)
    jobs = {"f": partial(net.f, torch.ones_like(z0), u)}
    for name, where in {"cdeq": run, f"cdeq {far.config['preset']}": far}.items():
        jobs[f"{name}, its start alone"] = partial(where.students[""][0].guess, u)
        jobs[f"{name}, 1"] = partial(table(where)["cdeq"].solve, z0, u, 1, last=True)
    for name in ("picard", "anderson"):
        jobs[f"{name}, {label}"] = partial(table(run)[name].solve, z0, u, steps, last=True)
    spent = interleaved(jobs, 5, run.device)
    return {name: statistics.median(values) for name, values in spent.items()}


def part(title: str, columns: dict[str, list[dict[str, float]]]) -> dict:
    """A table: for each method a list of columns, each a list of values by seed. columns: by name,
    the values of every seed."""
    names = dict.fromkeys(name for seeds in columns.values() for one in seeds for name in one)
    cells = {name: [[one[name] for one in seeds] for seeds in columns.values()] for name in names}
    digits = 5 if title == "seconds" else 1
    return {"title": TITLES[title], "columns": [*columns], "digits": digits, "cells": cells}


def figure(result: dict, path: Path) -> None:
    """Test accuracy with two classes by length, a line for each method: a PNG."""
    for part in result["parts"]:
        if part["title"] == TITLES["2"]:
            by_column(part, SHOWN, "nodes of a chain", path)


def main(argv: list[str]) -> None:
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--tasks", choices=[*chains.TASKS], nargs="+", default=[*chains.TASKS])
    add("--finished", action="store_true", help="train nothing, report what is there")
    args = compare.over_seeds(parser, argv, [0])
    found: dict = {"2": {}, "10": {}, "seconds": {}}
    for task in dict.fromkeys(args.tasks):
        classes, length = task.removeprefix("chains").split("-")
        folders = [Path(f"runs/{task}-seed{seed}") for seed in args.seeds]
        for seed, folder in zip(args.seeds, folders, strict=True):
            if not args.finished:
                train_task(task, seed, folder, args.flags)
        found[classes or "2"][length] = [measure(folder) for folder in folders]
        if not classes:
            pairs = [(runs.open_run(folder), beside(folder, FAR)) for folder in folders]
            steps = 2 * int(length)
            found["seconds"][length] = [seconds(*pair, steps, "2 L") for pair in pairs]
    result = {"study": "Chains: who sees how far", "seeds": args.seeds, **provenance()}
    result |= {"versions": versions(), "device": "cpu" if not torch.cuda.is_available() else "cuda"}
    result["parts"] = [part(title, columns) for title, columns in found.items() if columns]
    print(tables.write(result, args.results / "chains", figure))


if __name__ == "__main__":
    with plain_errors():
        main(sys.argv[1:])
