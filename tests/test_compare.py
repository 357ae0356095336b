"""The tables: what counts as equal, what is merged, what stays empty."""

import dataclasses

import pytest
import torch

import infer
from anderson import anderson
from checkpoint import UsageError
from evidence import compare, measure, tables
from evidence.merge import merge
from evidence.methods import methods
from evidence.timing import cost

from .conftest import NONE


@pytest.fixture
def run(tiny_run):
    return infer.open_run(tiny_run, device="cpu")


def curves(monkeypatch, **values):
    """Makes evaluate answer with these metrics by NFE, for each method."""
    rows = {
        name: [{"nfe": i + 1, "value": value} for i, value in enumerate(curve)]
        for name, curve in values.items()
    }
    monkeypatch.setattr(measure, "evaluate", lambda *_, **__: rows)
    return {name: name for name in values}


def test_equal_is_as_good_from_there_on(run, monkeypatch):
    """A metric that is good by chance and falls again does not count; K = 5, margin 0.5."""
    table = curves(
        monkeypatch,
        anderson=[10, 60, 89, 90.1, 90],
        lucky=[90, 20, 89.5, 91, 92],
        never=[80, 80, 80, 80, 89.4],
        once=[90, 90, 90, 90, 90],
    )
    expected = {"anderson": 4, "lucky": 3, "never": None, "once": 1}
    assert measure.equals(run, table) == expected


def test_equal_of_a_perplexity_is_a_share_above(run, monkeypatch):
    run.task = dataclasses.replace(run.task, higher_is_better=False, margin=0.17)
    table = curves(monkeypatch, anderson=[9, 5, 4, 3.2, 3], slow=[9, 8, 7, 6, 3.5])
    assert measure.equals(run, table) == {"anderson": 4, "slow": 5}


def test_merged_seeds_keep_what_all_of_them_have(run, tmp_path):
    """Means over the seeds that have a row; a method is equal only where every seed gets there;
    what was not measured stays empty."""
    reports = [measure.measure(run, NONE) for _ in range(2)]
    for report, nfe in zip(reports, (2, 4), strict=True):
        row = {"method": "cdeq", "nfe": [nfe], "value": 50.0 * nfe, "seconds_per_batch": nfe / 8}
        report["equal"] = [row, row | {"method": "picard"}][: 2 if nfe == 2 else 1]
        report["rows"].append({"method": "gpm", "nfe": None, "value": None, "n": 0})
    reports[1]["rows"] = [row for row in reports[1]["rows"] if row["method"] != "cdeq-paper"]
    text = tables.write(merge(reports), tmp_path / "table")
    assert "| cdeq | 2, 4 | 150.00 ± 70.71 | 0.3750 |" in text
    assert "| picard | 2" not in text.split("as good as")[1]
    assert "| cdeq-paper (1 of 2 seeds) | " in text and "| cdeq | " in text
    assert "| gpm |  |  |  |  |" in text
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".md", ".png"}


def test_costs_are_seconds_and_bytes(run):
    """Of the methods wanted, of the injection, and of nothing else."""
    table = methods(run, NONE)
    spent = cost(run, NONE, table, {("picard", 2), ("cdeq", 1)}, batch=4)
    assert spent.keys() == {("picard", 2), ("cdeq", 1), ("injection", None)}
    assert all(seconds > 0 and (peak is None or peak > 2**20) for seconds, peak in spent.values())


def test_the_relative_residual_of_zero_is_no_number():
    assert tables.number({"residual": 2.6e13}, "residual") == "∞"
    assert tables.number({"residual": 0.5}, "residual") == "0.5000"


@torch.no_grad()
def test_a_jump_then_the_solver(run):
    """NFE 1 is the student's first answer; from there the teacher's solver."""
    both, alone = (methods(run, NONE)[name] for name in ("cdeq+anderson", "cdeq"))
    x, _ = run.task.test.batch(torch.arange(4))
    u = both.inject(x)
    z0 = both.initial(u)
    states = both.solve(z0, u, 4)
    assert both.counter.nfe == 4 and len(states) == 5
    assert torch.equal(states[1], alone.solve(z0, alone.inject(x), 1, last=True))
    expected = anderson(lambda z: run.teacher.f(z, u[0]), states[1], 3, **run.solver())
    assert torch.allclose(states[1:], expected, atol=1e-6)


def test_parts_of_the_results_have_their_students():
    """Fig. 3 compares both recipes with and without the Anderson step; Table 4 has 6 x 2 weights;
    an unknown part is refused."""
    assert [*compare.STUDENTS["aa"]] == ["", "anderson", "paper", "paper-no-anderson"]
    assert [*compare.STUDENTS["main"]] == ["", "paper"] and len(compare.GRID) == 12
    with pytest.raises(UsageError, match="--part: invalid choice: 'table'"):
        compare.main(["--part", "table"])


def test_a_seed_counts_once():
    with pytest.raises(UsageError, match="--seeds 0 0: each once"):
        compare.main(["--task", "digits", "--seeds", "0", "0"])
