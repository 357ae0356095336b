r"""Side by side: every method at equal NFE, over seeds, with time and memory; ablations.

    python -m evidence.compare --task digits --seeds 0 1 2            -> results/digits.json
    python -m evidence.compare --task digits --part ablation aa       -> digits-ablation.json, ...
    torchrun --nproc_per_node=2 -m evidence.compare --task wikitext2 --finished    two processes

Parts of the results, each with tables of its own:

    main      all methods: Tables 1-3 and 5, Fig. 2
    grid      the loss weights of the paper's recipe: Table 4
    aa        with and without the Anderson step of Eq. 7: Fig. 3
    ablation  each ingredient of the default recipe removed in turn
    teachers  teachers with an ingredient of their training changed

A run that is missing is trained first, by the commands of train.py and evidence/rivals.py. Each
JSON file comes with the same numbers as a Markdown table and a figure.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import runs
from checkpoint import UsageError, plain_errors
from config import TASKS, command_line, parse
from evidence.evaluate import evaluate, ranks
from evidence.measure import contraction_of, measure, measured, parameters
from evidence.merge import merge
from evidence.methods import methods
from evidence.rivals import Rivals, open_rivals
from evidence.tables import LAM1, LAM2, write
from runs import Run
from tasks import Task

ROOT = Path(__file__).parents[1]
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
# Students of each part of the results, by name, with their flags for train.py.
DEFAULT = {"": []}
STUDENTS = {
    "main": DEFAULT | {"paper": ["--recipe", "paper"]},
    "grid": GRID,
    "aa": DEFAULT | AA,
    "ablation": DEFAULT | ABLATIONS,
    "teachers": DEFAULT,
}


def train(module: str, *flags: str) -> None:
    """Runs a training command as its own process, as a user would; what is finished is not done
    again."""
    print("running: python -m", module, *flags, file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, "-m", module, *flags],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    if done.returncode:
        raise UsageError(
            f"{module} {' '.join(flags)} ended with exit code {done.returncode}, see its message"
        )


def train_seed(task: Task, part: str, flags: list[str], folder: Path) -> None:
    """Every run that one seed's part of a table needs; flags: for train.py."""
    here = [*flags, "--out", str(folder)]
    train("train", *here, "--stage", "teacher")
    for name, more in STUDENTS[part].items():
        named = ["--name", name] if name not in ("", "paper") else []
        train("train", *here, "--stage", "student", *more, *named)
    if part == "main":
        kinds = [f"direct-{J}" for J in task.directs]
        kinds += [*task.learned, *(f"explicit-{name}" for name in task.references)]
        for kind in kinds:
            train("evidence.rivals", kind, *here)
    for rival in teachers(task, part):
        more = TEACHERS.get(rival, ["--preset", rival])
        if rival == LONGER:
            config, _ = parse(flags)
            more = ["--teacher_steps", str(config.teacher_steps + config.student_steps)]
        train("train", *flags, *more, "--stage", "teacher", "--out", f"{folder}-{rival}")


def teachers(task: Task, part: str) -> tuple[str, ...]:
    """The teachers that a part has beside the first one: other networks, or otherwise trained."""
    return {"main": task.rivals, "teachers": tuple(TEACHERS)}.get(part, ())


def seed_report(task: Task, part: str, folder: Path) -> dict:
    """One seed's report of everything finished in its folders; prints what is missing."""
    run = runs.open_run(folder)
    wanted, rivals = STUDENTS[part], Rivals({}, {}, {})
    missing = [f"student {name}".strip() for name in wanted if name not in run.students]
    run.students = {name: run.students[name] for name in wanted if name in run.students}
    if part == "main":
        rivals = open_rivals(run)
        there = {"direct": task.directs, "learned": task.learned, "explicit": task.references}
        for kind, names in there.items():
            missing += [f"{kind} {name}" for name in names if name not in getattr(rivals, kind)]
    for name in missing:
        print(f"{folder}: {name} is not finished", file=sys.stderr)
    result = measure(run, rivals)
    for rival in teachers(task, part):
        try:
            opened = runs.open_run(Path(f"{folder}-{rival}"))
        except UsageError as error:
            print(error, file=sys.stderr)
        else:
            result["rows"] += rival_rows(opened, rival)
    return result


def rival_rows(run: Run, name: str) -> list[dict]:
    """The rows of another teacher: of the same network trained otherwise, its equilibrium alone."""
    none = Rivals({}, {}, {})
    if name != LONGER and name not in TEACHERS:
        rows, _, _ = measured(run, none, methods(run, none))
        return [{**row, "method": f"{row['method']} ({name})"} for row in rows]
    table, K = {"anderson": methods(run, none)["anderson"]}, run.config["K"]
    (row,) = evaluate(run, table, run.task.test, (K,))["anderson"]
    more = {"params": parameters(run, none, "anderson"), "contraction": contraction_of(run)}
    more |= dict.fromkeys(("seconds_per_batch", "peak_memory_bytes"))
    return [{"method": name, **row, **more}]


def over_seeds(parser: argparse.ArgumentParser, argv: list[str], seeds: list[int]):
    """Parses a command line of a study over seeds, with the options that all of them have."""
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=seeds)
    add("--results", type=Path, default=Path("results"), help="where to write")
    add("--flags", nargs=argparse.REMAINDER, default=[], help="more flags for train.py, last")
    args = parser.parse_args(argv)
    if len({*args.seeds}) < len(args.seeds) or min(args.seeds) < 0:
        raise UsageError(f"--seeds {' '.join(map(str, args.seeds))}: each once, and >= 0")
    return args


def main(argv: list[str]) -> None:
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--task", choices=tuple(TASKS), default="digits")
    add("--part", choices=[*STUDENTS], nargs="+", default=["main"], help="what to make")
    add("--finished", action="store_true", help="train nothing, report what is there")
    args = over_seeds(parser, argv, [0, 1, 2])
    if "RANK" in os.environ:
        if not args.finished:
            raise UsageError("under torchrun, compare trains nothing: add --finished")
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    _, task = parse(["--task", args.task, *args.flags])
    for part in dict.fromkeys(args.part):
        folders = {seed: Path(f"runs/{args.task}-seed{seed}") for seed in args.seeds}
        for seed, folder in folders.items():
            if not args.finished:
                flags = ["--task", args.task, "--seed", str(seed), *args.flags]
                train_seed(task, part, flags, folder)
        reports = [seed_report(task, part, folder) for folder in folders.values()]
        if ranks()[0] == 0:  # the one that measured times
            stem = args.results / (args.task if part == "main" else f"{args.task}-{part}")
            print(write(merge(reports), stem))
    runs.leave()


if __name__ == "__main__":
    with plain_errors():
        main(sys.argv[1:])
