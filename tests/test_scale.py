"""The estimates of docs/scale.md.

Each formula is compared with the code that it describes, at small size.
"""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import losses
import runs
import train
import trajectories
from config import TASKS, Config, parse
from evidence import scale
from evidence.evaluate import evaluate
from evidence.methods import methods
from evidence.reading import reading
from evidence.rivals import Rivals
from fpode import TimeMap
from models import mdeq, transformer
from models.__main__ import WORDS, sizes
from student import Student

from .conftest import ROOT

TEACHER, STUDENT = "its share of the update, %", "all-reduce's share, %"


def test_the_page_has_the_table_that_is_printed():
    page = (ROOT / "docs" / "scale.md").read_text()
    assert f"<!-- scale -->\n{scale.table()}\n<!-- end -->" in page
    assert len(page.splitlines()) <= 90 and "nothing was measured on a GPU" in page
    assert f"| {scale.SPEED['reading']['per_second']:.0f} |" in page


@pytest.mark.parametrize("preset", scale.TASKS)
def test_eight_gpus_average_gradients_in_a_twentieth_of_the_time(preset):
    share = {name: value for name, _, value in scale.rows(preset, 8)}
    assert 0 < share[TEACHER] <= 5 and 0 < share[STUDENT] <= 5


def test_bytes_of_parameters_are_those_of_a_network():
    net = mdeq.MDEQ(**mdeq.PRESETS["digits"])
    assert 4 * sizes("digits")["parameters"] == sum(p.nbytes for p in net.parameters())


@pytest.mark.parametrize("preset", scale.TASKS)
def test_a_student_trains_about_as_much_as_its_teacher_at_most(preset):
    times, image = TimeMap(0.19, 20), preset in mdeq.PRESETS
    with torch.device("meta"):
        if image:
            net = mdeq.MDEQ(**mdeq.PRESETS[preset])
        else:
            net = transformer.DEQTransformer(WORDS, **transformer.PRESETS[preset])
        student = Student(net, times, own_injection=True, start=True)
    own = sum(p.numel() for p in student.parameters())
    assert own <= 1.01 * scale.task(preset).parameters


@pytest.mark.parametrize("preset", scale.TASKS)
def test_bytes_of_a_store_are_those_of_its_plan(preset):
    w = scale.task(preset)
    found = {name: value for name, _, value in scale.rows(preset, 1)}
    for states, size in ((1, found["all z_K of the task, GB"]),
                         (w.K + 1, 1e3 * found["all its trajectories, TB"])):  # fmt: skip
        kind, message = trajectories.plan(
            w.n, states, w.state * w.parts, torch.bfloat16, w.cache_gb, w.disk_gb
        )
        assert kind == "rolling" and f" = {size:.3g} GB" in message


@pytest.mark.parametrize("preset", scale.TASKS)
def test_a_teachers_depth_is_the_mean_of_its_updates(preset):
    w = scale.task(preset)
    names = ("growing", "before", "layers")
    config = Config(teacher_steps=4000, **{name: getattr(w, name) for name in names})
    drawn = np.mean([train.depth(config, step) for step in range(4000)], axis=0)
    assert drawn == pytest.approx(scale.depth(w), rel=0.03)


@pytest.mark.parametrize("preset", scale.TASKS)
def test_a_students_own_run_is_the_mean_of_what_is_drawn(preset):
    """The work is counted in positions: all of a picture; of a text, those after the memory, with
    gradient, and in some updates the memory's own run, without."""
    w = scale.task(preset)
    job = SimpleNamespace(task=SimpleNamespace(train=range(9), decays=(0.5, 0.8)), config=Config())
    student, random = SimpleNamespace(times=TimeMap(0.19, 20)), torch.Generator().manual_seed(0)
    steps, worth = [], []
    for _ in range(4000):
        J = len(train.draw_run(job, student, random))
        past, chance = train.draw_past(1 if w.parts > 1 else 0, random)
        steps.append(J)
        worth.append(J * (3 * (1 - past / 2) + (past / 2 if chance < train.OWN_MEMORY else 0)))
    drawn = np.mean(steps), np.mean(worth)
    assert drawn == pytest.approx(scale.own_run(w), rel=0.03)


