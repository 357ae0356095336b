"""When a student pays: evaluations needed against how fast the teacher contracts.

    python -m evidence.contraction --task digits-graph     -> results/digits-graph-contraction.json
    python -m evidence.contraction --task digits-hard --seeds 0 1

Teachers of one network that differ in how fast they converge alone: by the bound kappa of a graph's
rate, by the weight of the Jacobian regularisation elsewhere. Of each: the error that an Anderson
step leaves, the converged metric, and the fewest evaluations from which on a method's validation
metric stays as good as that. Runs are kept in runs/contraction/ and go on where they were stopped;
a teacher whose training failed is named and left out.
"""

import argparse
import json
import sys
from pathlib import Path

import runs
from checkpoint import UsageError, atomic, plain_errors, provenance
from config import TASKS, command_line, open_task
from evidence.compare import train
from evidence.figures import COLORS, canvas_of, save
from evidence.measure import measure
from evidence.rivals import Rivals, open_rivals
from evidence.tables import table
from tasks import graphs

KAPPA = tuple(("--kappa", value) for value in ("0.5", "0.8", "0.9", "0.95", "0.99"))
JACOBIAN = tuple(("--jac_weight", value) for value in ("1", "0.3", "0.1", "0.03", "0"))
METHODS = ("picard", "anderson", "hyperdeq", "cdeq")
LONG = ("--K", "60")  # steps of the teacher's solver: slow teachers, too, arrive


def trained(task: str, seed: int, setting: tuple[str, str], more: list[str]) -> Path:
    """The folder of a teacher with its student and learned solver, trained where they are not."""
    folder = Path(f"runs/contraction/{task}-seed{seed}{setting[0]}-{setting[1]}")
    flags = ["--task", task, "--seed", str(seed), *setting, *LONG, *more]
    flags += ["--out", str(folder)]
    for stage in ("teacher", "student"):
        train("train", *flags, "--stage", stage)
    train("evidence.rivals", "hyperdeq", *flags)
    return folder


def row(folder: Path, setting: tuple[str, str], seed: int) -> dict:
    """What the study tells of one teacher. A learned solver that diverges on it has no numbers."""
    run = runs.open_run(folder)
    try:
        found = measure(run, open_rivals(run))
    except FloatingPointError:  # a learned solver may diverge where it was not trained
        found = measure(run, Rivals({}, {}, {}))
    equal = {one["method"]: one for one in found["equal"]}
    points = {(one["method"], one["nfe"]): one for one in found["rows"]}
    before = found["injection_seconds"]
    return {
        "setting": " ".join(setting),
        "seed": seed,
        "contraction": found["teacher"]["contraction"],
        "value": found["teacher"]["value"],
        "nfe": {name: equal[name]["nfe"][0] for name in METHODS if name in equal},
        "seconds": {
            name: before + equal[name]["seconds_per_batch"] for name in METHODS if name in equal
        },
        "student": {
            nfe: {key: points["cdeq", nfe][key] for key in ("value", "distance")} for nfe in (1, 2)
        },
    }


def markdown(result: dict) -> str:
    """The table of the study: a row for each teacher and seed."""
    head = ["teacher", "seed", "error left by a step", result["metric"]]
    head += [f"NFE of {name}" for name in METHODS]
    head += ["C-DEQ at 1, 2", "distance", "seconds, Anderson's / C-DEQ's"]
    rows = []
    for one in result["rows"]:
        student, ratio = one["student"].values(), ""
        if {"anderson", "cdeq"} <= one["seconds"].keys():
            ratio = f"{one['seconds']['anderson'] / one['seconds']['cdeq']:.1f}"
        rows.append(
            [
                *(one["setting"], str(one["seed"]), f"{one['contraction']:.2f}"),
                f"{one['value']:.2f}",
                *(str(one["nfe"].get(name, "never")) for name in METHODS),
                ", ".join(f"{point['value']:.2f}" for point in student),
                ", ".join(f"{point['distance']:.2f}" for point in student),
                ratio,
            ]
        )
    lines = [f"# {result['task']}: evaluations needed by contraction", ""]
    lines += [f"`{result['command']}` at commit {result['commit'][:12]}."]
    title = f"as good as the converged teacher, within {result['margin']:g}"
    return "\n".join(lines + table(title, head, rows)) + "\n"


def figure(result: dict, path: Path) -> None:
    """Evaluations needed against the error that a step leaves, a line for each method."""
    canvas, (axis,) = canvas_of(1)
    ordered = sorted(result["rows"], key=lambda one: one["contraction"])
    for name in METHODS:
        points = [one for one in ordered if name in one["nfe"]]
        error = [one["contraction"] for one in points]
        axis.plot(
            error, [one["nfe"][name] for one in points], marker="o", color=COLORS[name], label=name
        )
    axis.set(
        xlabel="error left by an Anderson step",
        ylabel="evaluations to the teacher's metric",
        yscale="log",
        title=result["task"],
    )
    axis.legend()
    save(canvas, path)


def main(argv: list[str]) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--task", choices=tuple(TASKS), default="digits-graph")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--results", type=Path, default=Path("results"), help="where to write")
    more = dict(nargs=argparse.REMAINDER, default=[], help="more flags for train.py, last")
    parser.add_argument("--flags", **more)
    args = parser.parse_args(argv)
    rows, stem = [], args.results / f"{args.task}-contraction"
    settings = KAPPA if args.task in graphs.TASKS else JACOBIAN
    for seed in args.seeds:
        for setting in settings:
            try:
                rows.append(row(trained(args.task, seed, setting, args.flags), setting, seed))
            except UsageError as error:
                print(f"{' '.join(setting)}, seed {seed}: left out, {error}", file=sys.stderr)
                continue
            task = open_task({"task": args.task})
            result = dict(
                task=args.task, metric=task.metric, margin=task.margin, rows=rows, **provenance()
            )
            write(result, stem)  # every finished row at once
    print(markdown(result))


def write(result: dict, stem: Path) -> None:
    texts = {".json": json.dumps(result, indent=1) + "\n", ".md": markdown(result)}
    for suffix, text in texts.items():
        with atomic(stem.with_suffix(suffix)) as file:
            file.write(text.encode())
    figure(result, stem.with_suffix(".png"))


if __name__ == "__main__":
    with plain_errors():
        main(sys.argv[1:])
