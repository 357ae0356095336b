"""Image tasks: pictures from files, and published teachers.

Held-out pictures are never trained on; a random view depends on its seed alone.
A picture is read the same from any file format; damaged ones are refused or skipped.
"""

import functools
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import infer
import train
from checkpoint import UsageError, load
from config import parse
from models.mdeq import PRESETS
from tasks import images
from tasks.pictures import decoded

from .conftest import command
from .test_mdeq import FINAL, SMALL, reference_state

TINY = ["--teacher_steps=3", "--growing=0.3", "--student_steps=2", "--batch=4", "--K=4"]
TINY += ["--before=2", "--image_size=32", "--workers=0", "--device=cpu", "--chunk=4"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--store=memory"],
        ["--store=rolling", "--cache_gb=0.02", "--accumulate=2"],
        ["--optimizer=sgd", "--store=disk", "--dtype=bf16", "--workers=1"],
    ],
)
def test_photographs_train(flags, tree, tmp_path, capsys):
    out = tmp_path / "run"
    train.main(["--task=imagenette", f"--data={tree}", f"--out={out}", *TINY, *flags])
    printed = capsys.readouterr().out
    assert "cdeq" in printed and (out / "report.json").exists()
    shares = [int(share) for share in re.findall(r"solves took (\d+)% of the time", printed)]
    assert len(shares) == ("--store=rolling" in flags) and all(share <= 100 for share in shares)


def test_two_processes_train_on_photographs(tree, tmp_path):
    done = command(
        "train.py", "--task=imagenette", f"--data={tree}", f"--out={tmp_path}", *TINY,
        "--store=rolling", "--cache_gb=0.02", processes=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.json").exists()


def test_accumulated_micro_batches_are_the_whole_batch(tmp_path):
    """Without batch statistics, two halves of a batch give the update of the batch."""
    weights = []
    for parts in (1, 2):
        out = tmp_path / str(parts)
        flags = ["--teacher_steps=3", "--before=3", "--batch=16", "--optimizer=sgd"]
        train.main(["--stage=teacher", f"--out={out}", f"--accumulate={parts}", *flags])
        weights.append(load(out / "teacher.pt", "teacher")["model"])
    for name in weights[0]:
        assert torch.allclose(weights[0][name], weights[1][name], atol=1e-4), name


def test_a_published_teacher_is_taken_over(tmp_path, tree, monkeypatch):
    """--teacher FILE takes a state dict of the reference code, alone or within a checkpoint; and a
    teacher.pt of another run."""
    monkeypatch.setitem(PRESETS, "imagenette", SMALL)
    file, out = tmp_path / "published.pkl", tmp_path / "run"
    torch.save({"epoch": 3, "state_dict": reference_state()}, file)
    train.main(["--task=imagenette", f"--data={tree}", f"--out={out}", f"--teacher={file}", *TINY])
    saved = load(out / "teacher.pt", "teacher")
    assert saved["source"] == str(file)
    weight = saved["model"]["injection.0.weight"]
    assert torch.equal(weight, reference_state()["downsample.0.weight"])
    state = reference_state()
    state["downsample.0.weight"][0] = torch.nan
    torch.save(state, file)
    spoilt = ["--task=imagenette", f"--data={tree}", f"--out={tmp_path / 'b'}", f"--teacher={file}"]
    with pytest.raises(UsageError, match="weight has numbers that are not finite"):
        train.main([*spoilt, *TINY])
    with pytest.raises(UsageError, match="has another teacher; choose another --out"):
        train.main(["--task=imagenette", f"--data={tree}", f"--out={out}", "--teacher=b", *TINY])
    again = tmp_path / "again"
    flags = [f"--teacher={out / 'teacher.pt'}", "--stage=teacher", *TINY]
    train.main(["--task=imagenette", f"--data={tree}", f"--out={again}", *flags])
    assert torch.equal(load(again / "teacher.pt", "teacher")["model"]["injection.0.weight"], weight)


def lacking(state):
    del state["stage0.0.weight"]


def foreign(state):
    state["fullstage.extra"] = torch.zeros(1)


def misshapen(state):
    state["classifier.weight"] = torch.zeros(7, FINAL)


def code(state):
    state["run"] = print


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lacking, r"lacks 1 tensors, first injection\.6\.weight"),
        (foreign, r"has besides 1 tensors, first fullstage\.extra"),
        (misshapen, r"last\.5\.weight is \[7, 32\] there, \[10, 32\] here"),
        (code, "holds no plain tensors|is no dict of tensors"),
    ],
)
def test_foreign_teachers_are_named(change, complaint, tmp_path, tree, monkeypatch):
    monkeypatch.setitem(PRESETS, "imagenette", SMALL)
    file, state = tmp_path / "published.pkl", reference_state()
    change(state)
    torch.save(state, file)
    flags = [f"--data={tree}", f"--out={tmp_path}", f"--teacher={file}", "--stage=teacher", *TINY]
    with pytest.raises(UsageError, match=complaint):
        train.main(["--task=imagenette", *flags])


def test_the_held_out_pictures_are_never_trained_on(tree):
    task = images.imagenette(tree, image_size=32)
    train_rows, valid_rows = set(task.train.rows.tolist()), set(task.valid.rows.tolist())
    assert len(train_rows) == 18 and len(valid_rows) == 2 and not train_rows & valid_rows
    assert len(task.test) == 4


def test_a_view_depends_on_its_seed_alone(tree):
    split = images.imagenette(tree, image_size=32).train
    rows, seeds = torch.tensor([3, 3, 5]), torch.tensor([7, 8, 7])
    x, _ = split.batch(rows, seeds)
    assert not torch.equal(x[0], x[1])
    assert torch.equal(split.batch(rows[[2, 0]], seeds[[2, 0]])[0], x[[2, 0]])
    streamed = list(split.stream([(rows, seeds)], workers=1))
    assert torch.equal(streamed[0][0], x)


