"""Reports of one seed and of several.

A method is as good as its teacher only if it stays so with more evaluations.
Merged rows are means over seeds; what was not measured stays empty; costs are seconds and bytes.
"""

import dataclasses
import json

import pytest
import torch

import infer
from anderson import anderson
from checkpoint import UsageError
from evidence import compare, contraction, measure, tables
from evidence.merge import merge
from evidence.methods import methods
from evidence.rivals import Rivals
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


def test_a_method_is_equal_from_where_it_stays_as_good(run, monkeypatch):
    """A metric that is good once and falls again does not count; here the margin is 0.5."""
    table = curves(
        monkeypatch,
        anderson=[10, 60, 89, 90.1, 90],
        lucky=[90, 20, 89.5, 91, 92],
        never=[80, 80, 80, 80, 89.4],
        once=[90, 90, 90, 90, 90],
    )
    expected = {"anderson": 4, "lucky": 3, "never": None, "once": 1}
    assert measure.equals(run, table) == expected


def test_the_margin_of_a_perplexity_is_relative(run, monkeypatch):
    run.task = dataclasses.replace(run.task, higher_is_better=False, margin=0.17)
    table = curves(monkeypatch, anderson=[9, 5, 4, 3.2, 3], slow=[9, 8, 7, 6, 3.5])
    assert measure.equals(run, table) == {"anderson": 4, "slow": 5}


def test_a_study_keeps_the_rows_of_other_seeds(tmp_path):
    """Those made with the same flags, and none if there is no file yet."""
    stem = tmp_path / "digits-contraction"
    assert contraction.earlier(stem, []) == []
    rows = [{"seed": 0}, {"seed": 1, "flags": []}, {"seed": 2, "flags": ["--K", "9"]}]
    stem.with_suffix(".json").write_text(json.dumps({"rows": rows}))
    assert [one["seed"] for one in contraction.earlier(stem, [])] == [0, 1]
    assert [one["seed"] for one in contraction.earlier(stem, ["--K", "9"])] == [2]


def test_a_study_names_the_fewest_layers_that_are_as_good_when_trained_directly(run, monkeypatch):
    """As good on the validation split: here the margin is 0.5, and the teacher is at 90."""

    def evaluated(run, table, split, nfes, **_):
        return {name: [{"nfe": nfe, "value": 90.0} for nfe in nfes] for name in table}

    monkeypatch.setattr(contraction, "evaluate", evaluated)
    monkeypatch.setattr(contraction, "equals", lambda *_: {"anderson": 3, "cdeq": None})
    monkeypatch.setattr(contraction, "direct_row", lambda run, J, net, split: {"value": net})
    needed, _ = contraction.curves(run, Rivals({1: 89.4, 2: 89.6, 4: 95.0}, {}, {}))
    assert needed == {"anderson": 3, "direct": 2}
    needed, points = contraction.curves(run, Rivals({1: 80.0, 2: 81.0}, {}, {}))
    assert needed == {"anderson": 3} and points["direct", 2]["value"] == 81.0


def test_merged_seeds_keep_what_all_of_them_have(run, tmp_path):
    """A row is the mean over the seeds that have it; a method is as good as the teacher only if it
    is so with every seed; what was not measured stays empty."""
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


def test_every_teacher_is_compared_with_every_direct_network(run):
    """Here direct-1 answers as the teacher does, and direct-2 is always wrong."""
    report = measure.measure(run, NONE)
    teacher, wrong = report["teacher"], report["teacher"]["items"].clone()
    wrong[:, 1] = 0
    rows = [{"method": "direct", "nfe": 1}, {"method": "direct", "nfe": 2, "items": wrong}]
    rows.append({"method": compare.LONGER, "contraction": 0.5})
    report["rows"] += [teacher | row for row in rows]
    merged = merge([report])
    longer = next(row for row in merged["rows"] if row["method"] == compare.LONGER)
    for one in (merged["teacher"], longer):
        assert one["vs_directs"]["1"] == (0, 0, 0)
        assert one["vs_directs"]["2"][0] == pytest.approx(teacher["value"], abs=1e-4) != 0
    assert " | less direct-1's | less direct-2's | " in tables.markdown(merged)


def test_costs_are_seconds_and_bytes(run):
    """The methods that were asked for are measured, and the injection, but nothing else."""
    table = methods(run, NONE)
    spent = cost(run, NONE, table, {("picard", 2), ("cdeq", 1)}, batch=4)
    assert spent.keys() == {("picard", 2), ("cdeq", 1), ("injection", None)}
    assert all(seconds > 0 and (peak is None or peak > 2**20) for seconds, peak in spent.values())


def test_the_relative_residual_at_zero_is_printed_as_infinite():
    assert tables.number({"residual": 2.6e13}, "residual") == "∞"
    assert tables.number({"residual": 0.5}, "residual") == "0.5000"


@torch.no_grad()
def test_the_students_answer_is_continued_by_the_solver(run):
    """NFE 1 is the student's first answer; all further evaluations are the solver's, from there."""
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


def test_a_seed_given_twice_is_refused():
    with pytest.raises(UsageError, match="--seeds 0 0: each once"):
        compare.main(["--task", "digits", "--seeds", "0", "0"])
