"""Puts the tables of results/ into README.md and RESULTS.md.

    python -m evidence.pages    remakes results/*.md from the JSON files there, then both pages

A page marks the place of a table by a comment, `<!-- NAME.md: PART -->`, up to `<!-- end -->`. PART
is a word or two of the table's title, or `value`, the metric by NFE. `, rows A B` after it leaves
only the rows of these methods. `<!-- summary -->` is the table of all tasks.
"""

import re
import sys
from pathlib import Path

from checkpoint import UsageError, plain_errors
from config import command_line
from evidence.tables import markdown, read, table

ROOT = Path(__file__).parents[1]
SUMMARY = {"anderson": "Anderson", "hyperdeq": "HyperDEQ", "direct": "direct", "cdeq": "C-DEQ"}


def excerpt(text: str, part: str) -> list[str]:
    """The lines of one table of a report, under its title; a line on the teacher precedes that of
    the metric."""
    part, _, names = part.partition(", rows ")
    opening, *sections = text.split("\n## ")
    titles = [section.splitlines()[0] for section in sections]
    places = [0] if part == "value" else [i for i, title in enumerate(titles) if part in title]
    if not places:
        raise UsageError(f"a report has no table {part!r}; its tables are {' | '.join(titles)}")
    lines = sections[places[0]].splitlines()
    head, rule, *rows = (line for line in lines if line.startswith("|"))
    if names:
        rows = [chosen(rows, name, part) for name in names.split()]
    teacher = [" ".join(line for line in opening.splitlines()[1:] if line), ""]
    return [*(teacher if part == "value" else []), f"*{lines[0]}*", "", head, rule, *rows]


def chosen(rows: list[str], name: str, part: str) -> str:
    """The row of one method; UsageError if the table has none."""
    for row in rows:
        if row.startswith(f"| {name} |"):
            return row
    raise UsageError(f"the table {part!r} of a report has no row {name!r}")


def summary(results: Path) -> list[str]:
    """The lines of a table of all tasks: the teacher, and each method at NFE 1, 2 and 4. Reports
    without direct networks are of earlier teachers, and left out."""
    head = ["task", "metric", "teacher", *(f"{name} 1 / 2 / 4" for name in SUMMARY.values())]
    rows = []
    for path in sorted(results.glob("*.json")):
        result = read(path)
        if path.stem != result.get("task"):
            continue
        cells = {(r["method"], r["nfe"]): f"{r['value']:.1f}" for r in result["rows"] if r["nfe"]}
        shown = [[cells.get((name, nfe), "-") for nfe in (1, 2, 4)] for name in SUMMARY]
        if ("direct", 1) in cells:
            n, value = len(result["seeds"]), f"{result['teacher']['value']:.1f}"
            name = f"{result.get('note') or result['task']}, {n} seed{'s' * (n > 1)}"
            rows.append([name, result["metric"], value, *map(" / ".join, shown)])
    return table("", head, rows)[3:]


def filled(page: str, results: Path) -> str:
    """A page whose marked tables are those of results/."""

    def fill(match: re.Match) -> str:
        if not (results / match[1]).exists():
            raise UsageError(f"a page asks for {match[1]}, which is not in {results.name}/")
        text = (results / match[1]).read_text()
        return "\n".join(
            [f"<!-- {match[1]}: {match[2]} -->", *excerpt(text, match[2]), "<!-- end -->"]
        )

    page = re.sub(r"<!-- (\S+\.md): (.+?) -->\n.*?<!-- end -->", fill, page, flags=re.DOTALL)
    whole = "\n".join(["<!-- summary -->", *summary(results), "<!-- end -->"])
    return re.sub(r"<!-- summary -->\n.*?<!-- end -->", lambda _: whole, page, flags=re.DOTALL)


def main(argv: list[str]) -> None:
    command_line(__doc__).parse_args(argv)
    for path in sorted((ROOT / "results").glob("*.json")):
        result = read(path)
        if result.keys() & {"rows", "study"}:
            path.with_suffix(".md").write_text(markdown(result))
    for page in (ROOT / "README.md", ROOT / "RESULTS.md"):
        page.write_text(filled(page.read_text(), ROOT / "results"))


if __name__ == "__main__":
    with plain_errors():
        main(sys.argv[1:])
