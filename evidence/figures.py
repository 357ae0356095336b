"""Figures of reports and studies. Each method has the same color in all of them."""

import statistics
from pathlib import Path

from checkpoint import atomic

HUGE = 1e9  # the relative residual of a state that is 0
METHODS = ("picard", "anderson", "hyperdeq", "cdeq", "cdeq-paper", "direct", "cdeq+anderson")
COLORS = {name: f"C{i}" for i, name in enumerate(METHODS)}


def canvas_of(n: int, width: float = 5):
    """A figure of n axes in a row, each so many inches wide, and the list of them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    options = dict(figsize=(width * n, 4), layout="constrained", squeeze=False)
    canvas, axes = pyplot.subplots(1, n, **options)
    return canvas, [*axes[0]]


def save(canvas, path: Path) -> None:
    """Writes the figure as a PNG and closes it."""
    from matplotlib import pyplot

    with atomic(path) as file:
        canvas.savefig(file, format="png", dpi=120)
    pyplot.close(canvas)


def figure(result: dict, path: Path) -> None:
    """Metric and relative residual (Fig. 2's axes) against NFE, and metric against time, a PNG."""
    canvas, (left, right, pareto) = canvas_of(3)
    implicit = [row for row in result["rows"] if row["nfe"]]
    for method in dict.fromkeys(row["method"] for row in implicit):
        rows = [row for row in implicit if row["method"] == method]
        style = dict(marker="o", markersize=4, linestyle="-" if method == "cdeq" else "--")
        style |= {"color": COLORS[method]} if method in COLORS else {}
        for axis, key in ((left, "value"), (right, "residual")):
            shown = [r for r in rows if r.get(key, HUGE) < HUGE]
            axis.plot([r["nfe"] for r in shown], [r[key] for r in shown], label=method, **style)
        timed = [r for r in rows if r["seconds_per_batch"]]
        pareto.plot([r["seconds_per_batch"] for r in timed], [r["value"] for r in timed], **style)
    converged = result["teacher"]["value"]
    left.axhline(converged, color="gray", linewidth=1, label="teacher, converged")
    left.set(ylabel=f"{result['split']} {result['metric']}")
    right.set(ylabel="relative residual |f(z) - z| / |z|", yscale="log")
    pareto.set(xlabel=f"seconds per batch of {result['batch']}", xscale="log")
    pareto.grid(alpha=0.3)
    for axis in (left, right):
        ticks = sorted({row["nfe"] for row in implicit})
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, map(str, ticks))
        axis.set(xlabel="evaluations of f (NFE)")
        axis.grid(alpha=0.3)
    for row in result["rows"]:
        if not row["nfe"] and row["value"] is not None:
            left.axhline(row["value"], linewidth=1, linestyle=":", label=row["method"])
    left.legend()
    canvas.suptitle(f"{result.get('note') or result['task']}, seeds {result['seeds']}")
    save(canvas, path)


def by_column(part: dict, shown: dict[str, tuple[str, str]], xlabel: str, path: Path) -> None:
    """Test accuracy by the columns of a study's table, a PNG. shown: the rows that have a line, by
    name, each with a label and a style."""
    canvas, (axis,) = canvas_of(1, width=8)
    for name, (label, style) in shown.items():
        means = [statistics.fmean(values) for values in part["cells"][name]]
        axis.plot(part["columns"], means, style, label=label, markersize=5)
    axis.set(xlabel=xlabel, ylabel="test accuracy, %")
    axis.grid(alpha=0.3)
    canvas.legend(loc="outside right upper", fontsize=9)
    save(canvas, path)


def scaling_figure(rows: list[dict], path: Path) -> None:
    """Seconds of one evaluation of a graph network by the graph's edges, a PNG."""
    canvas, (axis,) = canvas_of(1)
    edges, seconds = zip(*((row["edges"], row["seconds"]["f"]) for row in rows), strict=True)
    axis.loglog(edges, seconds, marker="o", label="one evaluation")
    linear = [seconds[-1] / edges[-1] * E for E in edges]
    axis.loglog(edges, linear, linestyle=":", color="gray", label="linear")
    axis.set(xlabel="edges (both directions, self-loops)", ylabel="seconds", title="IGNN, f")
    axis.legend()
    save(canvas, path)
