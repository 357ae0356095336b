"""Training: resuming, several processes, the stores, and what bad input says."""

import collections
import json
import math
import os
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest
import torch

import infer
import losses
import train
from checkpoint import UsageError, load
from config import parse
from evidence import rivals, tables
from evidence.evaluate import evaluate
from evidence.measure import measure
from evidence.merge import merge
from evidence.methods import methods
from fpode import TimeMap
from losses import TeacherLoss
from models.mdeq import MDEQ
from student import Student
from tasks import Split

from .conftest import NONE, TINY, command, fit


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
    """3 + 3 steps equal 6, for the teacher and the student with its EMA and optimizer."""
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
    """SIGKILL again and again while both stages run and shards are written."""
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


def test_two_processes_equal_one(tiny_run, tmp_path):
    """Gradients of shards average to the gradient of all; every sample is evaluated once; a run
    that one process began is finished by two, to the same weights."""
    done = command("tests/ddp_worker.py", str(tiny_run), processes=2)
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    gaps, (value, distance) = map(float, words[1:7]), map(float, words[8:10])
    assert max(gaps) < 2e-6
    run = infer.open_run(tiny_run, device="cpu")
    odd = Split(run.task.test.x[:101], run.task.test.y[:101])
    row = evaluate(run, methods(run, NONE), odd, (2,), batch=1)["cdeq"][0]
    assert value == pytest.approx(row["value"]) and distance == pytest.approx(row["distance"])

    flags = [*TINY, "--stage=teacher", f"--out={tmp_path}"]
    step, calls = torch.optim.AdamW.step, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > 4:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    torch.optim.AdamW.step = interrupted
    try:
        with pytest.raises(KeyboardInterrupt):
            train.main(flags)
    finally:
        torch.optim.AdamW.step = step
    for stage in ("teacher", "student"):
        done = command("train.py", *TINY, f"--stage={stage}", f"--out={tmp_path}", processes=2)
        assert done.returncode == 0, done.stderr
    one, two = weights(tiny_run, "teacher.pt"), weights(tmp_path, "teacher.pt")
    assert all(torch.allclose(one[key], two[key], atol=1e-4) for key in one)
    assert infer.open_run(tmp_path, device="cpu").students.keys() == {""}


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


def test_flags_win_over_recipes_and_recipes_over_defaults():
    config, _ = parse(["--recipe=paper", "--student_lr=0.1"])
    assert (config.start, config.aa, config.student_lr) == (False, True, 0.1)
    assert (config.name, config.out, config.preset) == ("paper", "runs/digits", "digits")


@pytest.mark.parametrize(
    "flags, complaint",
    [
        ("--task imagenot", "--task imagenot: allowed is digits"),
        ("--recipe letter", "--recipe letter: allowed is own-run . paper"),
        ("--preset huge", "--preset huge: allowed is digits"),
        ("--frobnicate 3", "unrecognized arguments: --frobnicate 3"),
        ("--student_step 3", "unrecognized arguments: --student_step 3"),
        ("--batch many", "argument --batch: invalid int value"),
        ("--m 0", "--m 0: allowed is >= 1"),
        ("--clip 0", "--clip 0.0: allowed is > 0"),
        (f"--batch {10**23}", "--batch 100000000000000000000000: allowed is >= 1"),
        ("--workers 1000000000", "--workers 1000000000: allowed is >= 0 and <= 256"),
        ("--lam1 1.5", "--lam1 1.5: allowed is >= 0 and <= 1"),
        ("--K 1", "--K 1: allowed is >= 2"),
        ("--direct 2", "unrecognized arguments: --direct 2"),
        ("--layers 0", "--layers 0: allowed is >= 1 and <= 16"),
        ("--student_lr nan", "--student_lr nan: allowed is > 0"),
        ("--kl 2", "--kl 2.0: allowed is >= 0 and <= 1"),
        ("--name ../x", "--name .*allowed are letters"),
        ("--device gpu", "--device gpu: allowed is auto . cpu . cuda"),
        ("--device cuda", "no CUDA device is there"),
    ],
)
def test_bad_flags_say_what_is_allowed(flags, complaint, tmp_path):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("this machine has the device that the test misses")
    with pytest.raises(UsageError, match=complaint):
        train.main([*flags.split(), f"--out={tmp_path}"])


