"""Accuracy by the depth of an answer, on the permutations of tasks/permutations.py.

    python -m evidence.compare --task permutations --seeds 0 1 2     trains, then
    python -m evidence.depth --seeds 0 1 2         -> results/permutations-depth.json, .md, .png

Reads the runs that evidence/compare.py has made.
"""

import statistics
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import runs
from anderson import anderson
from checkpoint import plain_errors, provenance
from config import command_line
from evidence import tables
from evidence.figures import COLORS, canvas_of, save
from evidence.methods import methods, picard_of, solved_by
from evidence.rivals import open_rivals
from infer import Method
from tasks import permutations

DEPTHS = ((0, 1), (2, 3), (4, 7), (8, 15), (16, 31))  # first and last of each column
NFES = {"picard": (1, 2, 4, 8, 16, 32), "cdeq": (1, 2, 4, 8)}
WINDOW = 6  # of Anderson acceleration; the task's own solver has a window of one state


def measure(folder: Path) -> dict[str, list[float]]:
    """Test accuracy of each method of a run, by the columns of DEPTHS."""
    run = runs.open_run(folder)
    rivals, net = open_rivals(run), run.teacher
    table = methods(run, rivals)
    windowed = partial(anderson, sample_dims=net.sample_dims, m=WINDOW)
    wanted = {f"direct, {J}": (solved_by(f, picard_of(f)), J) for J, f in rivals.direct.items()}
    wanted |= {f"{name}, {nfe}": (table[name], nfe) for name, nfes in NFES.items() for nfe in nfes}
    wanted |= {f"anderson, {nfe}": (solved_by(net, windowed), nfe) for nfe in NFES["picard"][-2:]}
    _, _, depth = permutations.text(permutations.SAMPLES[2], seed=2)
    x, y = (v.to(run.device) for v in run.task.test.batch(torch.arange(len(run.task.test))))
    found = {}
    for name, (method, nfe) in wanted.items():
        right = 100.0 * (predictions(method, x, nfe) == y).cpu()
        found[name] = [right[(depth >= a) & (depth <= b)].mean().item() for a, b in DEPTHS]
    return found


@torch.no_grad()
def predictions(method: Method, x: Tensor, nfe: int) -> Tensor:
    """The likeliest class at each position after nfe evaluations: (B, L)."""
    u = method.inject(x)
    z = method.solve(method.initial(u), u, nfe, last=True)
    return method.net.head(z).argmax(-1)


def figure(result: dict, path: Path) -> None:
    """Accuracy against depth, a line for each method: a PNG."""
    canvas, (axis,) = canvas_of(1)
    (part,) = result["parts"]
    for name, cells in part["cells"].items():
        method, _, nfe = name.partition(", ")
        if nfe in ("1", "4", "32"):
            style = {"1": ":", "4": "--", "32": "-"}[nfe]
            means = [statistics.fmean(values) for values in cells]
            axis.plot(part["columns"], means, style, marker="o", color=COLORS[method], label=name)
    axis.set(xlabel="depth: words since the last reset", ylabel="test accuracy, %")
    axis.set_title("permutations: method, evaluations")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save(canvas, path)


def main(argv: list[str]) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=Path("results"), help="where to write")
    args = parser.parse_args(argv)
    found = [measure(Path(f"runs/permutations-seed{seed}")) for seed in args.seeds]
    cells = {
        name: [[one[name][i] for one in found] for i in range(len(DEPTHS))] for name in found[0]
    }
    title = "test accuracy, %, by method and evaluations and by depth"
    result = {"study": "Permutations: accuracy by depth", "seeds": args.seeds, **provenance()}
    result |= {"device": "cpu" if not torch.cuda.is_available() else "cuda"}
    columns = [f"{first} - {last}" for first, last in DEPTHS]
    result["parts"] = [{"title": title, "columns": columns, "digits": 1, "cells": cells}]
    print(tables.write(result, args.results / "permutations-depth", figure))


if __name__ == "__main__":
    with plain_errors():
        main(sys.argv[1:])
