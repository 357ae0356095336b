"""Image networks against the published ones, and pictures from files."""

import functools
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import infer
import train
from anderson import picard
from checkpoint import UsageError, load
from config import parse
from evidence import rivals
from losses import TeacherBatch, TeacherLoss
from models.__main__ import sizes
from models.mdeq import MDEQ, PRESETS
from models.published import translated
from tasks import images
from tasks.pictures import decoded

from .conftest import command

# A network of the reference's kind with three branches: channels, head, final width.
C, HEAD, FINAL, CLASSES = (8, 16, 24), (4, 6, 8), 32, 10
SMALL = dict(image=(3, 32, 32), classes=CLASSES, channels=C, head=HEAD, final=FINAL)
SMALL |= dict(expansion=2, groups=4, downsample=2, batch_norm=True, weighted=True)


def reference_state() -> dict:
    """Random tensors under the names and of the shapes of locuslab/deq's mdeq.py, mdeq_core.py."""
    torch.manual_seed(0)
    state: dict[str, torch.Tensor] = {}

    def conv(name, c_in, c_out, size, weighted=False, bias=False):
        weight = torch.randn(c_out, c_in, size, size) / (c_in * size**2) ** 0.5
        if weighted:
            state[f"{name}.weight_g"] = torch.rand(c_out, 1, 1, 1) + 0.5
            state[f"{name}.weight_v"] = weight
        else:
            state[f"{name}.weight"] = weight
        if bias:
            state[f"{name}.bias"] = torch.randn(c_out)

    def norm(name, width, batch=False, affine=True):
        if affine:
            state[f"{name}.weight"] = torch.rand(width) + 0.5
            state[f"{name}.bias"] = torch.randn(width) * 0.3
        if batch:
            state[f"{name}.running_mean"] = torch.randn(width) * 0.1
            state[f"{name}.running_var"] = torch.rand(width) + 0.5
            state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    for i, c_in in ((0, 3), (3, C[0])):
        conv(f"downsample.{i}", c_in, C[0], 3), norm(f"downsample.{i + 1}", C[0], True)
    conv("stage0.0", C[0], C[0], 1), norm("stage0.1", C[0], True)
    for i, width in enumerate(C):
        block = f"fullstage.branches.{i}.blocks.0"
        conv(f"{block}.conv1", width, 2 * width, 3, True), norm(f"{block}.gn1", 2 * width)
        conv(f"{block}.conv2", 2 * width, width, 3, True), norm(f"{block}.gn2", width)
        norm(f"{block}.gn3", width)
        post = f"fullstage.post_fuse_layers.{i}"
        conv(f"{post}.conv", width, width, 1, True), norm(f"{post}.gnorm", width)
        for j, source in enumerate(C):
            fuse = f"fullstage.fuse_layers.{i}.{j}.net"
            if j > i:
                conv(f"{fuse}.conv", source, width, 1), norm(f"{fuse}.gnorm", width)
            for k in range(i - j):
                out = width if k == i - j - 1 else source
                conv(f"{fuse}.{k}.conv", source, out, 3), norm(f"{fuse}.{k}.gnorm", out)
        head, incre = HEAD[i], f"incre_modules.{i}.0"
        conv(f"{incre}.conv1", width, head, 1), norm(f"{incre}.bn1", head, True, False)
        conv(f"{incre}.conv2", head, head, 3), norm(f"{incre}.bn2", head, True, False)
        conv(f"{incre}.conv3", head, 4 * head, 1), norm(f"{incre}.bn3", 4 * head, True, False)
        conv(f"{incre}.downsample.0", width, 4 * head, 1)
        norm(f"{incre}.downsample.1", 4 * head, True)
        if i:
            down = f"downsamp_modules.{i - 1}"
            conv(f"{down}.0", 4 * HEAD[i - 1], 4 * head, 3, bias=True)
            norm(f"{down}.1", 4 * head, True)
    conv("final_layer.0", 4 * HEAD[-1], FINAL, 1, bias=True), norm("final_layer.1", FINAL, True)
    state["classifier.weight"] = torch.randn(CLASSES, FINAL)
    state["classifier.bias"] = torch.randn(CLASSES)
    return state


