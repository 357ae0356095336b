"""The DEQ-Transformer against the published one, causality, and words that count once."""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import infer
import train
from anderson import anderson, picard
from checkpoint import UsageError, load
from config import parse
from evidence import rivals
from evidence.evaluate import evaluate
from fpode import TimeMap
from losses import Distillation, OwnRun, OwnRunBatch, TrajectoryBatch, distance
from models.__main__ import sizes
from models.published import translated
from models.transformer import AdaptiveEmbedding, AdaptiveSoftmax, DEQTransformer
from models.transformer import shift as relative_shift
from student import Student
from tasks import Split, text

from .conftest import command

# A network of the reference's kind: width, heads, inner width, words, cutoffs.
D, HEADS, INNER, WORDS, CUTS = 32, 4, 48, 60, (20, 30, 45)
SMALL = dict(words=WORDS, d=D, heads=HEADS, inner=INNER, cutoffs=CUTS, segment=5, memory=5)
TINY = ["--task=docstrings", "--teacher_steps=6", "--growing=0.5", "--student_steps=6"]
TINY += ["--batch=8", "--K=4", "--before=3", "--segment=16", "--memory=16"]
TINY += ["--cache_gb=0.02", "--device=cpu"]


def transformer(seed=0, **options) -> DEQTransformer:
    """A network with random weights that listens more to its input than to its state."""
    torch.manual_seed(seed)
    net = DEQTransformer(**SMALL | dict(std=0.2 / D**0.5) | options).eval()
    net.injection.linear.weight.data *= 200
    net.cell.qkv.parametrizations.weight.original0.data *= 0.1
    net.cell.out.parametrizations.weight.original0.data *= 20
    net.cell.narrow.parametrizations.weight.original0.data *= 0.3
    return net


