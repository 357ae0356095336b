"""The pages and the code agree.

Equations and algorithms are cited; the table from paper to code names what exists; imports go down.
Files, functions and pages stay short; every table is the one that its JSON file gives.
"""

import ast
import dataclasses
import json
import re

import pytest

from checkpoint import UsageError, provenance
from config import Config
from evidence import pages, tables

from .conftest import ROOT

ROOMS = ("", "models", "tasks", "evidence")
SOURCES = [path for room in ROOMS for path in sorted((ROOT / room).glob("*.py"))]
README, RESULTS = ((ROOT / name).read_text() for name in ("README.md", "RESULTS.md"))
TOP = {"anderson.py", "fpode.py", "student.py", "losses.py", "trajectories.py", "train.py"}
TOP |= {"infer.py", "config.py", "runs.py", "checkpoint.py"}
FLOORS = [
    {"checkpoint", "anderson", "fpode"},
    {"student", "models", "tasks"},
    {"losses", "config"},
    {"runs"},
    {"trajectories"},
    {"infer", "train"},
    {"evidence"},
]


@pytest.mark.parametrize("anchor", [f"Eq. {n}" for n in range(1, 15)] + ["App. B.3"])
def test_every_equation_is_cited_in_code(anchor):
    pattern = re.escape(anchor) + r"(?!\d)"
    assert any(re.search(pattern, path.read_text()) for path in SOURCES), anchor


@pytest.mark.parametrize("anchor", [f"Alg. {n}, l. " for n in range(1, 5)])
def test_every_algorithm_is_cited_line_by_line(anchor):
    assert any(anchor in path.read_text() for path in SOURCES), anchor


def test_every_row_of_the_paper_to_code_table_exists():
    rows = re.findall(r"^\| .* \| `([\w/.]+\.py)` \| (.*) \|$", README, re.MULTILINE)
    assert len(rows) >= 14
    for file, names in rows:
        defined = {
            node.name
            for node in ast.walk(ast.parse((ROOT / file).read_text()))
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        }
        for name in re.findall(r"`([\w.]+)`", names):
            assert name.split(".")[-1] in defined, (file, name)


def imported(nodes) -> list[str]:
    """The modules, or rooms, that import statements among these nodes name."""
    froms = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    plain = [node for node in nodes if isinstance(node, ast.Import)]
    names = [*froms, *(alias.name for node in plain for alias in node.names)]
    return [name.split(".")[0] for name in names]


def test_imports_go_down_the_floors():
    """A module imports from its own floor or lower ones. One narrow door leads up: train.py and
    infer.py ask evidence/ to measure, within the function that does."""
    level = {name: i for i, names in enumerate(FLOORS) for name in names}
    for path in SOURCES:
        home = path.parent.name if path.parent != ROOT else path.stem
        tree = ast.parse(path.read_text())
        assert all(level.get(name, 0) <= level[home] for name in imported(tree.body)), path.name
        upward = [name for name in imported([*ast.walk(tree)]) if level.get(name, 0) > level[home]]
        assert not upward or (path.stem in ("train", "infer") and {*upward} == {"evidence"})


LONGEST = {"train": 330}  # lines; of all others, 300


def test_files_functions_and_settings_stay_few_and_short():
    for path in SOURCES:
        text = path.read_text()
        assert len(text.splitlines()) <= LONGEST.get(path.stem, 300), path.name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                docstring = len((ast.get_docstring(node) or "").splitlines())
                longest = 60 if node.name == "fit" else 40  # the loop, in sight
                assert node.end_lineno - node.lineno - docstring < longest, (path.name, node.name)
    assert len(dataclasses.fields(Config)) <= 50
    assert len(README.splitlines()) <= 220
    assert {path.name for path in ROOT.glob("*.py")} == TOP


def test_a_module_docstring_is_short_enough_to_be_read():
    for path in SOURCES:
        assert len((ast.get_docstring(ast.parse(path.read_text())) or "x").splitlines()) <= 25


CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_readmes_own_task_is_short_and_learns(tmp_path, monkeypatch):
    """The worked example: at most 40 lines of code, and all that a task needs."""
    import config

    monkeypatch.setattr(config, "TASKS", dict(config.TASKS))
    lines = [line for line in CODE[0].splitlines() if line.strip()]
    assert len(lines) <= 40
    exec(CODE[0].replace('"runs/', f'"{tmp_path}/'), {"__name__": "example"})
    assert "| cdeq |" in (tmp_path / "moons" / "report.md").read_text()


def test_tables_are_those_of_results():
    """JSON -> Markdown -> the pages, each made anew and equal to what stands there."""
    for path in ROOT.glob("results/*.md"):
        result = json.loads(path.with_suffix(".json").read_text())
        assert path.read_text() == tables.markdown(result), path.name
        assert f"<!-- {path.name}: " in RESULTS or f"results/{path.name}" in RESULTS, path.name
    for page in (README, RESULTS):
        assert pages.filled(page, ROOT / "results") == page
    for part, complaint in (("speed", "no table 'speed'"), ("value, rows no", "no row 'no'")):
        with pytest.raises(UsageError, match=complaint):
            pages.filled(f"<!-- digits.md: {part} -->\n<!-- end -->", ROOT / "results")
    for page, there in ((README, r"(\| accuracy \| \d)"), (RESULTS, r"(\| cdeq \| \d)")):
        spoiled = re.sub(there, r"\g<1>7", page)
        assert spoiled != page and pages.filled(spoiled, ROOT / "results") == page


def test_a_page_says_who_is_ahead_only_in_its_tables():
    """There the word comes from the interval; the prose of people claims more than that."""
    prose = re.sub(r"<!-- .*?<!-- end -->", "", README + RESULTS, flags=re.DOTALL)
    assert not re.search(r"\b(ahead|behind)\b", prose)


@pytest.mark.parametrize("name", sorted(path.stem for path in ROOT.glob("results/*.json")))
def test_every_result_names_a_clean_commit(name):
    result = json.loads((ROOT / "results" / f"{name}.json").read_text())
    commits = [result["commit"], *(run["commit"] for run in result.get("runs", []))]
    assert all(re.fullmatch("[0-9a-f]{40}", commit) for commit in commits)


def test_a_result_names_its_launcher(monkeypatch):
    """The command behind a result is the one to repeat it by."""
    assert provenance()["command"].startswith("python ")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert provenance()["command"].startswith("torchrun --nproc_per_node=2 ")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")
    assert provenance()["command"].startswith("torchrun --nnodes=3 --nproc_per_node=2 ")
