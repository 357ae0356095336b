"""docs/tour.ipynb is a valid notebook, and its stored outputs are those of its code."""

import json
import re

import pytest

from docs.run_tour import TOUR, code, run

KEYS = {"cell_type", "id", "metadata", "source"}
STORED = json.loads(TOUR.read_text())
NUMBER = re.compile(r"\d+\.\d+")


def printed(cell: dict) -> str:
    """The text among a cell's stored outputs."""
    return "".join(line for output in cell["outputs"] for line in output.get("text", []))


def test_the_tour_is_a_notebook():
    """nbformat 4.5, and short."""
    assert (STORED["nbformat"], STORED["nbformat_minor"]) == (4, 5)
    cells, made = STORED["cells"], code(STORED)
    assert 12 <= len(cells) <= 25 and cells[0]["cell_type"] == "markdown"
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        more = {"execution_count", "outputs"} if cell in made else set()
        assert cell.keys() == KEYS | more and cell["cell_type"] in ("markdown", "code")
        assert re.fullmatch(r"[\w-]{1,64}", cell["id"])
        assert cell not in made or len(cell["source"]) <= 15
    kinds = [output["output_type"] for cell in made for output in cell["outputs"]]
    assert {*kinds} == {"stream", "display_data"}
    assert TOUR.stat().st_size < 400_000


def test_the_stored_outputs_are_those_of_the_code():
    """Run anew, only the last digit of a number may differ."""
    for cell, (text, figures) in zip(code(STORED), run(STORED), strict=True):
        kept = printed(cell)
        assert NUMBER.sub("#", text) == NUMBER.sub("#", kept), f"{text}: python -m docs.run_tour"
        numbers = zip(NUMBER.findall(text), NUMBER.findall(kept), strict=True)
        for new, old in numbers:
            unit = 10.0 ** -len(old.partition(".")[2])
            assert float(new) == pytest.approx(float(old), abs=1.01 * unit), (text, kept)
        assert len(figures) == sum("data" in output for output in cell["outputs"])
