"""When does a student pay? The evaluations that methods need, by how fast the teacher contracts.

    python -m evidence.contraction --task digits-graph     -> results/digits-graph-contraction.json
    python -m evidence.contraction --task digits-hard --seeds 0 1

The teachers of a study are the same network and differ only in how fast they converge: by the bound
kappa of a graph network's rate, or by the weight of the Jacobian regularisation. For each one, the
study reports the error that an Anderson step leaves, the converged metric, and the fewest
evaluations from which on a method's validation metric stays as good; for networks trained directly,
the fewest for which one of them is. Runs are kept in runs/contraction/ and continue where they were
stopped; a teacher whose training failed is named and left out. Seeds may be run one after the
other, on several machines: rows of other seeds that the study's file holds, made with the same
--flags, stay in it.
"""

import dataclasses
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import runs
from checkpoint import UsageError, plain_errors, provenance
from config import TASKS, command_line, open_task
from evidence import tables
from evidence.compare import over_seeds, train
from evidence.evaluate import evaluate
from evidence.figures import COLORS, canvas_of, save
from evidence.measure import contraction_of, direct_row, equals
from evidence.methods import methods
from evidence.rivals import Rivals, open_rivals
from runs import Run
from tasks import Task, graphs

KAPPA = tuple(("--kappa", value) for value in ("0.5", "0.8", "0.95", "0.98", "0.99"))
JACOBIAN = tuple(("--jac_weight", value) for value in ("3", "1", "0.3", "0.1", "0"))
SOLVERS = ("picard", "anderson", "hyperdeq", "cdeq")
METHODS = (*SOLVERS, "direct")
DIRECTS = (1, 2, 4)  # evaluations of the networks trained directly
# Steps of the solver: enough for slow teachers, too. On a graph the teachers train with as many
# evaluations: a slow one that never went so far is wrong where it converges.
LONG = ("--K", "30")
LONG_GRAPH = ("--K", "120", "--before", "120", "--student_steps", "800")


def flags_of(task: str, seed: int, folder: Path) -> list[str]:
    """The flags that all trainings of a study share."""
    long = LONG_GRAPH if task in graphs.TASKS else LONG
    return ["--task", task, "--seed", str(seed), *long, "--out", str(folder)]


def trained_directly(task: str, seed: int, more: list[str]) -> Path:
    """The folder of the networks trained directly, which know nothing of a solver and its speed."""
    folder = Path(f"runs/contraction/{task}-seed{seed}-direct")
    for J in DIRECTS:
        train("evidence.rivals", f"direct-{J}", *flags_of(task, seed, folder), *more)
    return folder


def trained(task: str, seed: int, setting: tuple[str, str], more: list[str]) -> Path:
    """The folder of a teacher, its student and its learned solver, which are trained if missing."""
    folder = Path(f"runs/contraction/{task}-seed{seed}{setting[0]}-{setting[1]}")
    flags = [*flags_of(task, seed, folder), *setting, *more]
    for stage in ("teacher", "student"):
        train("train", *flags, "--stage", stage)
    train("evidence.rivals", "hyperdeq", *flags)
    return folder


def row(folder: Path, setting: tuple[str, str], seed: int, directly: Path) -> dict:
    """The study's numbers for one teacher, beside the networks in the folder `directly`; a learned
    solver that diverges has none."""
    run = runs.open_run(folder)
    rivals = open_rivals(dataclasses.replace(run, folder=directly))
    try:
        rivals.learned = open_rivals(run).learned
        needed, points = curves(run, rivals)
    except FloatingPointError:  # after more steps than the learned solver was trained for
        rivals.learned = {}
        needed, points = curves(run, rivals)
    return {
        "setting": " ".join(setting),
        "seed": seed,
        **provenance(),
        "device": run.device.type,
        "contraction": contraction_of(run),
        "value": points["anderson", run.config["K"]]["value"],
        "nfe": needed,
        "there": {name: points[name, nfe]["value"] for name, nfe in needed.items()},
        "student": {
            str(nfe): {key: points["cdeq", nfe][key] for key in ("value", "distance")}
            for nfe in (1, 2)
        },
    }


def curves(run: Run, rivals: Rivals) -> tuple[dict[str, int], dict[tuple, dict]]:
    """For each method that gets there, the evaluations that it needs on the validation split; and
    the measures on the test split by method and evaluations, these and 1, 2 and K."""
    task, K, valid = run.task, run.config["K"], run.task.to_choose()
    table = {name: method for name, method in methods(run, rivals).items() if name in SOLVERS}
    needed = {name: nfe for name, nfe in equals(run, table).items() if nfe}
    nfes = tuple(sorted({1, 2, K, *needed.values()}))
    found = evaluate(run, table, task.test, nfes)
    points = {(name, one["nfe"]): one for name, rows in found.items() for one in rows}
    (teacher,) = evaluate(run, {"": table["anderson"]}, valid, (K,), own_memory=False)[""]
    for J, net in rivals.direct.items():
        points["direct", J] = direct_row(run, J, net, task.test)
        if task.as_good(direct_row(run, J, net, valid)["value"], teacher["value"]):
            needed.setdefault("direct", J)
    return needed, points


