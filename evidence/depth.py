"""Accuracy by the depth of an answer, on the permutations of tasks/permutations.py.

    python -m evidence.compare --task permutations --seeds 0     trains the methods, then
    python -m evidence.depth --seeds 0             -> results/permutations-depth.json, .md, .png

The second command also trains a student with a far start, for the same teacher.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import runs
from anderson import anderson
from checkpoint import plain_errors, provenance
from config import command_line
from evidence import compare, tables
from evidence.chains import beside, seconds, table, train_beside
from evidence.figures import by_column
from evidence.methods import picard_of, solved_by
from evidence.rivals import open_rivals
from infer import Method
from tasks import permutations

FAR = "transformer-window-far"
DEPTHS = ((0, 1), (2, 3), (4, 7), (8, 15), (16, 31))  # first and last of each column
SOLVER, STUDENT = (1, 2, 4, 8, 16, 32), (1, 2, 4, 8)  # evaluations
WINDOW = 6  # of Anderson acceleration; the task's own solver has a window of one state
# The lines of the figure: rows of the table, each with a label and a style.
SHOWN = {
    "picard, 4": ("Picard, 4 NFE", "C0:o"),
    "picard, 32": ("Picard, 32 NFE", "C0-o"),
    "anderson, 32": ("Anderson, 32 NFE", "C1--s"),
    "direct, 1": ("trained directly, 1 NFE", "C5:d"),
    "direct, 4": ("trained directly, 4 NFE", "C5--d"),
    "cdeq, 1": ("C-DEQ, 1 NFE", "C3:v"),
    "cdeq, 4": ("C-DEQ, 4 NFE", "C3--v"),
    f"cdeq {FAR}, 1": ("C-DEQ, far start, 1 NFE", "C3-v"),
}


def measure(folder: Path) -> dict[str, list[float]]:
    """Test accuracy of each method of a run, by the columns of DEPTHS."""
    run, far = runs.open_run(folder), beside(folder, FAR)
    net, own = run.teacher, table(run)
    windowed = solved_by(net, partial(anderson, sample_dims=net.sample_dims, m=WINDOW))
    direct = open_rivals(run).direct
    wanted = {f"picard, {nfe}": (own["picard"], nfe) for nfe in SOLVER}
    wanted |= {f"anderson, {nfe}": (windowed, nfe) for nfe in SOLVER}
    wanted |= {f"direct, {J}": (solved_by(f, picard_of(f)), J) for J, f in direct.items()}
    for name, method in (("cdeq", own["cdeq"]), (f"cdeq {FAR}", table(far)["cdeq"])):
        wanted |= {f"{name}, {nfe}": (method, nfe) for nfe in STUDENT}
    _, _, depth = permutations.text(permutations.SAMPLES[2], seed=2)
    x, y = (v.to(run.device) for v in run.task.test.batch(torch.arange(len(depth))))
    found = {}
    for name, (method, nfe) in wanted.items():
        right = 100.0 * (predictions(method, x, nfe) == y).cpu()
        found[name] = [right[(depth >= a) & (depth <= b)].mean().item() for a, b in DEPTHS]
    return found


@torch.no_grad()
def predictions(method: Method, x: Tensor, nfe: int) -> Tensor:
    """The likeliest class at each position after nfe evaluations, which are counted: (B, L)."""
    u, before = method.inject(x), method.counter.nfe
    z = method.solve(method.initial(u), u, nfe, last=True)
    if (made := method.counter.nfe - before) != nfe:
        raise AssertionError(f"{made} evaluations were made, {nfe} declared")
    return method.net.head(z).argmax(-1)


def figure(result: dict, path: Path) -> None:
    """Test accuracy by depth, a line for each method: a PNG."""
    by_column(result["parts"][0], SHOWN, "depth: words since the last reset", path)


def main(argv: list[str]) -> None:
    args = compare.over_seeds(command_line(__doc__), argv, [0])
    folders = [Path(f"runs/permutations-seed{seed}") for seed in args.seeds]
    for seed, folder in zip(args.seeds, folders, strict=True):
        train_beside(folder, FAR, ["--task", "permutations", "--seed", str(seed), *args.flags])
    right = [measure(folder) for folder in folders]
    spent = [seconds(runs.open_run(f), beside(f, FAR), SOLVER[-1], "32") for f in folders]
    columns = [f"{first} - {last}" for first, last in DEPTHS]
    by_depth = {
        name: [[one[name][i] for one in right] for i in range(len(DEPTHS))] for name in right[0]
    }
    by_method = {name: [[one[name] for one in spent]] for name in spent[0]}
    result = {
        "study": "Permutations: accuracy by depth",
        "seeds": args.seeds,
        **provenance(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "parts": [
            dict(title="test accuracy, %, by method and evaluations and by depth",
                 columns=columns, digits=1, cells=by_depth),
            dict(title="seconds from the injected input to the state, 128 sequences",
                 columns=["seconds"], digits=5, cells=by_method),
        ],
    }  # fmt: skip
    print(tables.write(result, args.results / "permutations-depth", figure))


if __name__ == "__main__":
    with plain_errors():
        main(sys.argv[1:])
