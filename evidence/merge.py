"""Merges the reports of several seeds: means, spreads, and intervals of differences."""

import statistics

from checkpoint import provenance
from evidence.intervals import difference


def merge(reports: list[dict]) -> dict:
    """One report over seeds: means of all numbers, std (n - 1) and n of the metric and, in place of
    its items, intervals of its differences to the teacher and to the direct network of as many
    evaluations; of a teacher, to every direct network."""
    result = dict(reports[0], seeds=[seed for r in reports for seed in r["seeds"]], **provenance())
    result["runs"] = [{"command": r["command"], "commit": r["commit"]} for r in reports]
    for one in reports:
        for row in (one["teacher"], *one["rows"]):
            row["seed"] = one["seeds"][0]
    teachers = [r["teacher"] for r in reports]
    result["teacher"] = mean(teachers)
    groups = {(rows[0]["method"], rows[0]["nfe"]): rows for rows in grouped(
        reports, "rows", ("method", "nfe"))}  # fmt: skip
    directs = {nfe: rows for (method, nfe), rows in groups.items() if method == "direct"}

    def less(rows: list[dict], other: list[dict]) -> tuple[float, float, float]:
        sides = ({r["seed"]: r["items"] for r in side} for side in (rows, other))
        return difference(*sides, perplexity=result["metric"] == "perplexity")

    def less_directs(rows: list[dict]) -> dict[str, tuple]:
        return {str(J): less(rows, other) for J, other in directs.items()}

    result["teacher"]["vs_directs"] = less_directs(teachers)
    result["rows"] = [mean(rows) for rows in groups.values()]
    for row, rows in zip(result["rows"], groups.values(), strict=True):
        others = {"vs_teacher": teachers, "vs_direct": directs.get(row["nfe"])}
        for name, other in others.items():
            if other and other is not rows and row["value"] is not None:
                row[name] = less(rows, other)
        if "contraction" in row:  # another teacher
            row["vs_directs"] = less_directs(rows)
    result["injection_seconds"] = statistics.fmean(r["injection_seconds"] for r in reports)
    result["equal"] = [  # only methods that are as good with every seed
        {**mean(rows), "nfe": [nfe for row in rows for nfe in row["nfe"]]}
        for rows in grouped(reports, "equal", ("method",))
        if len(rows) == len(reports)
    ]
    result["decay"] = {
        name: [base for r in reports for base in r["decay"].get(name, [])]
        for name in {name: None for r in reports for name in r["decay"]}
    }
    return result


def mean(rows: list[dict]) -> dict:
    """The means of rows of several seeds, and the metric's spread over them."""
    metrics = ("value", "valid", "top5", "nll", "residual", "distance", "contraction")
    numbers = (*metrics, "seconds_per_batch", "peak_memory_bytes")
    known = [key for key in numbers if rows[0].get(key) is not None]
    means = {key: statistics.fmean(r[key] for r in rows) for key in known}
    values = [r["value"] for r in rows if r["value"] is not None]
    spread = statistics.stdev(values) if len(values) > 1 else None
    kept = {key: value for key, value in rows[0].items() if key not in ("items", "seed")}
    return {**kept, **means, "std": spread, "n": len(values)}


def grouped(reports: list[dict], part: str, keys: tuple[str, ...]) -> list[list[dict]]:
    """The rows of one part of all reports, grouped by these keys."""
    groups: dict[tuple, list[dict]] = {}
    for row in (row for one in reports for row in one[part]):
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(groups.values())