def words(rows: int, length: int, seed=0) -> torch.Tensor:
    return torch.randint(WORDS, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "docstrings"
    for stage in ("teacher", "student"):
        train.main([*TINY, "--out", str(folder), "--stage", stage])
    rivals.main(["explicit-transformer-xl", *TINY, "--out", str(folder)])
    return folder


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
    """Losses (B, L) of the last segment, each segment's states and injection being the next one's
    memory: written position by position from the published names alone."""

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
    """Same weights, words and steps: the same loss of every word, with memory and without."""
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
    """With past = M the losses are those of the second half given the first one's z_K, or given
    what the student's own run makes of it."""
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


def test_words_keep_their_case_and_lines_their_ends(tmp_path):
    known, ids = text.read_folder(make(tmp_path, "The the the\n\n the A A\n", "the B\n", "A A\n"))
    assert known == ["<eos>", "the", "A", "The", "<unk>"]
    assert ids[0].tolist() == [3, 1, 1, 0, 0, 1, 2, 2, 0] and ids[1].tolist() == [1, 4, 0]
    again, ids_2 = text.read_folder(tmp_path)  # from the cache
    assert again == known and all(torch.equal(a, b) for a, b in zip(ids, ids_2, strict=True))
    make(tmp_path, "new words here\n", "the B\n", "A A\n")
    assert text.read_folder(tmp_path)[0][1] == "new"  # the cache is of other files


@pytest.mark.parametrize("damage", [lambda raw: b"", lambda raw: raw[:300], lambda raw: b"x" * 99])
def test_a_damaged_cache_is_made_anew(tmp_path, damage):
    known, _ = text.read_folder(make(tmp_path, "a b c\n", "a b\n", "c c\n"))
    cache = tmp_path / "cdeq-words.npz"
    cache.write_bytes(damage(cache.read_bytes()))
    assert text.read_folder(tmp_path)[0] == known


def test_a_cache_of_numbers_beyond_its_words_is_made_anew(tmp_path):
    _, (ids, *_) = text.read_folder(make(tmp_path, "a b c\n", "a b\n", "c c\n"))
    with np.load(tmp_path / "cdeq-words.npz") as saved:
        parts = dict(saved)
    np.savez(tmp_path / "cdeq-words.npz", **parts | {"train": parts["train"] + 9})
    assert torch.equal(text.read_folder(tmp_path)[1][0], ids)


@pytest.mark.parametrize("words", ["a b c d e f g h", "a b d c"])
def test_other_words_than_a_runs_are_refused(tmp_path, words):
    """infer.py --data with another vocabulary, or the same words in another order."""
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    here = make(tmp_path / "a", "a b c d\n" * 40, "a b\n" * 20, "c d\n" * 20)
    other = make(tmp_path / "b", f"{words}\n" * 40, "a b\n" * 20, "c d\n" * 20)
    flags = [flag for flag in TINY if "task" not in flag]
    train.main(
        [*flags, "--task=text", f"--data={here}", f"--out={tmp_path}/run", "--stage=teacher"]
    )
    with pytest.raises(UsageError, match="was trained on other data than those at hand"):
        infer.open_run(tmp_path / "run", {"data": str(other)}, "cpu")


def make(folder, train_text: str, valid: str, test: str):
    for part, lines in zip(("train", "valid", "test"), (train_text, valid, test), strict=True):
        (folder / f"wiki.{part}.tokens").write_text(lines)
    return folder


def test_streams_hold_every_word_once_and_in_order():
    ids = torch.arange(1, 1001)
    split = text.streams(ids, segment=7)
    told = split.y[split.y >= 0]
    assert torch.equal(told, ids) and len(split) == text.STREAMS
    assert torch.equal(split.x.flatten()[1:1000], ids[:-1]) and split.x[0, 0] == 0


def test_windows_cover_the_train_split():
    split = text.windows(torch.arange(1, 101), 16, "here")
    assert split.y.flatten().tolist() == list(range(1, 97)) and split.x[1, 0] == 16


def test_perplexity_is_the_same_for_any_batch_and_counts_every_word(run_folder):
    run = infer.open_run(run_folder, device="cpu")
    methods = {"cdeq": infer.counted(run.teacher, *run.students[""])}
    x, y = run.task.test.x[:5, :40], run.task.test.y[:5, :40].clone()
    y[4, 20:] = -1
    rows = [evaluate(run, methods, Split(x, y), (1, 3), batch)["cdeq"] for batch in (1, 2, 5)]
    for row in rows[1:]:
        assert row[1]["value"] == pytest.approx(rows[0][1]["value"], rel=1e-4)
    net, nll = run.teacher, 0.0
    student, decay = run.students[""]
    for i in range(5):  # word by word, each stream by itself
        memory = None
        for a, b in net.segments(x[i : i + 1], y[i : i + 1]):
            u = student.inject(a, memory)
            z = infer.cdeq(student, net.initial(u), u, 3, decay, last=True)
            memory = net.remember(u, z)
            nll += (net.nll(z, b) * (b >= 0).sum()).sum().item()
    assert rows[0][1]["value"] == pytest.approx(math.exp(nll / (y >= 0).sum().item()), rel=1e-4)


def test_own_memory_and_the_teachers_differ(run_folder):
    run = infer.open_run(run_folder, device="cpu")
    methods = {"cdeq": infer.counted(run.teacher, *run.students[""])}
    part = Split(run.task.test.x[:4, :64], run.task.test.y[:4, :64])
    own, theirs = (evaluate(run, methods, part, (2,), own_memory=own) for own in (True, False))
    assert own["cdeq"][0]["value"] != theirs["cdeq"][0]["value"]


def test_explicit_networks_are_causal_and_read_their_context_once(run_folder):
    run = infer.open_run(run_folder, device="cpu")
    net = rivals.open_rivals(run).explicit["transformer-xl"]
    parts = list(net.segments(words(2, 40), words(2, 40, seed=1)))
    assert sum((y >= 0).sum().item() for _, y in parts) == 80
    x, y = words(1, 12), torch.full((1, 12), -1)
    y[0, 3] = 5
    later = torch.cat([x[:, :4], words(1, 8, seed=5)], 1)
    for kind in ("transformer-xl", "tcn"):
        net = run.task.explicit(kind, {"preset": "transformer-tiny"}).eval()
        assert torch.allclose(net.nll(x, y), net.nll(later, y), atol=1e-5)


def test_generation_continues_a_prompt(run_folder):
    done = command("infer.py", "--run", str(run_folder), "--prompt", "The statement", "--tokens=5")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2
    assert re.search(r"cdeq, NFE 2, [\d.]+ tokens/s: The statement( \S+){5}$", done.stdout, re.M)


@pytest.mark.parametrize(
    "contents, says",
    [
        (("a b\n", "a\n", None), "wiki.test.tokens is missing"),
        (("", "a\n", "b\n"), "wiki.train.tokens has 0 words; a perplexity needs 2 at least"),
        (("a " * 99, "\n\n", "b\n"), "wiki.valid.tokens has 0 words"),
        (("a " * 99, "a " * 99, "b\n"), "wiki.test.tokens has 1 words"),
        (("a b c\n", "a a\n", "b b\n"), "fewer than --memory + --segment = 128"),
    ],
)
def test_bad_text_is_one_clear_line(tmp_path, contents, says):
    for part, lines in zip(("train", "valid", "test"), contents, strict=True):
        if lines is not None:
            (tmp_path / f"wiki.{part}.tokens").write_text(lines)
    with pytest.raises(UsageError, match=re.escape(says)):
        parse(["--task", "text", "--data", str(tmp_path)])


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--files", "a.png"], "docstrings is a text; its inputs are a --prompt"),
        (["--tol", "0.1"], "docstrings is a text; its inputs are a --prompt"),
        (["--prompt", "The", "--tokens", "0"], "--tokens 0: allowed is >= 1"),
        (["--prompt", "The", "--temperature", "0"], "--temperature 0.0: allowed is >= 0.001"),
    ],
)
def test_a_text_is_asked_by_a_prompt(run_folder, flags, says):
    with pytest.raises(UsageError, match=re.escape(says)):
        infer.main(["--run", str(run_folder), *flags])


