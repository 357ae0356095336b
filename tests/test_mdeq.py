"""The multiscale DEQ against the published network.

Published weights give the logits of the published network; presets have its sizes.
Weight normalisation is computed once per solve; a dropout mask lasts for one solve.
"""

import pytest
import torch
import torch.nn.functional as F

from anderson import picard
from losses import TeacherBatch, TeacherLoss
from models.__main__ import sizes
from models.mdeq import MDEQ
from models.published import translated

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
    """The published network, written with its own names alone: `layers` steps of f from 0."""

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


def test_weight_norm_is_computed_once_per_solve():
    """The parametrization is cached over the evaluations of a solver."""
    net, calls = MDEQ(**SMALL).eval(), []
    norm = net.cell.blocks[0].conv1.parametrizations.weight[0]
    norm.register_forward_hook(lambda *_: calls.append(1))
    u = net.inject(torch.randn(1, 3, 32, 32))
    picard(lambda z: net.f(z, u), net.initial(u), 5)
    assert len(calls) == 1


def test_a_dropout_mask_lasts_for_one_solve():
    net = MDEQ(**SMALL | dict(dropout=0.5)).train()
    u = net.inject(torch.randn(2, 3, 32, 32)).detach()
    z = torch.randn(2, sum(net.cell.sizes))
    with torch.no_grad():
        first = net.f(z, u)
        assert torch.equal(net.f(z, u), first)
        net.redraw()
        assert not torch.equal(net.f(z, u), first)


def test_a_network_without_a_solver_differentiates_every_layer():
    """The loss without evaluations before the layers, and its gradient, are those of an ordinary
    network of `layers` layers."""
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
