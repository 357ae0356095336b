"""Alg. 1: its cost, its answers, its anytime form, and the command.

J steps make J evaluations of h; a prefix of a run is a shorter run.
Samples stop by themselves, and a stopped one costs nothing more.
"""

import json
from dataclasses import replace

import pytest
import torch

import infer
from anderson import Counter
from checkpoint import UsageError
from evidence.evaluate import evaluate

from .conftest import command


@pytest.mark.parametrize("J", [1, 2, 5])
def test_J_steps_cost_exactly_J_evaluations(net, student, batch, J):
    """Alg. 1 with h(z_{j-1}, t_{j-1}) kept: one evaluation a step, the first included."""
    u, _ = batch
    student.h = counter = Counter(student.h)
    states = infer.cdeq(student, net.initial(u), u, J, decay=0.8)
    assert counter.nfe == J and len(states) == J + 1


def test_more_steps_extend_fewer(net, student, batch):
    u, _ = batch
    z0 = net.initial(u)
    long = infer.cdeq(student, z0, u, 6, 0.8)
    assert torch.allclose(infer.cdeq(student, z0, u, 3, 0.8), long[:4], atol=1e-6)


def test_inference_is_the_consistency_map_along_its_own_states(net, student, batch):
    """Alg. 1 against g of Eq. 5 with both evaluations made anew."""
    u, _ = batch
    torch.nn.init.normal_(student.w_t[0])
    t = student.times.schedule(4, 0.7)
    z = infer.cdeq(student, net.initial(u), u, 4, 0.7)
    for j in (1, 2, 3):
        g = student.g(z[j], z[j - 1], torch.full((4,), t[j]), t[j - 1], u)
        assert torch.allclose(g, z[j + 1], atol=1e-5)


def test_anytime_stops_each_sample_alone(net, student, batch):
    """A sample's answer and cost do not depend on the other samples of its batch."""
    u, _ = batch
    z0 = net.initial(u)
    z, nfe = infer.anytime(student, z0, u, 0.3, 12, 0.8)
    for i in range(len(u)):
        alone, cost = infer.anytime(student, z0[i : i + 1], u[i : i + 1], 0.3, 12, 0.8)
        assert cost.item() == nfe[i] and torch.allclose(alone[0], z[i], atol=1e-4)
    assert nfe.max() <= 12


def test_anytime_with_no_tolerance_is_all_steps(net, student, batch):
    u, _ = batch
    z, nfe = infer.anytime(student, net.initial(u), u, 0.0, 5, 0.8)
    assert (nfe == 5).all()
    assert torch.allclose(z, infer.cdeq(student, net.initial(u), u, 5, 0.8, True), atol=1e-6)


def test_anytime_saves_the_evaluations_of_finished_samples(net, student, batch):
    u, _ = batch
    sizes = []
    h = student.h
    student.h = lambda z, t, u: (sizes.append(len(z)), h(z, t, u))[1]
    _, nfe = infer.anytime(student, net.initial(u), u, 0.3, 12, 0.8)
    assert sum(sizes) == nfe.sum()


def test_evaluation_counts_what_it_declares(tiny_run):
    """A method that evaluates more often than its NFE says is caught."""
    run = infer.open_run(tiny_run, device="cpu")
    method = infer.counted(run.teacher, *run.students[""])
    cheat = replace(method, solve=lambda z0, u, nfe: method.solve(z0, u, nfe + 1))
    evaluate(run, {"cdeq": method}, run.task.valid, (1, 2))
    with pytest.raises(AssertionError, match="cheat: 6 evaluations were made, 4 declared"):
        evaluate(run, {"cheat": cheat}, run.task.valid, (1, 2))


def test_the_table_prints_and_parses(tiny_run, capsys):
    infer.main(["--run", str(tiny_run), "--nfe", "1", "3", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["nfe"] for row in rows] == [1, 3]
    infer.main(["--run", str(tiny_run), "--tol", "0.1", "--student", "paper"])
    assert "evaluations on average" in capsys.readouterr().out


def test_answers_on_image_files(tiny_run, tmp_path, capsys):
    """Light on dark and dark on light, any size, colour or not, give the same input."""
    from PIL import Image, ImageOps

    run = infer.open_run(tiny_run, device="cpu")
    ink = ((run.task.test.x[0, 0] + 1) * 127.5).byte().numpy()
    picture = Image.fromarray(ink).resize((64, 64), Image.Resampling.NEAREST)
    picture.save(tmp_path / "light.png")
    ImageOps.invert(picture).convert("RGB").save(tmp_path / "dark.png")
    a, b = (run.task.read(tmp_path / name) for name in ("light.png", "dark.png"))
    assert a.shape == (1, 1, 8, 8) and torch.allclose(a, b, atol=1e-6)
    assert torch.allclose(a[0], run.task.test.x[0], atol=0.02)
    files = [str(tmp_path / name) for name in ("light.png", "dark.png")]
    infer.main(["--run", str(tiny_run), "--nfe", "2", "--json", "--files", *files])
    first, second = json.loads(capsys.readouterr().out)
    assert first["answer"] == second["answer"] in "0123456789" and first["nfe"] == 2


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--nfe", "1", "100000"], "--nfe 100000: allowed is >= 1 and <= 1000"),
        (["--decay", "1"], "--decay 1.0: allowed is >= 0 and < 1"),
        (["--temperature", "nan"], r"--temperature nan: allowed is >= 0\.001"),
        (["--student", "other"], "--student 'other' is not finished"),
        (["--files", "missing.png"], "missing.png: no such file"),
        (["--files", __file__], "test_infer.py is not a readable image"),
        (["--tol", "x"], "argument --tol: invalid float value"),
        (["--run", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_bad_input_says_what_was_wrong(arguments, complaint, tiny_run):
    with pytest.raises(UsageError, match=complaint):
        infer.main(["--run", str(tiny_run), *arguments])


def test_an_error_is_one_line_and_exit_code_two(tmp_path):
    done = command("infer.py", "--run", str(tmp_path))
    assert done.returncode == 2 and done.stderr.startswith(f"infer.py: cannot read {tmp_path}")
    assert len(done.stderr.splitlines()) == 1


def test_an_unfinished_teacher_is_refused(tiny_run, tmp_path):
    from checkpoint import load, save

    saved = load(tiny_run / "teacher.pt", "teacher")
    contents = {key: saved[key] for key in ("model", "config")}
    save(tmp_path / "teacher.pt", "teacher", step=3, **contents)
    with pytest.raises(UsageError, match="the teacher has 3 of 6 updates"):
        infer.open_run(tmp_path, device="cpu")
