"""Figures of reports."""

from pathlib import Path

from checkpoint import atomic

HUGE = 1e9  # the relative residual of a state that is 0


def figure(result: dict, path: Path) -> None:
    """Metric and relative residual (Fig. 2's axes) against NFE, and metric against time, a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    canvas, axes = pyplot.subplots(1, 3, figsize=(15, 4), layout="constrained")
    left, right, pareto = axes
    implicit = [row for row in result["rows"] if row["nfe"]]
    for method in dict.fromkeys(row["method"] for row in implicit):
        rows = [row for row in implicit if row["method"] == method]
        style = dict(marker="o", markersize=4, linestyle="-" if method == "cdeq" else "--")
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
    with atomic(path) as file:
        canvas.savefig(file, format="png", dpi=120)
    pyplot.close(canvas)
