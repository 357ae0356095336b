"""The DEQ-Transformer against the published network, and causality.

Published weights give the published losses.
A later word never changes an earlier loss, with any solver and the student.
A memory at its equilibrium equals one longer segment.
"""

import math

import pytest
import torch
import torch.nn.functional as F

import infer
from anderson import anderson, picard
from fpode import TimeMap
from losses import Distillation, OwnRun, OwnRunBatch, TrajectoryBatch, distance
from models.__main__ import sizes
from models.adaptive import AdaptiveEmbedding, AdaptiveSoftmax
from models.published import translated
from models.transformer import DEQTransformer
from models.transformer import shift as relative_shift
from student import Student

# A network of the reference's kind: width, heads, inner width, words, cutoffs.
D, HEADS, INNER, WORDS, CUTS = 32, 4, 48, 60, (20, 30, 45)
SMALL = dict(words=WORDS, d=D, heads=HEADS, inner=INNER, cutoffs=CUTS, segment=5, memory=5)


def transformer(seed=0, **options) -> DEQTransformer:
    """A network with random weights that depends more on its input than on its state, so that it
    contracts."""
    torch.manual_seed(seed)
    net = DEQTransformer(**SMALL | dict(std=0.2 / D**0.5) | options).eval()
    net.injection.linear.weight.data *= 200
    net.cell.qkv.parametrizations.weight.original0.data *= 0.1
    net.cell.out.parametrizations.weight.original0.data *= 20
    net.cell.narrow.parametrizations.weight.original0.data *= 0.3
    return net


def words(rows: int, length: int, seed=0) -> torch.Tensor:
    return torch.randint(WORDS, (rows, length), generator=torch.Generator().manual_seed(seed))