def test_a_batch_that_the_processes_cannot_share_is_refused(monkeypatch, tmp_path):
    for value in ("abc", "0"):
        monkeypatch.setenv("WORLD_SIZE", value)
        with pytest.raises(UsageError, match=f"WORLD_SIZE={value}: torchrun sets it to a number"):
            train.main([*TINY, f"--out={tmp_path}"])
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UsageError, match="--batch 16 is not divisible by 3 processes"):
        train.main([*TINY, f"--out={tmp_path}"])


@pytest.mark.parametrize(
    "flag, complaint",
    [
        ("--teacher_lr=0.5", "teacher.pt was made with --teacher_lr 0.003, not 0.5"),
        ("--seed=7", "teacher.pt was made with --seed 0, not 7"),
        ("--lam1=0.1", "student.pt was made with --lam1 0.8, not 0.1"),
    ],
)
def test_a_run_folder_of_another_configuration_is_refused(flag, complaint, tiny_run):
    with pytest.raises(UsageError, match=complaint):
        train.main([*TINY, f"--out={tiny_run}", flag])


def test_a_student_needs_a_teacher(tmp_path):
    with pytest.raises(UsageError, match="has no finished teacher"):
        train.main([*TINY, "--stage=student", f"--out={tmp_path}"])


def spoilt_checkpoints(good: bytes):
    return {
        "empty": b"",
        "truncated": good[: len(good) // 2],
        "flipped": good[:-100] + bytes([good[-100] ^ 1]) + good[-99:],
        "foreign": b"PK\x03\x04 something else entirely, but long enough to have a checksum",
    }


@pytest.mark.parametrize("kind", ["empty", "truncated", "flipped", "foreign"])
def test_a_spoilt_checkpoint_is_named_with_what_to_do(kind, tiny_run, tmp_path):
    raw = spoilt_checkpoints((tiny_run / "teacher.pt").read_bytes())[kind]
    (tmp_path / "teacher.pt").write_bytes(raw)
    with pytest.raises(UsageError, match=r"teacher.pt is truncated, damaged.*delete it"):
        train.main([*TINY, f"--out={tmp_path}"])


def test_a_checkpoint_of_the_wrong_kind_is_named(tiny_run, tmp_path):
    (tmp_path / "teacher.pt").write_bytes((tiny_run / "student.pt").read_bytes())
    with pytest.raises(UsageError, match=r"is a student checkpoint, not a teacher"):
        train.main([*TINY, f"--out={tmp_path}"])


def test_a_student_of_another_teacher_is_named(tiny_run, tmp_path):
    train.main([*TINY, f"--out={tmp_path}", "--stage=teacher", "--seed=1"])
    (tmp_path / "student.pt").write_bytes((tiny_run / "student.pt").read_bytes())
    with pytest.raises(UsageError, match=r"student.pt was distilled from another teacher"):
        infer.open_run(tmp_path)


def test_a_loss_that_is_not_finite_names_step_and_term_and_keeps_the_last_state(tmp_path):
    """A learning rate far too high; the checkpoint before it survives."""
    flags = [*TINY, "--teacher_steps=40", "--teacher_lr=1e30", "--clip=1e30", "--save_every=1"]
    with pytest.raises(
        UsageError, match=r"(not finite|is nan|is inf).* at step \d+.*teacher.pt keeps"
    ):
        train.main([*flags, f"--out={tmp_path}"])
    kept = load(tmp_path / "teacher.pt", "teacher")
    assert kept["step"] >= 1


def test_a_full_disk_keeps_what_was_saved(tmp_path, monkeypatch):
    sync, calls = os.fsync, []

    def full(descriptor):
        calls.append(1)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UsageError, match=r"cannot write .*teacher.pt: No space left on device"):
        train.main([*TINY, f"--out={tmp_path}"])
    monkeypatch.undo()
    assert load(tmp_path / "teacher.pt", "teacher")["step"] == 2
    assert not list(tmp_path.glob(".*.tmp"))


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match="cannot write there"):
        train.main([*TINY, f"--out={tmp_path / 'file' / 'run'}"])