def test_damaged_pictures_are_refused_or_skipped(tree, tmp_path, capsys):
    root = tmp_path / "damaged"
    for file in tree.rglob("*.png"):
        copy = root / file.relative_to(tree)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    for bad in (root / "train" / "n01" / "0.png", root / "val" / "n02" / "1.png"):
        bad.write_bytes(b"no picture")
    refusing = images.imagenette(root, image_size=32)
    with pytest.raises(UsageError, match=r"val/n02/1\.png is not a readable image.*--unreadable"):
        list(refusing.test.stream([(torch.arange(4),)]))
    skipping = images.imagenette(root, image_size=32, unreadable="skip")
    (x, y), *_ = skipping.test.stream([(torch.arange(4),)])
    assert len(x) == len(y) == 3
    every = torch.arange(len(skipping.train))
    held = len({0} & set(skipping.train.rows.tolist()))
    assert len(skipping.train.batch(every, every)[0]) == len(every)
    assert capsys.readouterr().err.count("skipped") == 1 + held


def test_the_fingerprint_of_pictures_is_of_their_names(tree, tmp_path):
    shutil.copytree(tree, tmp_path, dirs_exist_ok=True)
    before = images.imagenette(tmp_path, image_size=32).fingerprint()
    assert before == images.imagenette(tree, image_size=32).fingerprint()
    next((tmp_path / "train").rglob("*.png")).rename(tmp_path / "train" / "n01" / "new.png")
    assert images.imagenette(tmp_path, image_size=32).fingerprint() != before


def test_a_picture_is_read_the_same_from_any_format(tmp_path):
    """8 and 16 bits, floats, an EXIF tag that turns the picture; transparent pixels are white."""
    light = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    plain = Image.fromarray((light * 255).astype(np.uint8))
    plain.save(tmp_path / "plain.png")
    Image.fromarray((light * 65535).astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(light).save(tmp_path / "float.tiff")
    tag = Image.Exif()
    tag[0x0112] = 3  # upside down
    plain.rotate(180).save(tmp_path / "turned.png", exif=tag)
    first, *others = (np.asarray(decoded(file, "L")) for file in sorted(tmp_path.iterdir()))
    assert all((np.abs(first.astype(int) - other) <= 1).all() for other in others)
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (np.asarray(decoded(tmp_path / "clear.png")) == 255).all()


def test_a_split_without_a_readable_picture_is_named_before_training(tree, tmp_path):
    shutil.copytree(tree, tmp_path, dirs_exist_ok=True)
    for file in (tmp_path / "val").rglob("*.png"):
        file.write_bytes(b"no picture")
    with pytest.raises(UsageError, match="of 4 pictures to test, none can be read"):
        images.imagenette(tmp_path, image_size=32, unreadable="skip")


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (lambda root: None, r"val is missing"),
        (lambda root: (root / "val" / "n01").mkdir(parents=True), r"Found no valid file"),
    ],
)
def test_missing_and_empty_folders_are_named(spoil, complaint, tmp_path, tree):
    (tmp_path / "train").symlink_to(tree / "train")
    spoil(tmp_path)
    with pytest.raises(UsageError, match=complaint):
        images.imagenette(tmp_path)


def test_class_folders_that_differ_are_named(tmp_path, tree):
    (tmp_path / "train").symlink_to(tree / "train")
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "n01").symlink_to(tree / "val" / "n01")
    (tmp_path / "val" / "n09").symlink_to(tree / "val" / "n02")
    with pytest.raises(UsageError, match=r"same class folders, 2 are in one alone: n02, n09"):
        images.imagenet(tmp_path)


def test_sides_that_cannot_be_halved_are_refused(tree):
    with pytest.raises(UsageError, match="divisible by 16, got 40 x 40"):
        config, task = parse(["--task=imagenette", f"--data={tree}", "--image_size=40"])
        task.network({"preset": config.preset})


def test_top_five_accuracy_counts_the_five_likeliest_classes():
    logits = torch.arange(10.0).repeat(3, 1)
    y = torch.tensor([9, 5, 4])
    assert images.accuracy(logits, y).tolist() == [100, 0, 0]
    assert functools.partial(images.accuracy, k=5)(logits, y).tolist() == [100, 100, 0]


def test_answers_on_a_users_picture(tree, tmp_path, capsys):
    out = tmp_path / "run"
    train.main(["--task=imagenette", f"--data={tree}", f"--out={out}", *TINY, "--store=memory"])
    capsys.readouterr()
    file = next((tree / "val" / "n01").iterdir())
    infer.main([f"--run={out}", "--nfe", "2", "--files", str(file)])
    assert capsys.readouterr().out.startswith(f"{file}: n0")


def test_no_digit_is_tested_that_was_trained():
    """At most one held-out picture in twenty equals a trained one."""
    (train, _), *rest = images.scans()
    for x, _ in rest:
        equal = (x.flatten(1)[:, None] == train.flatten(1)[None]).all(2).any(1)
        assert equal.float().mean() <= 0.05


def test_hard_digits_are_ten_fixed_views_of_each_picture():
    task = images.digits_hard(None)
    assert len(task.test) == 10 * 500 and len(task.valid) == 10 * 200 and task.test.draws == 10
    assert (task.test.y.view(500, 10) == task.test.y.view(500, 10)[:, :1]).all()
    views = task.test.x.view(500, 10, 64)
    assert not torch.equal(views[:, 0], views[:, 1])
    images.digits_hard.cache_clear()
    assert torch.equal(images.digits_hard(None).test.x, task.test.x)