def study(task: Task, rows: list[dict]) -> dict:
    """The study's tables, with a column for each setting."""
    rows = sorted(rows, key=lambda one: one["seed"])
    settings = list(dict.fromkeys(one["setting"] for one in rows))

    def by_setting(cell: Callable[[dict], object]) -> list[list]:
        return [[cell(one) for one in rows if one["setting"] == setting] for setting in settings]

    of_teacher = {
        "error left by an Anderson step": lambda one: one["contraction"],
        f"{task.metric}, converged": lambda one: one["value"],
    }
    for nfe, key in itertools.product(("1", "2"), ("value", "distance")):
        name = task.metric if key == "value" else key
        of_teacher[f"C-DEQ's {name} at NFE {nfe}"] = lambda one, n=nfe, k=key: one["student"][n][k]
    needed = {m: by_setting(lambda one, m=m: str(one["nfe"].get(m, "never"))) for m in METHODS}
    there = {m: by_setting(lambda one, m=m: tested(one, m)) for m in METHODS}
    teachers = {name: by_setting(cell) for name, cell in of_teacher.items()}
    title = f"NFE until as good as the converged teacher on validation, within {task.margin:g}"
    return dict(
        study=f"{task.name}: evaluations needed by contraction",
        seeds=sorted({one["seed"] for one in rows}),
        device=rows[0]["device"],
        parts=[
            dict(title="teachers and their students", columns=settings, digits=2, cells=teachers),
            dict(title=f"{title}, by seed", columns=settings, digits=0, cells=needed),
            dict(
                title=f"test {task.metric} at this NFE, less the teacher's, by seed",
                columns=settings,
                digits=0,
                cells=there,
            ),
        ],
        rows=rows,
    )


def tested(one: dict, method: str) -> str:
    """A method's test metric where it is as good on validation, less the teacher's."""
    value = one["there"].get(method)
    return "never" if value is None else f"{value - one['value']:+.1f}"


def figure(result: dict, path: Path) -> None:
    """Evaluations needed against the error that a step leaves, a line for each method, a PNG."""
    canvas, (axis,) = canvas_of(1, width=7)
    ordered = sorted(result["rows"], key=lambda one: one["contraction"])
    error = [one["contraction"] for one in ordered]
    most = max(nfe for one in ordered for nfe in one["nfe"].values())
    ticks = [2**i for i in range(most.bit_length() + 2)]  # the last one stands for never
    for name in METHODS:
        nfe = [one["nfe"].get(name, ticks[-1]) for one in ordered]
        axis.plot(error, nfe, marker="o", color=COLORS[name], label=name)
    axis.set(
        xlabel="error left by an Anderson step",
        ylabel="evaluations to the teacher's metric",
        title=result["study"].partition(":")[0],
    )
    axis.set_yscale("log", base=2)
    axis.set_yticks(ticks, [*map(str, ticks[:-1]), "never"])
    axis.grid(alpha=0.3)
    axis.legend()
    save(canvas, path)


def earlier(stem: Path, flags: list[str]) -> list[dict]:
    """The rows of an earlier file of this study that were made with the same flags."""
    path = stem.with_suffix(".json")
    rows = tables.read(path).get("rows", []) if path.exists() else []
    return [one for one in rows if one.get("flags", []) == flags]


def main(argv: list[str]) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--task", choices=tuple(TASKS), default="digits-graph")
    args = over_seeds(parser, argv, [0])
    stem, shown = args.results / f"{args.task}-contraction", "no teacher was trained"
    rows = [one for one in earlier(stem, args.flags) if one["seed"] not in args.seeds]
    settings = KAPPA if args.task in graphs.TASKS else JACOBIAN
    for seed in args.seeds:
        directly = trained_directly(args.task, seed, args.flags)
        for setting in settings:
            try:
                folder = trained(args.task, seed, setting, args.flags)
                rows.append(row(folder, setting, seed, directly) | {"flags": args.flags})
            except UsageError as error:
                print(f"{' '.join(setting)}, seed {seed}: left out, {error}", file=sys.stderr)
                continue
            result = study(open_task({"task": args.task}), rows) | provenance()
            shown = tables.write(result, stem, figure)  # every finished row at once
    print(shown)


if __name__ == "__main__":
    with plain_errors():
        main(sys.argv[1:])
