"""Training: the same weights whatever happens on the way.

Stopped, killed or run on two processes, a run ends with the same weights.
A checkpoint is written whole or not at all; a loss that is not finite keeps the last one.
"""

import collections
import json
import os
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import infer
import runs
import train
from checkpoint import UsageError, load
from config import parse
from evidence.evaluate import evaluate
from evidence.methods import methods
from fpode import TimeMap
from models.mdeq import MDEQ
from student import Student
from tasks import Split

from .conftest import NONE, ROOT, TINY, command, fit


def weights(folder, name="student.pt"):
    saved = load(folder / name, name.split(".")[0].split("-")[0])
    return {**saved["model"], **{f"ema.{key}": v for key, v in saved.get("ema", {}).items()}}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_run_leaves_everything_it_promises(tiny_run):
    names = {path.name for path in tiny_run.iterdir()}
    assert names >= {"teacher.pt", "student.pt", "student-paper.pt", "log.jsonl"}
    assert names >= {"report.json", "report.md", "report.png"}
    report = json.loads((tiny_run / "report.json").read_text())
    methods = {"picard", "anderson", "cdeq", "cdeq+anderson", "cdeq-paper"}
    assert {row["method"] for row in report["rows"]} == methods
    assert report["split"] == "test" and len(report["commit"]) >= 40
    assert [row["nfe"] for row in report["rows"] if row["method"] == "cdeq"] == [1, 2, 4, 8, 20]


def test_a_torn_line_of_the_log_is_ended(tmp_path):
    """A full disk may leave half a line; whole lines stay as they are."""
    job = SimpleNamespace(rank=0, folder=tmp_path)
    runs.log(job, a=1)
    runs.log(job, a=2)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"torn')
    runs.log(job, a=3)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert lines.pop(2) == '{"torn' and [json.loads(line)["a"] for line in lines] == [1, 2, 3]


def test_a_second_start_trains_nothing_and_changes_nothing(tiny_run):
    before = weights(tiny_run), weights(tiny_run, "teacher.pt")
    lines = (tiny_run / "log.jsonl").read_text().count('"step"')
    fit(tiny_run)
    assert same(before[0], weights(tiny_run)) and same(before[1], weights(tiny_run, "teacher.pt"))
    assert (tiny_run / "log.jsonl").read_text().count('"step"') == lines


def test_stages_in_one_process_are_those_one_by_one(tiny_run, tmp_path):
    train.main([*TINY, "--out", str(tmp_path)])
    assert same(weights(tmp_path), weights(tiny_run))