def test_images_have_no_prompt(tiny_run):
    with pytest.raises(UsageError, match="--prompt: digits is no text"):
        infer.main(["--run", str(tiny_run), "--prompt", "The"])


def test_words_outside_the_vocabulary_are_counted(capsys):
    text.encode(["a", "b", "c"], ["<eos>", "a", "<unk>"], "here")
    assert capsys.readouterr().err == "here: 2 of 3 words are not in the vocabulary: <unk>\n"


def test_an_untied_teacher_is_refused(run_folder, tmp_path):
    """Embedding and softmax share their words; a file in which they differ is another network's."""
    state = load(run_folder / "teacher.pt", "teacher")["model"]
    state["softmax.words.0.weight"] = state["softmax.words.0.weight"] + 1
    torch.save(state, tmp_path / "untied.pt")
    flags = [*TINY, "--out", str(tmp_path / "run"), "--stage=teacher"]
    with pytest.raises(UsageError, match=r"one tensor with another here.*--not_tied"):
        train.main([*flags, "--teacher", str(tmp_path / "untied.pt")])


def test_a_teacher_of_another_vocabulary_is_refused(run_folder, tmp_path):
    folder = make(tmp_path, "a b c d e f g h\n" * 40, "a\n" * 20, "b\n" * 20)
    flags = [flag for flag in TINY if "task" not in flag]
    flags += ["--task=text", "--data", str(folder), "--out", str(tmp_path / "run")]
    with pytest.raises(UsageError, match=r"teacher\.pt is no transformer-tiny"):
        train.main([*flags, "--stage=teacher", "--teacher", str(run_folder / "teacher.pt")])


@pytest.mark.parametrize("flags", [["--dtype=bf16"], ["--recipe=paper"]])
def test_a_text_trains_by_every_recipes_flags(tmp_path, flags):
    for stage in ("teacher", "student"):
        train.main([*TINY, *flags, "--out", str(tmp_path), "--stage", stage])
    run = infer.open_run(tmp_path, device="cpu")
    part = Split(run.task.test.x[:2, :32], run.task.test.y[:2, :32])
    ((student, decay),) = run.students.values()
    methods = {"cdeq": infer.counted(run.teacher, student, decay)}
    (row,) = evaluate(run, methods, part, (2,))["cdeq"]
    assert 1 < row["value"] < 10 * len(run.task.classes)


def test_the_embedded_text_does_not_test_what_it_trains():
    """At most one in twenty of the 10-grams of either held-out split stands in the train split."""
    known, texts = text.read_docstrings()
    train, *rest = (text.encode(texts[part], known, part) for part in text.PARTS)
    assert all(text.overlap(ids, train) <= 0.05 for ids in rest)
    assert min(map(len, rest)) > 20_000 and len(train) > 150_000


def test_overlap_is_the_share_of_common_ngrams():
    ids = torch.arange(50)
    assert text.overlap(ids, ids) == 1 and text.overlap(ids, ids + 50) == 0
    assert text.overlap(ids, ids[:30]) == 21 / 41  # 21 of the 41 ten-grams
    assert text.overlap(ids[:5], ids) == 0


def test_a_byte_order_mark_is_no_part_of_the_first_word(tmp_path):
    make(tmp_path, "\ufeffone two\n" * 9, "one\n" * 10, "two\n" * 10)
    known, _ = text.read_folder(tmp_path)
    assert "one" in known and "\ufeffone" in known  # only the first one is a mark
    assert text.read_folder(tmp_path)[1][0][0] == known.index("one")


def test_weights_of_pictures_are_not_for_texts(tmp_path):
    with pytest.raises(UsageError, match="explicit-tcn-pretrained: allowed is explicit-transfor"):
        rivals.main(["explicit-tcn-pretrained", *TINY, f"--out={tmp_path}"])
