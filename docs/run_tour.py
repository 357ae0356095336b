"""Runs the code of docs/tour.ipynb, cell by cell in one namespace. Needs no Jupyter.

    python -m docs.run_tour            -> docs/tour.ipynb with new outputs

Run it after every change to the notebook: a test compares the outputs that it holds.
"""

import base64
import contextlib
import io
import json
import sys
from pathlib import Path
from unittest import mock

import matplotlib
from matplotlib import pyplot

TOUR = Path(__file__).with_name("tour.ipynb")
DPI = 70  # of the figures: websites do not show large notebooks


def code(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(notebook: dict) -> list[tuple[str, list[bytes]]]:
    """What each code cell prints, and its figures as PNG. Progress bars (stderr) are dropped."""
    matplotlib.use("Agg")
    names, found = {}, []
    quiet, own_path = contextlib.redirect_stderr(io.StringIO()), mock.patch("sys.path", [*sys.path])
    with contextlib.chdir(TOUR.parent), quiet, own_path:  # the folder that Jupyter would run it in
        for cell in code(notebook):
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile("".join(cell["source"]), f"cell {cell['id']}", "exec"), names)
            found.append((out.getvalue(), [png(number) for number in pyplot.get_fignums()]))
    return found


def png(number: int) -> bytes:
    """An open figure, which is then closed."""
    with io.BytesIO() as file:
        pyplot.figure(number).savefig(file, dpi=DPI)
        pyplot.close(number)
        return file.getvalue()


def outputs(text: str, figures: list[bytes]) -> list[dict]:
    """The same in the notebook's format."""
    stream = dict(output_type="stream", name="stdout", text=text.splitlines(keepends=True))
    images = [{"image/png": base64.b64encode(figure).decode()} for figure in figures]
    shown = [dict(output_type="display_data", metadata={}, data=image) for image in images]
    return [stream, *shown] if text else shown


if __name__ == "__main__":
    tour = json.loads(TOUR.read_text())
    for number, (cell, result) in enumerate(zip(code(tour), run(tour), strict=True), start=1):
        cell |= dict(execution_count=number, outputs=outputs(*result))
    TOUR.write_text(json.dumps(tour, indent=1, ensure_ascii=False) + "\n")
