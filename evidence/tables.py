"""Turns reports into Markdown tables.

A report is a dict, the contents of a report.json or of a file in results/. Nothing is computed
here, and what was not measured stays empty.
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path

from checkpoint import UsageError, atomic
from evidence.figures import HUGE, figure

LAM1, LAM2 = ("0", "0.2", "0.4", "0.6", "0.8", "1"), ("0", "0.05")
TITLES = {
    "value": "{metric}, {split} split",
    "distance": "distance to the equilibrium, |z - z*| / |z*|",
    "residual": "relative residual, |f(z) - z| / |z|",
    "seconds_per_batch": "seconds per batch of {batch}, {device}",
}


def markdown(result: dict) -> str:
    """A report as tables, with a row per method and a column per NFE; a study has its own."""
    if "study" in result:
        return study(result)
    teacher, seeds = result["teacher"], ", ".join(map(str, result["seeds"]))
    implicit = [row for row in result["rows"] if row["nfe"]]
    nfes = sorted({row["nfe"] for row in implicit})
    cells = {(row["method"], row["nfe"]): row for row in implicit}
    names = dict.fromkeys(row["method"] for row in implicit)
    remarks = {row["method"]: seeds_note(row, result) for row in implicit}
    lines = [
        f"# {result.get('note') or result['task']} by NFE",
        "",
        f"Teacher, converged (Anderson, NFE {teacher['nfe']}): {teacher['value']:.2f}"
        f"{spread(teacher)}, relative residual {teacher['residual']:.1e}. Seeds {seeds}.",
        f"`{result['command']}` at commit {result['commit'][:12]}.",
    ]

    def of(key: str) -> list[list[str]]:
        return [[number(cells.get((name, nfe), {}), key) for nfe in nfes] for name in names]

    for key, title in TITLES.items():
        rows = [[f"{name}{remarks[name]}", *row] for name, row in zip(names, of(key), strict=True)]
        rows = [row for row in rows if any(row[1:])]
        lines += table(title.format(**result), ["method", *map(str, nfes)], rows)
        if key == "value":
            lines += difference_lines(result, nfes)
    params = (number(next(r for r in implicit if r["method"] == name), "params") for name in names)
    rows = [[*two, *row] for *two, row in zip(names, params, of("peak_memory_bytes"), strict=True)]
    title = "parameters and peak memory of an answer (bytes) by NFE"
    lines += table(title, ["method", "parameters", *map(str, nfes)], rows)
    lines += teacher_lines(result) + equal_lines(result)
    return "\n".join(lines + explicit_lines(result) + grid_lines(result)) + "\n"


def study(result: dict) -> str:
    """The tables of a study: a row per method, a column per setting, a cell for all seeds."""
    seeds = ", ".join(map(str, result["seeds"]))
    lines = [f"# {result['study']}", "", f"Seeds {seeds}; {result['device']}."]
    lines.append(f"`{result['command']}` at commit {result['commit'][:12]}.")

    def cell(values: list, digits: int) -> str:
        if not values or isinstance(values[0], str):  # numbers of evaluations, or "never"
            return ", ".join(values)
        std = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.{digits}f}{std}"

    for part in result["parts"]:
        digits = part["digits"]
        rows = [[name, *(cell(values, digits) for values in part["cells"][name])]
                for name in part["cells"]]  # fmt: skip
        lines += table(part["title"], ["method", *part["columns"]], rows)
    return "\n".join(lines) + "\n"


def table(title: str, head: list[str], rows: list[list[str]], note: str = "") -> list[str]:
    """The lines of a Markdown table under its title."""
    return [
        *("", f"## {title}", "", *([note, ""] if note else [])),
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def difference_lines(result: dict, nfes: list[int]) -> list[str]:
    """The tables of differences to the teacher and to the direct networks."""
    lines = []
    others = {"vs_teacher": "converged teacher", "vs_direct": "direct network of J = NFE"}
    for key, title in others.items():
        rows = [row for row in result["rows"] if row.get(key)]
        names = dict.fromkeys(row["method"] for row in rows if row["nfe"])
        cells = {(row["method"], row["nfe"]): verdict(row[key], result) for row in rows}
        shown = [nfe for nfe in nfes if any((name, nfe) in cells for name in names)]
        body = [[name, *(cells.get((name, nfe), "") for nfe in shown)] for name in names]
        if body:
            lines += table(
                f"{result['metric']} less that of the {title}, 95 % interval",
                ["method", *map(str, shown)], body,
            )  # fmt: skip
    return lines


def teacher_lines(result: dict) -> list[str]:
    """The table of teachers with the same network and another training."""
    if not (others := [row for row in result["rows"] if "contraction" in row]):
        return []
    first, lines = {"method": "teacher", **result["teacher"]}, []
    directs = list(first.get("vs_directs", ()))  # not in tables made before it was measured
    for row in (first, *others):
        less = [row.get("vs_teacher"), *(row["vs_directs"][J] for J in directs)]
        cells = [verdict(interval, result) if interval else "" for interval in less]
        lines.append([row["method"], number(row, "value"), *cells, f"{row['contraction']:.2f}"])
    less = ["less the first one's", *(f"less direct-{J}'s" for J in directs)]
    head = ["teacher", result["metric"], *less, "error factor per step"]
    return table("teachers, converged, by their training", head, lines)


def verdict(interval: list[float], result: dict) -> str:
    """A difference, its interval, and a word for whether the interval excludes 0."""
    value, low, high = (round(v, 9) + 0.0 for v in interval)  # an end may be 0 but for rounding
    word = "no difference"
    if low > 0 or high < 0:
        word = "ahead" if (low > 0) == result["higher_is_better"] else "behind"
    return f"{value:+.2f} ({low:+.2f} .. {high:+.2f}) {word}"


def seeds_note(row: dict, result: dict) -> str:
    """A remark on a row that only some of the seeds have."""
    n, all_ = row["n"], len(result["seeds"])
    return f" ({n} of {all_} seeds)" if 0 < n < all_ else ""


def explicit_lines(result: dict) -> list[str]:
    """The table of the networks of finite depth, if there are any."""
    explicit = [row for row in result["rows"] if not row["nfe"]]
    columns = ["value", "params", "seconds_per_batch", "peak_memory_bytes"]
    if any("valid" in row for row in explicit):  # not in tables made before it was measured
        columns.insert(1, "valid")
    rows = []
    for row in explicit:
        remark = verdict(row["vs_teacher"], result) if row.get("vs_teacher") else ""
        cells = (number(row, key) for key in columns)
        rows.append([f"{row['method']}{seeds_note(row, result)}", *cells, remark])
    head = ["network", *columns, "less the teacher's"]
    return table("networks of finite depth", head, rows) if rows else []


def equal_lines(result: dict) -> list[str]:
    """The table of evaluations and seconds that methods need to be as good as the teacher."""
    if "equal" not in result:
        return []  # tables made before it was measured
    margin, before = f"less {result['margin']:g}", result["injection_seconds"]
    if not result["higher_is_better"]:
        margin = f"within {result['margin']:.0%}"
    whole = {row["method"]: before + row["seconds_per_batch"] for row in result["equal"]}
    rows = []
    for row in result["equal"]:
        name, nfes = row["method"], ", ".join(map(str, row["nfe"]))
        cells = [name, nfes, number(row, "value"), number(row, "seconds_per_batch"), "", ""]
        if "anderson" in whole:
            part = row["seconds_per_batch"] / (whole["anderson"] - before)
            cells[4:] = f"{part:.3f}", f"{whole[name] / whole['anderson']:.3f}"
        rows.append(cells)
    title = f"as good as the converged teacher, {margin} (chosen on validation)"
    head = ["method", "NFE by seed", result["metric"], "seconds", "/ Anderson's", "with injection"]
    note = f"Times are from the injected input to the logits; the injection takes {before:.4f} s."
    return table(title, head, rows, note)


def number(row: dict, key: str) -> str:
    """One cell of a table; empty where nothing was measured."""
    if row.get(key) is None:
        return ""
    if key == "value":
        return f"{row['value']:.2f}{spread(row)}"
    if key == "residual" and row[key] > HUGE:
        return "∞"
    if key == "valid":
        return f"{row['valid']:.2f}"
    return f"{row[key]:,.0f}" if key in ("params", "peak_memory_bytes") else f"{row[key]:.4f}"


def spread(row: dict) -> str:
    return f" ± {row['std']:.2f}" if row.get("std") is not None else ""


def grid_lines(result: dict) -> list[str]:
    """Table 4, if its students are there: the metric at the largest NFE by lam2 and lam1."""
    most = max(row["nfe"] for row in result["rows"] if row["nfe"])
    cells = {row["method"]: row for row in result["rows"] if row["nfe"] == most}
    rows = [
        [lam2, *(number(cells.get(f"cdeq-lam1-{lam1}-lam2-{lam2}", {}), "value") for lam1 in LAM1)]
        for lam2 in LAM2
    ]
    if not any(cell for _, *row in rows for cell in row):
        return []
    return table(f"{result['metric']} at NFE {most} by loss weights", ["lam2 \\ lam1", *LAM1], rows)


def write(result: dict, stem: Path, draw: Callable[[dict, Path], None] = figure) -> str:
    """Writes STEM.json, STEM.md and, by `draw`, STEM.png; returns the Markdown."""
    text = markdown(result)
    for suffix, contents in ((".json", json.dumps(result, indent=1) + "\n"), (".md", text)):
        with atomic(stem.with_suffix(suffix)) as file:
            file.write(contents.encode())
    draw(result, stem.with_suffix(".png"))
    return text


def read(path: Path) -> dict:
    """A file of results/; UsageError if it is no report."""
    try:
        result = json.loads(path.read_text())
    except ValueError as error:
        raise UsageError(f"{path} is no JSON ({error}); make it anew or delete it") from error
    if not isinstance(result, dict):
        raise UsageError(f"{path} holds a {type(result).__name__}, not a report; delete it")
    return result
