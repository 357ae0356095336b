"""The tables: what counts as equal, what is merged, what stays empty."""

import contextlib
import dataclasses
import importlib.util
from argparse import Namespace

import pytest
import torch

import compare
import infer
import tables
from anderson import anderson
from checkpoint import UsageError


@pytest.fixture
def run(tiny_run):
    return infer.open_run(tiny_run, device="cpu")


def curves(monkeypatch, **values):
    """Makes infer.evaluate answer with these metrics by NFE, for each method."""
    rows = {
        name: [{"nfe": i + 1, "value": value} for i, value in enumerate(curve)]
        for name, curve in values.items()
    }
    monkeypatch.setattr(infer, "evaluate", lambda *_, **__: rows)
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
    assert compare.equals(run, table, 8) == expected


def test_equal_of_a_perplexity_is_a_share_above(run, monkeypatch):
    run.task = dataclasses.replace(run.task, higher_is_better=False, margin=0.17)
    table = curves(monkeypatch, anderson=[9, 5, 4, 3.2, 3], slow=[9, 8, 7, 6, 3.5])
    assert compare.equals(run, table, 8) == {"anderson": 4, "slow": 5}


def test_merged_seeds_keep_what_all_of_them_have(run, tmp_path):
    """Means over the seeds that have a row; a method is equal only where every seed gets there;
    what was not measured stays empty."""
    reports = [compare.report(run, "valid") for _ in range(2)]
    for report, nfe in zip(reports, (2, 4), strict=True):
        row = {"method": "cdeq", "nfe": [nfe], "value": 50.0 * nfe, "seconds_per_batch": nfe / 8}
        report["equal"] = [row, row | {"method": "picard"}][: 2 if nfe == 2 else 1]
        report["rows"].append({"method": "gpm", "nfe": None, "value": None, "n": 0})
    reports[1]["rows"] = [row for row in reports[1]["rows"] if row["method"] != "cdeq-paper"]
    text = tables.write(compare.merge(reports), tmp_path / "table")
    assert "| cdeq | 2, 4 | 150.00 ± 70.71 | 0.3750 |" in text
    assert "| picard | 2" not in text.split("as good as")[1]
    assert "| cdeq-paper (1 of 2 seeds) | " in text and "| cdeq | " in text
    assert "| gpm |  |  |  |  |" in text
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".md", ".png"}


def test_costs_are_seconds_and_bytes(run):
    """Of the methods wanted, of the injection, and of nothing else."""
    table = compare.methods(run)
    spent = compare.cost(run, table, {("picard", 2), ("cdeq", 1)}, batch=4)
    assert spent.keys() == {("picard", 2), ("cdeq", 1), ("injection", None)}
    assert all(seconds > 0 and (peak is None or peak > 2**20) for seconds, peak in spent.values())


def test_the_relative_residual_of_zero_is_no_number():
    assert tables.number({"residual": 2.6e13}, "residual") == "∞"
    assert tables.number({"residual": 0.5}, "residual") == "0.5000"


@torch.no_grad()
def test_torchdeqs_solvers_are_counted_like_ours(run):
    """K evaluations each; before a solver's first iterate z_0 stands; fixed-point is Picard."""
    pytest.importorskip("torchdeq", reason="the optional peers are not installed")
    table = compare.methods(run, peers=True)
    x, _ = run.task.test.batch(torch.arange(4))
    u = run.teacher.inject(x)
    z0, states = run.teacher.initial(u), {}
    for name in ("picard", *(f"torchdeq-{kind}" for kind in compare.PEERS)):
        table[name].counter.nfe = 0
        states[name] = table[name].solve(z0, u, 6)
        assert table[name].counter.nfe == 6 and states[name].shape == (7, *z0.shape)
    assert torch.allclose(states["torchdeq-fixed-point"], states["picard"], atol=1e-5)
    assert not states["torchdeq-anderson"][2].any() and states["torchdeq-anderson"][3].any()
    assert not states["torchdeq-broyden"][1].any() and states["torchdeq-broyden"][2].any()


@torch.no_grad()
def test_a_jump_then_the_solver(run):
    """NFE 1 is the student's first answer; from there the teacher's solver."""
    both, alone = (compare.methods(run)[name] for name in ("cdeq+anderson", "cdeq"))
    x, _ = run.task.test.batch(torch.arange(4))
    u = both.inject(x)
    z0 = both.initial(u)
    states = both.solve(z0, u, 4)
    assert both.counter.nfe == 4 and len(states) == 5
    assert torch.equal(states[1], alone.solve(z0, alone.inject(x), 1, last=True))
    expected = anderson(lambda z: run.teacher.f(z, u[0]), states[1], 3, **run.solver())
    assert torch.allclose(states[1:], expected, atol=1e-6)


def test_the_papers_tables_and_figures_are_parts_of_the_results(monkeypatch):
    """One table holds several of them; those of other data are refused, and absent peers are."""

    def parts(task, tables, figures, peers=False):
        wanted = dict(tables=tables, figures=figures, ablation=False, peers=peers, teachers=False)
        return compare.wanted_parts(Namespace(task=task, **wanted))

    assert parts("docstrings", [1, 4, 5], [2, 3]) == ["", "grid", "aa"]
    assert parts("cora", [3], []) == parts("cora", [], []) == [""]
    for bad in (("digits", [1], []), ("cora", [2], []), ("docstrings", [], [1])):
        with pytest.raises(UsageError, match="allowed is"):
            parts(*bad)
    for there in (None, "torchdeq"):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, there=there: there)
        refused = contextlib.nullcontext() if there else pytest.raises(UsageError, match="missing")
        with refused:
            assert parts("digits", [2], [], True) == ["", "peers"]
    assert [*compare.students("aa")] == ["", "anderson", "paper", "paper-no-anderson"]
    assert [*compare.students("")] == ["", "paper"] and len(compare.GRID) == 12


def test_a_seed_counts_once():
    with pytest.raises(UsageError, match="--seeds 0 0: each once"):
        compare.main(["--task", "digits", "--seeds", "0", "0"])