def test_bad_input_is_one_line_and_exit_code_two():
    done = command("train.py", "--task", "imagenot")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("train.py: --task imagenot: allowed is digits | ")
    assert len(done.stderr.splitlines()) == 1


def test_ranks_make_runs_of_their_own_where_there_is_one_sample():
    """On a graph all ranks have the same input: without this they would all do the same work."""
    net = MDEQ((1, 8, 8), 10, channels=(8,), head=(4,), final=16)
    student = Student(net, TimeMap(rho=0.3, K=6))

    def runs(samples: int) -> set:
        task = SimpleNamespace(train=range(samples), decays=(0.8, 0.9))
        config = SimpleNamespace(rollout_max=50)
        ranks = [SimpleNamespace(rank=r, world=4, task=task, config=config) for r in range(4)]
        draws = [train.draw_run(r, student, torch.Generator().manual_seed(0)) for r in ranks]
        return {tuple(times) for times in draws}

    assert len(runs(1)) == 4 and len(runs(2)) == 1


def test_the_task_loss_weighs_one_on_average():
    """App. B.4: early steps only, whatever K."""
    for K in (5, 20):
        k = torch.arange(1, K + 1)
        weights = losses.early(K, k)
        assert weights.mean().item() == pytest.approx(1)
        assert (weights > 0).sum() == math.ceil(K / 4) and (weights.diff() <= 0).all()


def test_a_start_trains_at_its_own_rate(tiny_run):
    saved = load(tiny_run / "student.pt", "student")
    slow, fast = (group["lr"] for group in saved["optimizer"]["param_groups"])
    assert fast / slow == pytest.approx(train.START_LR / saved["config"]["student_lr"])
    assert saved["ema"]["start.out.0.weight"].any()


def test_a_direct_network_is_cut_off_and_trained_from_z0(tiny_run, tmp_path, monkeypatch):
    """direct-J: J layers in every update, as many updates as teacher and student together;
    one that was begun is finished, one of other updates is refused; its row counts J."""
    folder, seen, forward = tmp_path / "run", [], TeacherLoss.forward

    def watched(self, batch):
        seen.append((batch.steps, batch.layers))
        return forward(self, batch)

    monkeypatch.setattr(TeacherLoss, "forward", watched)
    shutil.copytree(tiny_run, folder)
    flags = ["direct-2", *TINY, f"--out={folder}"]
    rivals.main(flags)
    assert seen == [(0, 2)] * 12
    rivals.main(flags)
    assert len(seen) == 12
    with pytest.raises(UsageError, match="has updates 12, not 13; delete it"):
        rivals.main([*flags, "--student_steps=7"])

    run = infer.open_run(folder, device="cpu")
    found = rivals.open_rivals(run)
    assert [*found.direct] == [2]
    report = merge([measure(run, found)])
    assert "| direct |  | " in tables.write(report, tmp_path / "table")
    rows = {(row["method"], row["nfe"]): row for row in report["rows"]}
    x, y = run.task.test.batch(torch.arange(500))
    net = found.direct[2]
    u = net.inject(x)
    right = net.head(net.f(net.f(net.initial(u), u), u)).argmax(1) == y
    assert rows["direct", 2]["value"] == pytest.approx(100 * right.float().mean().item())
    assert "vs_direct" in rows["cdeq", 2] and "vs_direct" not in rows["cdeq", 1]
    assert "vs_direct" not in rows["direct", 2] and "vs_teacher" in rows["direct", 2]


def test_the_depth_of_a_teachers_update():
    """A growing share on 1, 2, 4 layers without steps before; then 0 to `before` steps, each number
    drawn about as often, the same on every rank since nothing but the seed and the step decides."""
    config, _ = parse(["--growing=0.6", "--layers=4", "--before=3", "--teacher_steps=1000"])
    depths = [train.depth(config, step) for step in range(1000)]
    assert depths[:600] == [(0, 1)] * 200 + [(0, 2)] * 200 + [(0, 4)] * 200
    counts = collections.Counter(depths[600:])
    assert counts.keys() == {(steps, 4) for steps in range(4)} and min(counts.values()) > 70
    assert depths == [train.depth(config, step) for step in range(1000)]