def test_a_stopped_run_continues_bitwise(tiny_run, tmp_path, monkeypatch):
    """Three updates and three more equal six, for the teacher and for the student with its EMA."""
    step = torch.optim.AdamW.step
    for stop in (3, 4):  # the teacher's fourth update, then the student's fifth

        def interrupted(self, *args, stop=stop, **kwargs):
            if self.state and next(iter(self.state.values()))["step"] >= stop:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path)
        monkeypatch.undo()
        if stop == 3:
            train.main([*TINY, "--out", str(tmp_path), "--stage", "teacher"])
    fit(tmp_path)
    assert same(weights(tmp_path), weights(tiny_run))
    assert same(weights(tmp_path, "teacher.pt"), weights(tiny_run, "teacher.pt"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the kills are delivered to forks")
def test_kills_at_random_moments_do_not_change_the_weights(tmp_path):
    """SIGKILL comes again and again while both stages run and shards are written."""
    flags = [*TINY, "--store=disk", "--chunk=100", "--teacher_steps=20", "--student_steps=20"]
    flags += ["--save_every=1"]
    done = [
        command("tests/kill.py", kills, "0", *flags, f"--out={tmp_path / kills}", timeout=300)
        for kills in ("0", "20")
    ]
    assert [run.returncode for run in done] == [0, 0], done[1].stderr
    killed, moments = map(int, done[1].stdout.split("killed")[1].split())
    assert killed >= 10 and moments >= 8  # in the middle of stages, not between them
    for name in ("teacher.pt", "student.pt"):
        assert same(weights(tmp_path / "0", name), weights(tmp_path / "20", name))


@pytest.mark.skipif(sys.platform != "linux", reason="finds the open file as Linux names it")
@pytest.mark.parametrize("file", ["teacher.pt", "shard-000001.traj", "student.pt"])
def test_a_kill_in_the_middle_of_a_write_leaves_the_old_file_or_none(file, tmp_path):
    """The write is killed after half of the bytes; the next start ends as if nothing happened."""
    script = f"""
import os, signal, sys
sys.path.insert(0, ".")
from tests.conftest import fit
from pathlib import Path
def half(descriptor, sync=os.fsync):
    name = os.readlink(f"/proc/self/fd/{{descriptor}}")
    if "{file}" in name:
        os.truncate(name, os.path.getsize(name) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    sync(descriptor)
os.fsync = half
fit(Path({str(tmp_path)!r}), "--store=disk")
"""
    done = command("-c", script)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not list(tmp_path.rglob(file))
    fit(tmp_path, "--store=disk")
    assert infer.open_run(tmp_path, device="cpu").students.keys() == {""}


def test_two_processes_equal_one(tiny_run, tmp_path, monkeypatch):
    """The gradients of shards average to that of the whole batch, and every sample is evaluated
    once. A teacher that one process began and two finish is that of one process; so is a student
    that two nodes finish."""
    done = command("tests/ddp_worker.py", str(tiny_run), processes=2)
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    *gaps, half = map(float, words[1:9])
    value, distance = map(float, words[10:12])
    assert max(gaps) < 2e-6 and 1e-4 < half < 1e-2  # the latter travelled in bf16
    run = infer.open_run(tiny_run, device="cpu")
    odd = Split(run.task.test.x[:101], run.task.test.y[:101])
    row = evaluate(run, methods(run, NONE), odd, (2,), batch=1)["cdeq"][0]
    assert value == pytest.approx(row["value"]) and distance == pytest.approx(row["distance"])

    step = torch.optim.AdamW.step
    for stage in ("teacher", "student"):
        flags, calls = ["train.py", *TINY, f"--out={tmp_path}"], []

        def interrupted(self, *args, calls=calls, **kwargs):
            calls.append(1)
            if len(calls) > 4:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(torch.optim.AdamW, "step", interrupted)
            train.main([*flags[1:], f"--stage={stage}"])
        finish = [*flags, f"--stage={stage}"]
        if stage == "student":
            on_two_nodes(*finish)
        else:
            done = command(*finish, processes=2)
            assert done.returncode == 0, done.stderr
    # Where a gradient is 0 but for rounding, Adam makes an update of it, of the start's rate.
    for name, atol in (("teacher.pt", 1e-4), ("student.pt", 2e-2)):
        one, two = weights(tiny_run, name), weights(tmp_path, name)
        assert all(torch.allclose(one[key], two[key], atol=atol) for key in one), name
    one, two = (load(folder / "student.pt", "student") for folder in (tiny_run, tmp_path))
    assert one["rho"] == pytest.approx(two["rho"], rel=1e-4) and one["decay"] == two["decay"]


def on_two_nodes(*arguments: str) -> None:
    """Runs a script under two launchers, each with one process whose LOCAL_RANK is 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    launcher += [f"--rdzv_endpoint=127.0.0.1:{port}"]
    options = dict(cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    nodes = [
        subprocess.Popen([*launcher, f"--node_rank={rank}", *arguments], **options)
        for rank in (0, 1)
    ]
    assert [node.wait(timeout=600) for node in nodes] == [0, 0]


@pytest.mark.parametrize("store", ["disk", "rolling"])
def test_every_store_trains(store, tmp_path):
    fit(tmp_path, f"--store={store}", "--cache_gb=0.01")
    assert "decay" in load(tmp_path / "student.pt", "student")


def test_disk_and_memory_train_the_same_student(tmp_path, tiny_run):
    fit(tmp_path, "--store=disk")
    assert same(weights(tmp_path), weights(tiny_run))


@pytest.mark.parametrize(
    "flags",
    [
        ["--dtype=bf16"],
        ["--aa"],
        ["--no-start", "--no-own_injection"],
        ["--kl=0"],
    ],
    ids=" ".join,
)
def test_options_run(flags, tmp_path):
    fit(tmp_path, *flags)
    assert "decay" in load(tmp_path / "student.pt", "student")


def test_a_student_needs_a_teacher(tmp_path):
    with pytest.raises(UsageError, match="has no finished teacher"):
        train.main([*TINY, "--stage=student", f"--out={tmp_path}"])


def test_a_student_of_another_teacher_is_named(tiny_run, tmp_path):
    train.main([*TINY, f"--out={tmp_path}", "--stage=teacher", "--seed=1"])
    (tmp_path / "student.pt").write_bytes((tiny_run / "student.pt").read_bytes())
    with pytest.raises(UsageError, match=r"student.pt was distilled from another teacher"):
        infer.open_run(tmp_path)


def test_a_loss_that_is_not_finite_names_step_and_term_and_keeps_the_last_state(tmp_path):
    """The learning rate is far too high; the checkpoint written before survives."""
    flags = [*TINY, "--teacher_steps=40", "--teacher_lr=1e30", "--clip=1e30", "--save_every=1"]
    with pytest.raises(
        UsageError, match=r"(not finite|is nan|is inf).* at step \d+.*teacher.pt keeps"
    ):
        train.main([*flags, f"--out={tmp_path}"])
    kept = load(tmp_path / "teacher.pt", "teacher")
    assert kept["step"] >= 1


def test_on_a_graph_each_process_draws_its_own_run():
    """All processes have the same input; without this they would all do the same work."""
    net = MDEQ((1, 8, 8), 10, channels=(8,), head=(4,), final=16)
    student = Student(net, TimeMap(rho=0.3, K=6))

    def runs(samples: int) -> set:
        task = SimpleNamespace(train=range(samples), decays=(0.8, 0.9))
        config = SimpleNamespace(rollout_max=50)
        ranks = [SimpleNamespace(rank=r, world=4, task=task, config=config) for r in range(4)]
        draws = [train.draw_run(r, student, torch.Generator().manual_seed(0)) for r in ranks]
        return {tuple(times) for times in draws}

    assert len(runs(1)) == 4 and len(runs(2)) == 1


def test_a_start_trains_at_its_own_rate(tiny_run):
    saved = load(tiny_run / "student.pt", "student")
    slow, fast = (group["lr"] for group in saved["optimizer"]["param_groups"])
    assert fast / slow == pytest.approx(train.START_LR / saved["config"]["student_lr"])
    assert saved["ema"]["start.out.0.weight"].any()


def test_the_depth_of_a_teachers_update():
    """A share of the updates has 1, 2, then 4 layers alone; all later ones have 0 to `before` steps
    first, each number about as often. Seed and step decide, so all processes agree."""
    config, _ = parse(["--growing=0.6", "--layers=4", "--before=3", "--teacher_steps=1000"])
    depths = [train.depth(config, step) for step in range(1000)]
    assert depths[:600] == [(0, 1)] * 200 + [(0, 2)] * 200 + [(0, 4)] * 200
    counts = collections.Counter(depths[600:])
    assert counts.keys() == {(steps, 4) for steps in range(4)} and min(counts.values()) > 70
    assert depths == [train.depth(config, step) for step in range(1000)]