def reference_logits(state: dict, x: torch.Tensor, layers: int) -> torch.Tensor:
    """The published network, written from its own names alone: `layers` steps of f from zero."""

    def conv(name, v, stride=1):
        if f"{name}.weight_g" in state:
            direction = state[f"{name}.weight_v"]
            length = direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            weight = state[f"{name}.weight_g"] * direction / length
        else:
            weight = state[f"{name}.weight"]
        return F.conv2d(v, weight, state.get(f"{name}.bias"), stride, weight.shape[-1] // 2)

    def gn(name, v, groups=4):
        return F.group_norm(v, groups, state[f"{name}.weight"], state[f"{name}.bias"])

    def bn(name, v):
        affine = state.get(f"{name}.weight"), state.get(f"{name}.bias")
        return F.batch_norm(v, state[f"{name}.running_mean"], state[f"{name}.running_var"], *affine)

    def f(z, u):
        y = []
        for i, v in enumerate(z):
            block = f"fullstage.branches.{i}.blocks.0"
            out = F.relu(gn(f"{block}.gn1", conv(f"{block}.conv1", v)))
            out = conv(f"{block}.conv2", out) + (u if i == 0 else 0)
            out = gn(f"{block}.gn2", out) + v
            y.append(gn(f"{block}.gn3", F.relu(out)))
        new = []
        for i in range(len(z)):
            total = 0
            for j, v in enumerate(y):
                fuse = f"fullstage.fuse_layers.{i}.{j}.net"
                if j > i:
                    v = gn(f"{fuse}.gnorm", conv(f"{fuse}.conv", v))
                    v = F.interpolate(v, scale_factor=2 ** (j - i), mode="nearest")
                for k in range(i - j):
                    v = gn(f"{fuse}.{k}.gnorm", conv(f"{fuse}.{k}.conv", v, stride=2))
                    v = F.relu(v) if k < i - j - 1 else v
                total = total + v
            post = f"fullstage.post_fuse_layers.{i}"
            new.append(gn(f"{post}.gnorm", conv(f"{post}.conv", F.relu(total))))
        return new

    for i in (0, 3):
        x = F.relu(bn(f"downsample.{i + 1}", conv(f"downsample.{i}", x, stride=2)))
    u = F.relu(bn("stage0.1", conv("stage0.0", x)))
    side = u.shape[-1]
    z = [torch.zeros(len(x), c, side >> i, side >> i) for i, c in enumerate(C)]
    for _ in range(layers):
        z = f(z, u)
    y = None
    for i, v in enumerate(z):
        name = f"incre_modules.{i}.0"
        out = F.relu(bn(f"{name}.bn1", conv(f"{name}.conv1", v)))
        out = F.relu(bn(f"{name}.bn2", conv(f"{name}.conv2", out)))
        out = bn(f"{name}.bn3", conv(f"{name}.conv3", out))
        out = F.relu(out + bn(f"{name}.downsample.1", conv(f"{name}.downsample.0", v)))
        if y is not None:
            down = f"downsamp_modules.{i - 1}"
            out = out + F.relu(bn(f"{down}.1", conv(f"{down}.0", y, stride=2)))
        y = out
    y = F.relu(bn("final_layer.1", conv("final_layer.0", y))).mean((2, 3))
    return F.linear(y, state["classifier.weight"], state["classifier.bias"])


@pytest.mark.parametrize("prefix", ["", "module."])
def test_published_weights_give_the_published_logits(prefix):
    state = reference_state()
    net = MDEQ(**SMALL).eval()
    net.load_state_dict(translated({prefix + name: value for name, value in state.items()}))
    x = torch.randn(2, 3, 32, 32)
    u = net.inject(x)
    with torch.no_grad():
        for layers in (1, 4):
            z = picard(lambda z: net.f(z, u), net.initial(u), layers, last=True)
            expected = reference_logits(state, x, layers)
            assert (net.head(z) - expected).abs().max() < 1e-4
            assert expected.abs().max() > 1


@pytest.mark.parametrize(
    "preset, parameters, of_f, state, gigaflops",
    [
        ("imagenet-small", 16_808_936, 8_716_192, 188_160, 2.52),
        ("imagenet-small-reg", 18_613_496, 8_715_232, 188_160, 2.52),
        ("imagenet-large", 67_063_624, 54_422_800, 470_400, 15.8),
        ("imagenet-xl", 90_463_280, 77_699_952, 517_440, 22.6),
        ("cifar-large", 11_097_438, 8_715_232, 61_440, 0.82),
        ("cifar-tiny", 158_890, 111_696, 30_720, 0.14),
    ],
)
def test_presets_have_the_published_sizes(preset, parameters, of_f, state, gigaflops):
    found = sizes(preset)
    assert (found["parameters"], found["f"], found["state"]) == (parameters, of_f, state)
    assert found["flops"] / 1e9 == pytest.approx(gigaflops, abs=gigaflops / 200 + 0.005)


def test_weight_norm_is_computed_once_a_solve():
    """The parametrization is cached over the evaluations of a solver."""
    net, calls = MDEQ(**SMALL).eval(), []
    norm = net.cell.blocks[0].conv1.parametrizations.weight[0]
    norm.register_forward_hook(lambda *_: calls.append(1))
    u = net.inject(torch.randn(1, 3, 32, 32))
    picard(lambda z: net.f(z, u), net.initial(u), 5)
    assert len(calls) == 1


def test_dropout_masks_stay_for_a_solve_and_change_with_the_next():
    net = MDEQ(**SMALL | dict(dropout=0.5)).train()
    u = net.inject(torch.randn(2, 3, 32, 32)).detach()
    z = torch.randn(2, sum(net.cell.sizes))
    with torch.no_grad():
        first = net.f(z, u)
        assert torch.equal(net.f(z, u), first)
        net.redraw()
        assert not torch.equal(net.f(z, u), first)


def test_a_network_without_a_solver_differentiates_every_layer():
    """The unrolled loss is that of `layers` Picard steps, and its gradient autograd's."""
    net, x, y = MDEQ(**SMALL).eval(), torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    TeacherLoss(net)(TeacherBatch(x, y, steps=0, layers=3))["task"].backward()
    found = net.cell.blocks[1].conv2.parametrizations.weight.original1.grad.clone()
    net.zero_grad()
    u = net.inject(x)
    z = net.initial(u)
    for _ in range(3):
        z = net.f(z, u)
    F.cross_entropy(net.head(z), y).backward()
    assert torch.allclose(
        found, net.cell.blocks[1].conv2.parametrizations.weight.original1.grad, atol=1e-6
    )


def test_training_memory_is_independent_of_the_solver():
    """What autograd keeps for the backward pass is the same after 2 solver steps and after 9."""
    net, x, y = MDEQ(**SMALL).train(), torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    kept = []
    for steps in (2, 9):
        sizes = []
        pack = lambda v, sizes=sizes: sizes.append(v.numel()) or v  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
            TeacherLoss(net)(TeacherBatch(x, y, steps, layers=1))
        kept.append(sum(sizes))
    assert kept[0] == kept[1] > x.numel()


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Twenty random pictures of two classes to train on, four to test, of several sizes."""
    root = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for part, n in (("train", 10), ("val", 2)):
        for label in ("n01", "n02"):
            folder = root / part / label
            folder.mkdir(parents=True)
            for i in range(n):
                size = (40 + i, 36)
                pixels = torch.randint(256, (*size[::-1], 3), generator=generator).byte().numpy()
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


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


def test_accumulated_parts_are_the_whole_batch(tmp_path):
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
    """--teacher FILE distils a state dict of the reference, inside a larger checkpoint or not."""
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


def test_a_picture_is_the_same_however_its_file_tells_it(tmp_path):
    """8 and 16 bits, floats, turned by its EXIF tag; what is transparent is white."""
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
def test_folders_that_are_not_as_they_should_be(spoil, complaint, tmp_path, tree):
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


@pytest.mark.parametrize("name", ["alexnet", "googlenet", "resnet34"])
def test_references_classify_pictures(name, tree):
    task = images.imagenette(tree, image_size=64)
    net = task.explicit(name, {}).eval()
    x, y = task.test.batch(torch.arange(4))
    assert net(x).shape == (4, 2) and net.nll(x, y).shape == (4,)
    with pytest.raises(UsageError, match="no such network"):
        task.explicit("nonsense", {})


def test_rows_of_foreign_weights_say_so(tree, tmp_path, monkeypatch):
    """NAME-pretrained stores torchvision's weights untrained, and the table names them."""
    net = images.vision("alexnet", {}, 2)
    monkeypatch.setattr(images, "vision", lambda name, settings, classes: net)
    flags = ["--task=imagenette", f"--data={tree}", f"--out={tmp_path}", "--store=memory"]
    flags += ["--image_size=64", *(flag for flag in TINY if "image_size" not in flag)]
    rivals.main(["explicit-alexnet-pretrained", *flags])
    train.main(flags)
    assert "| alexnet-pretrained |" in (tmp_path / "report.md").read_text()


def test_top_five_counts_the_five_likeliest():
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
    """Equal pictures: at most one in twenty."""
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
