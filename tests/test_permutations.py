"""The permutations: a text that needs as many evaluations as words since the last reset.

Labels are products of permutations. J evaluations see J words back, with any weights.
A far start sees every word before.
"""

import importlib

import pytest
import torch

import train
from anderson import picard
from evidence import compare, depth, rivals
from models.transformer import PRESETS
from tasks import permutations

TINY = ["--task=permutations", "--teacher_steps=4", "--student_steps=4", "--batch=16", "--K=6"]
L = permutations.LENGTH


@pytest.fixture(scope="module")
def task():
    return permutations.task(None)


def network(task, preset="transformer-window"):
    torch.manual_seed(0)
    return task.network({"preset": preset}).eval()


def changed(answer, x, place: int) -> list[int]:
    """The positions whose answer changes with the word at a place."""
    other = x.clone()
    other[:, place] = 6 + (x[:, place] - 6 + 1) % 3
    with torch.no_grad():
        return (answer(x) != answer(other)).any(-1)[0].nonzero().flatten().tolist()


def test_states_are_products_of_permutations():
    """Computed once more from the definition, by moving three things about."""
    words, states, depths = permutations.text(20, seed=3)
    for line, numbers, ages in zip(words.tolist(), states.tolist(), depths.tolist(), strict=True):
        things, age = "012", 0
        for word, number, expected in zip(line, numbers, ages, strict=True):
            x, y, z = things
            things = {"a": y + z + x, "b": y + x + z, "r": "012"}[permutations.WORDS[word]]
            age = 0 if word == 2 else age + 1
            assert (things, age) == ("".join(map(str, permutations.STATES[number])), expected)
        assert line[0] == permutations.WORDS.index("r")


def test_the_order_of_words_matters_and_all_states_occur():
    after = permutations.AFTER
    assert after[after[0][0]][1] != after[after[0][1]][0]
    assert permutations.text(100, seed=0)[1].unique().tolist() == [*range(6)]


def test_no_sequence_of_another_split_was_trained(task):
    parts = task.train, task.valid, task.test
    train, valid, test = ({tuple(row) for row in split.x.tolist()} for split in parts)
    assert not train & (valid | test)


@pytest.mark.parametrize("J", [1, 3])
def test_J_evaluations_see_J_words_back(task, J):
    """Shown here with random weights; the proof holds for any."""
    net, (x, _) = network(task), task.test.batch(torch.arange(1))

    def answer(x):
        u = net.inject(x)
        return picard(lambda z: net.f(z, u), net.initial(u), J, last=True, sample_dims=2)

    assert changed(answer, x, 8) == [*range(8, 8 + J + 1)]


def test_a_far_start_sees_every_word_before(task):
    x, _ = task.test.batch(torch.arange(1))
    for preset, last in (("transformer-window", 8 + 2), ("transformer-window-far", L - 1)):
        net = network(task, preset)
        start = net.cell.start()
        assert changed(lambda x, net=net, start=start: start(net.inject(x))[0], x, 8) == [
            *range(8, last + 1)
        ]


def test_presets_differ_in_the_start_alone():
    near, far = (PRESETS[f"transformer-window{end}"] for end in ("", "-far"))
    assert {**near, "far": far["far"]} == far


def test_accuracy_by_depth_of_a_run(tmp_path, monkeypatch):
    """Every method has a row, and so has the student with the far start."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(permutations, "SAMPLES", (64, 16, 32))
    monkeypatch.setattr(
        compare, "train", lambda module, *flags: importlib.import_module(module).main([*flags])
    )
    folder = "runs/permutations-seed0"
    for stage in ("teacher", "student"):
        train.main([*TINY, "--stage", stage, "--out", folder])
    for kind in ("direct-1", "direct-4"):
        rivals.main([kind, *TINY, "--out", folder])
    depth.main(["--seeds", "0", "--flags", *TINY[1:]])
    text = (tmp_path / "results/permutations-depth.md").read_text()
    for name in (*depth.SHOWN, "anderson, 1", "cdeq transformer-window-far, its start alone"):
        assert f"| {name} | " in text
    assert "| method | 0 - 1 | 2 - 3 | 4 - 7 | 8 - 15 | 16 - 31 |" in text
    assert (tmp_path / "results/permutations-depth.png").exists()