def reference_state() -> dict:
    """Random tensors under the names and of the shapes of locuslab/deq's deq_transformer.py."""
    torch.manual_seed(1)
    state = {"pos_emb.inv_freq": torch.zeros(D // 2)}
    sizes_ = [(count, max(1, D // 4**i)) for i, count in enumerate((20, 10, 15, 15))]
    for i, (count, width) in enumerate(sizes_):
        state[f"word_emb.emb_layers.{i}.weight"] = torch.randn(count, width) * 0.3
        state[f"crit.out_layers.{i}.weight"] = state[f"word_emb.emb_layers.{i}.weight"]
        state[f"crit.out_layers.{i}.bias"] = torch.randn(count)
        state[f"word_emb.emb_projs.{i}.weight"] = torch.randn(D, width) * 0.3
        state[f"crit.out_projs.{i}.weight"] = torch.randn(D, width) * 0.3
    state["crit.cluster_weight"], state["crit.cluster_bias"] = torch.randn(3, D), torch.randn(3)
    state["inject_conv.weight"] = torch.randn(3 * D, D, 1) * 0.1
    state["inject_conv.bias"] = torch.randn(3 * D) * 0.1
    for name in ("r_w_bias", "r_r_bias"):
        state[f"func.dec_attn.{name}"] = torch.randn(HEADS, D // HEADS)
    shapes = {"dec_attn.qkv_net": (3 * D, D, 1), "dec_attn.r_net": (D, D, 1)}
    shapes |= {"dec_attn.o_net": (D, D, 1), "pos_ff.ff1_net": (INNER, D)}
    shapes |= {"pos_ff.ff2_net": (D, INNER)}
    for name, shape in shapes.items():
        state[f"func.{name}.weight_g"] = torch.rand(shape[0], *[1] * (len(shape) - 1)) + 0.5
        state[f"func.{name}.weight_v"] = torch.randn(shape)
        if name not in ("dec_attn.qkv_net", "dec_attn.r_net"):
            state[f"func.{name}.bias"] = torch.randn(shape[0]) * 0.1
    return state


def reference_losses(state, segments, targets, layers, pre_norm):
    """Losses (B, L) of the last segment; the memory of each segment is the states and the injection
    of the one before. Written position by position, with the published names alone."""

    def weight(name):
        v, g = state[f"func.{name}.weight_v"], state[f"func.{name}.weight_g"]
        return (v.flatten(1) / v.flatten(1).norm(dim=1, keepdim=True)) * g.view(-1, 1)

    def embed(x):
        out = torch.zeros(*x.shape, D)
        for i, start in enumerate((0, 20, 30, 45)):
            table = state[f"word_emb.emb_layers.{i}.weight"]
            here = (x >= start) & (x < start + len(table))
            out[here] = table[x[here] - start] @ state[f"word_emb.emb_projs.{i}.weight"].T
        return out * math.sqrt(D)

    def f(z, u, old):
        c, M = torch.cat([old, z], 1), old.shape[1]
        c = F.layer_norm(c, (D,)) if pre_norm else c
        q, k, v = (
            (c @ weight("dec_attn.qkv_net").T + u).view(len(z), -1, 3, HEADS, D // HEADS).unbind(2)
        )
        frequency = 1 / 10000 ** (torch.arange(0, D, 2) / D)
        out = torch.zeros(len(z), z.shape[1], HEADS, D // HEADS)
        for i in range(z.shape[1]):
            scores = []
            for j in range(i + M + 1):
                angle = (i + M - j) * frequency
                r = weight("dec_attn.r_net") @ torch.cat([angle.sin(), angle.cos()])
                content = ((q[:, i + M] + state["func.dec_attn.r_w_bias"]) * k[:, j]).sum(-1)
                place = (q[:, i + M] + state["func.dec_attn.r_r_bias"]) * r.view(HEADS, -1)
                scores.append((content + place.sum(-1)) / math.sqrt(D // HEADS))
            share = torch.stack(scores, 1).softmax(1)
            out[:, i] = (share[..., None] * v[:, : i + M + 1]).sum(1)
        y = out.flatten(2) @ weight("dec_attn.o_net").T + state["func.dec_attn.o_net.bias"] + z
        y = F.layer_norm(y, (D,))
        inner = F.relu(y @ weight("pos_ff.ff1_net").T + state["func.pos_ff.ff1_net.bias"])
        y = y + inner @ weight("pos_ff.ff2_net").T + state["func.pos_ff.ff2_net.bias"]
        return y if pre_norm else F.layer_norm(y, (D,))

    old, u_old = torch.zeros(len(targets), 0, D), torch.zeros(len(targets), 0, 3 * D)
    for x in segments:
        new = embed(x) @ state["inject_conv.weight"][..., 0].T + state["inject_conv.bias"]
        u, z = torch.cat([u_old, new], 1), torch.zeros(*x.shape, D)
        for _ in range(layers):
            z = f(z, u, old)
        old, u_old = z, new

    def scores(i):
        bias = state[f"crit.out_layers.{i}.bias"]
        return (
            z @ state[f"crit.out_projs.{i}.weight"] @ state[f"crit.out_layers.{i}.weight"].T + bias
        )

    clusters = z @ state["crit.out_projs.0.weight"] @ state["crit.cluster_weight"].T
    head = torch.cat([scores(0), clusters + state["crit.cluster_bias"]], -1).log_softmax(-1)
    tails = [scores(i).log_softmax(-1) + head[..., -i, None] for i in (1, 2, 3)]
    return -torch.cat([head[..., :20], *tails], -1).gather(-1, targets[..., None])[..., 0]


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_published_weights_give_the_published_losses(prefix, pre_norm):
    """With the same weights, words and steps, every word has the same loss, whatever the memory."""
    state = reference_state()
    net = DEQTransformer(**SMALL | dict(pre_norm=pre_norm)).eval()
    net.load_state_dict(translated({prefix + name: value for name, value in state.items()}))
    first, second, y = words(2, 5), words(2, 5, seed=1), words(2, 5, seed=2)
    for layers in (1, 4):
        memory = None
        for segments in ([first], [first, second]):
            with torch.no_grad():
                u = net.inject(segments[-1], memory)
                z = picard(lambda z, u=u: net.f(z, u), net.initial(u), layers, last=True)
                found = net.softmax.nll(z.flatten(0, 1), y.flatten()).view_as(y)
            expected = reference_losses(state, segments, y, layers, pre_norm)
            assert (found - expected).abs().max() < 1e-4
            memory = net.remember(u, z)


@pytest.mark.parametrize("preset", ["transformer-103", "transformer-103-pre-ln"])
def test_presets_have_the_published_sizes(preset):
    found = sizes(preset)
    assert (found["parameters"], found["f"]) == (97_851_488, 69_753_000)
    assert found["state"] == 105_000
    assert found["flops"] / 1e9 == pytest.approx(21.7, rel=0.02)


def test_shift_gives_each_key_the_score_of_its_distance():
    """Against a loop: query i sees key j <= i + M at distance i + M - j."""
    for L, M in ((4, 0), (3, 5), (1, 6)):
        n = M + L
        scores = torch.randn(2, L, n)  # of distances n - 1 .. 0
        shifted = relative_shift(scores)
        for i in range(L):
            for j in range(i + M + 1):
                assert torch.equal(shifted[:, i, j], scores[:, i, n - 1 - (i + M - j)])


def test_adaptive_softmax_is_the_full_softmax_of_its_parts():
    torch.manual_seed(0)
    softmax = AdaptiveSoftmax(AdaptiveEmbedding(WORDS, D, CUTS))
    z, y = torch.randn(WORDS, D), torch.randperm(WORDS)
    log_p = softmax.log_probabilities(z)
    assert torch.allclose(log_p.exp().sum(1), torch.ones(WORDS), atol=1e-5)
    assert torch.allclose(softmax.nll(z, y), -log_p.gather(1, y[:, None])[:, 0], atol=1e-5)


def losses_by_word(net, solve, x, y):
    u = net.inject(x)
    z = solve(lambda z: net.f(z, u), net.initial(u))
    return net.softmax.nll(z.flatten(0, 1), y.flatten()).view_as(y)


@pytest.mark.parametrize("nfe", [1, 2, 3, 8])
@pytest.mark.parametrize("method", ["picard", "anderson", "student"])
@torch.no_grad()
def test_a_later_word_never_changes_an_earlier_loss(method, nfe):
    net, x, y = transformer(), words(2, 12), words(2, 12, seed=1)
    other = torch.cat([x[:, :7], words(2, 5, seed=9)], 1)
    student = Student(net, TimeMap(0.3, 8))

    def losses(x):
        if method == "student":
            u = student.inject(x)
            z = infer.cdeq(student, net.initial(u), u, nfe, 0.8, last=True)
            return net.softmax.nll(z.flatten(0, 1), y.flatten()).view_as(y)
        solver = {"picard": picard, "anderson": anderson}[method]
        return losses_by_word(net, lambda f, z: solver(f, z, nfe, sample_dims=2, last=True), x, y)

    assert torch.allclose(losses(x)[:, :7], losses(other)[:, :7], atol=1e-5)
    assert not torch.allclose(losses(x)[:, 7:], losses(other)[:, 7:], atol=1e-3)


@torch.no_grad()
def test_one_weight_for_a_sequence_lets_the_future_leak():
    """Why sample_dims is 2: with 1, as in public DEQ code, earlier losses change."""
    net, x, y = transformer(), words(1, 12), words(1, 12, seed=1)
    other = torch.cat([x[:, :7], words(1, 5, seed=9)], 1)
    solve = lambda f, z: anderson(f, z, 4, sample_dims=1, last=True)  # noqa: E731
    a, b = (losses_by_word(net, solve, v, y)[:, :7] for v in (x, other))
    assert (a - b).abs().max() > 1e-5


@torch.no_grad()
def test_a_memory_at_its_equilibrium_equals_one_longer_segment():
    net, x = transformer(), words(2, 10)

    def solved(x, memory=None):
        u = net.inject(x, memory)
        z = picard(lambda z: net.f(z, u), net.initial(u), 100, last=True)
        return u, z

    whole = solved(x)[1]
    memory = net.remember(*solved(x[:, :5]))
    assert (solved(x[:, 5:], memory)[1] - whole[:, 5:]).abs().max() < 1e-4
    assert (solved(x[:, 5:])[1] - whole[:, 5:]).abs().max() > 1e-2


@torch.no_grad()
def test_folded_weights_and_a_fresh_student_are_the_teacher():
    """Eqs. 7 and 8: the first two steps of a fresh student with constant time are Anderson's."""
    net = transformer()
    student, u = Student(net, TimeMap(0.3, 8)), net.inject(words(2, 6))
    z = torch.randn(2, 6, D)
    assert torch.allclose(student.h(z, 0.002, u), net.f(z, u), atol=1e-5)


def test_distillation_takes_the_first_half_of_a_window_for_memory():
    """With past = M, the losses are those of the second half of a window. The memory is the first
    half at z_K or, if `own`, at the end of the student's run on it."""
    net = transformer()
    student = Student(net.requires_grad_(False), TimeMap(0.3, 8))
    x, y, z = words(3, 10), words(3, 10, seed=1), torch.randn(4, 3, 10, D)
    k, (_, z_1, z_k, z_K) = torch.tensor([1, 2, 3]), z[:, :, 5:]
    u = net.inject(x[:, :5])
    u = net.inject(x[:, 5:], net.remember(u, z[3][:, :5]))
    terms = Distillation(net, student, student)(
        TrajectoryBatch(x, y, k, z.unbind(), torch.ones(3), past=5)
    )
    g = student.g(z_k, z_1, student.times.t(k), student.times.t(k - 1), u)
    assert torch.allclose(terms["global"], distance(g, z_K, net.cell).mean())
    times, own = student.times.schedule(2, 0.8), OwnRun(net, student)
    states = infer.cdeq(student, net.initial(u), u, 2, 0.8)[1:]
    expected = torch.stack([distance(v, z_K, net.cell).mean() for v in states]).mean()
    assert torch.allclose(own(OwnRunBatch(x, z[3], times, past=5))["distance"], expected)
    assert not torch.allclose(
        own(OwnRunBatch(x, z[3], times, past=5, own=True))["distance"], expected
    )
