"""Reports as people read them: Markdown tables and figures of what compare.py measured.

A report is a dict, the contents of report.json and of results/*.json; nothing is computed here, and
what was not measured stays empty.
"""

import json
from pathlib import Path

from checkpoint import atomic

LAM1, LAM2 = ("0", "0.2", "0.4", "0.6", "0.8", "1"), ("0", "0.05")
TITLES = {
    "value": "{metric}, {split} split",
    "distance": "distance to the equilibrium, |z - z*| / |z*|",
    "residual": "relative residual, |f(z) - z| / |z|",
    "seconds_per_batch": "seconds per batch of {batch}, {device}",
}


def markdown(result: dict, keys: tuple[str, ...] = tuple(TITLES)) -> str:
    """The report as tables: a row per method, a column per NFE."""
    implicit = [row for row in result["rows"] if row["nfe"]]
    explicit = [row for row in result["rows"] if not row["nfe"]]
    nfes = sorted({row["nfe"] for row in implicit})
    cells = {(row["method"], row["nfe"]): row for row in implicit}
    teacher = result["teacher"]
    seeds = ", ".join(map(str, result["seeds"]))

    def few(row: dict) -> str:
        n, all_ = row["n"], len(result["seeds"])
        return f" ({n} of {all_} seeds)" if 0 < n < all_ else ""

    lines = [
        f"# {result.get('note') or result['task']} by NFE",
        "",
        f"Teacher, converged (Anderson, NFE {teacher['nfe']}): {teacher['value']:.2f}"
        f"{spread(teacher)}, relative residual {teacher['residual']:.1e}. Seeds {seeds}.",
        f"`{result['command']}` at commit {result['commit'][:12]}.",
    ]
    for key in keys:
        lines += [
            "",
            f"## {TITLES[key].format(**result)}",
            "",
            "| method | " + " | ".join(map(str, nfes)) + " |",
        ]
        lines.append("|---" * (len(nfes) + 1) + "|")
        for method in dict.fromkeys(row["method"] for row in implicit):
            row = [number(cells[method, nfe], key) for nfe in nfes]
            lines.append(f"| {method}{few(cells[method, nfes[0]])} | " + " | ".join(row) + " |")
    lines += ["", "## parameters and peak memory from input to logits (bytes) by NFE", ""]
    lines += [
        f"| method | parameters | {' | '.join(map(str, nfes))} |",
        "|---" * (len(nfes) + 2) + "|",
    ]
    for method in dict.fromkeys(row["method"] for row in implicit):
        row = [number(cells[method, nfe], "peak_memory_bytes") for nfe in nfes]
        params = number(cells[method, nfes[0]], "params")
        lines.append(f"| {method} | {params} | {' | '.join(row)} |")
    lines += equal_lines(result) + memory_lines(result, nfes)
    columns = ("value", "valid", "params", "seconds_per_batch", "peak_memory_bytes")
    if not any("valid" in row for row in explicit):  # tables made before it was measured
        columns = tuple(column for column in columns if column != "valid")
    if explicit:
        lines += ["", "## networks of finite depth", "", f"| network | {' | '.join(columns)} |"]
        lines.append("|---" * (len(columns) + 1) + "|")
        for row in explicit:
            line = (number(row, key) for key in columns)
            lines.append(f"| {row['method']}{few(row)} | {' | '.join(line)} |")
    return "\n".join(lines) + "\n"


def memory_lines(result: dict, nfes: list[int]) -> list[str]:
    """The metric by whose states the segment before is seen by, where there is one."""
    rows = {(r["method"], r["memory"], r["nfe"]): r for r in result.get("memory") or []}
    if not rows:
        return []
    rows |= {
        (r["method"], "own", r["nfe"]): r
        for r in result["rows"]
        if r["method"] in {method for method, _, _ in rows}
    }
    lines = ["", f"## {result['metric']} by the memory of the segment before", ""]
    lines += [f"| method | memory | {' | '.join(map(str, nfes))} |", "|---" * (len(nfes) + 2) + "|"]
    for method in dict.fromkeys(method for method, _, _ in rows):
        for kind in ("own", "teacher", "none"):
            cells = " | ".join(number(rows[method, kind, nfe], "value") for nfe in nfes)
            lines.append(f"| {method} | {kind} | {cells} |")
    return lines


def equal_lines(result: dict) -> list[str]:
    """The table of evaluations and seconds to the converged teacher's metric, less the margin."""
    margin, before = f"less {result['margin']:g}", result["injection_seconds"]
    if not result["higher_is_better"]:
        margin = f"within {result['margin']:.0%}"
    whole = {row["method"]: before + row["seconds_per_batch"] for row in result["equal"]}
    lines = [
        "",
        f"## as good as the converged teacher, {margin} (chosen on validation)",
        "",
        f"Times are from the injected input to the logits; the injection takes {before:.4f} s.",
        "",
        f"| method | NFE by seed | {result['metric']} | seconds | / Anderson's | with injection |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["equal"]:
        name, nfes = row["method"], ", ".join(map(str, row["nfe"]))
        cells = [name, nfes, number(row, "value"), number(row, "seconds_per_batch"), "", ""]
        if "anderson" in whole:
            part = row["seconds_per_batch"] / (whole["anderson"] - before)
            cells[4:] = f"{part:.3f}", f"{whole[name] / whole['anderson']:.3f}"
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def number(row: dict, key: str) -> str:
    """One cell of a table; empty where nothing was measured."""
    if row.get(key) is None:
        return ""
    if key == "value":
        return f"{row['value']:.2f}{spread(row)}"
    if key == "valid":
        return f"{row['valid']:.2f}"
    return f"{row[key]:,.0f}" if key in ("params", "peak_memory_bytes") else f"{row[key]:.4f}"


def spread(row: dict) -> str:
    return f" ± {row['std']:.2f}" if row.get("std") is not None else ""


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
            axis.plot([r["nfe"] for r in rows], [r[key] for r in rows], label=method, **style)
        pareto.plot([r["seconds_per_batch"] for r in rows], [r["value"] for r in rows], **style)
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


def write(result: dict, stem: Path, text: str = "", **options) -> str:
    """STEM.json, STEM.md and STEM.png; returns the Markdown. text: further tables for its end."""
    text = markdown(result, **options) + text
    for suffix, contents in ((".json", json.dumps(result, indent=1) + "\n"), (".md", text)):
        with atomic(stem.with_suffix(suffix)) as file:
            file.write(contents.encode())
    figure(result, stem.with_suffix(".png"))
    return text


def grid_lines(result: dict) -> str:
    """Table 4: the metric at the most evaluations, lam2 down, lam1 across."""
    most = max(row["nfe"] for row in result["rows"] if row["nfe"])
    rows = {row["method"]: row for row in result["rows"] if row["nfe"] == most}
    lines = ["", f"## {result['metric']} at NFE {most} by loss weights", ""]
    lines += [f"| lam2 \\ lam1 | {' | '.join(LAM1)} |", "|---" * (len(LAM1) + 1) + "|"]
    for lam2 in LAM2:
        cells = (number(rows[f"cdeq-lam1-{lam1}-lam2-{lam2}"], "value") for lam1 in LAM1)
        lines.append(f"| {lam2} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