def test_an_evaluation_with_gradient_costs_three():
    """One evaluation forward and the cost of two backward, which the first layer does not need in
    full."""
    net = mdeq.MDEQ(**mdeq.PRESETS["digits"])
    x, y = torch.randn(4, 1, 8, 8), torch.zeros(4).long()
    flops = {}
    for steps, layers in ((0, 1), (0, 3), (5, 1)):
        with FlopCounterMode(display=False) as counter:
            batch = losses.TeacherBatch(x, y, steps, layers)
            losses.TeacherLoss(net)(batch)["task"].backward()
        flops[steps, layers] = counter.get_total_flops() / 4 / sizes("digits")["flops"]
    assert flops[0, 3] - flops[0, 1] == pytest.approx(6, rel=0.02)
    assert flops[5, 1] - flops[0, 1] == pytest.approx(5, rel=0.02)


@pytest.mark.parametrize("gb", [1e-3, 1.0])
def test_slots_and_solves_are_those_of_a_rolling_store(gb, tmp_path, monkeypatch):
    flags = ["--task=digits", "--store=rolling", "--batch=16", "--student_steps=64", "--K=3"]
    flags += [f"--cache_gb={gb}", f"--out={tmp_path}", "--device=cpu", "--no-augment"]
    job = runs.begin(*parse(flags))
    net = mdeq.MDEQ(**mdeq.PRESETS["digits"]).eval()
    count = 0

    def sample(net, x, *_, **__):
        nonlocal count
        count += len(x)
        return net.initial(net.inject(x))[None]

    monkeypatch.setattr(trajectories, "sample", sample)
    store = trajectories.make_store(job, net, ends=True)
    w = SimpleNamespace(n=len(job.task.train), **dataclasses.asdict(job.config))
    slots = scale.slots(w, 1, 4 * sizes("digits")["state"])
    assert slots // trajectories.REUSE == store.chunk
    for step in range(64):
        store.batch(step)
    assert count == scale.solved(64, 16, slots)


def test_an_all_reduce_sends_what_a_ring_sends():
    """Eight simulated processes: the mean, and the bytes that each of them sends."""
    n, size = 8, 64
    parts = np.random.default_rng(0).normal(size=(n, n, size // n))  # process, chunk, numbers
    mean, sent = parts.mean(0), np.zeros(n)
    for add in (True, False):  # first every chunk's sum comes to one process, then goes round
        for step in range(n - 1):
            moving = [(rank, (rank - step + (not add)) % n) for rank in range(n)]
            values = [parts[rank, chunk].copy() for rank, chunk in moving]
            for (rank, chunk), value in zip(moving, values, strict=True):
                sent[rank] += value.nbytes
                there = (rank + 1) % n
                parts[there, chunk] = parts[there, chunk] * add + value
    assert np.allclose(parts / n, mean)
    assert sent / scale.L == pytest.approx(scale.all_reduce(8 * size, n))
    assert scale.all_reduce(1e9, 1) == 0
    assert scale.all_reduce(1e9, 64) > scale.all_reduce(1e9, 16) > scale.all_reduce(1e9, 8)


def test_an_evaluation_evaluates_f_as_often_as_counted():
    task = TASKS["digits"](Path("data"))
    net = mdeq.MDEQ(**mdeq.PRESETS["digits"]).eval()
    student = Student(net, TimeMap(0.3, 3)).eval()
    run = runs.Run(Path(), task, dict(K=3, m=2), net, {"": (student, 0.8)}, torch.device("cpu"))
    table, calls = methods(run, Rivals({}, {}, {})), []
    for cell in (net.cell, student.cell):
        cell.register_forward_hook(lambda *_: calls.append(1))
    evaluate(run, table, task.test, (1, 2), batch=500)
    assert len(table) == 4
    assert len(calls) == scale.evaluations(3, False, nfes=(1, 2))


def test_pictures_are_read_at_some_rate():
    found = reading(3)
    assert 50e3 < found["bytes"] < 200e3
    assert found["per_second"] > 0
