"""Text tasks: folders of words, perplexity, prompts.

Streams hold every word once and in order; the perplexity is the same for any batch size.
The test split of the embedded text does not repeat its train split; bad files are named.
"""

import math
import re

import numpy as np
import pytest
import torch

import infer
import train
from checkpoint import UsageError, load
from config import parse
from evidence import rivals
from evidence.evaluate import evaluate
from tasks import Split, text

from .conftest import command
from .test_transformer import words

TINY = ["--task=docstrings", "--teacher_steps=6", "--growing=0.5", "--student_steps=6"]
TINY += ["--batch=8", "--K=4", "--before=3", "--segment=16", "--memory=16"]
TINY += ["--cache_gb=0.02", "--device=cpu"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "docstrings"
    for stage in ("teacher", "student"):
        train.main([*TINY, "--out", str(folder), "--stage", stage])
    rivals.main(["explicit-transformer-xl", *TINY, "--out", str(folder)])
    return folder


def test_words_keep_their_case_and_lines_end_in_eos(tmp_path):
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
    labelled = split.y[split.y >= 0]
    assert torch.equal(labelled, ids) and len(split) == text.STREAMS
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


def test_a_methods_own_memory_is_not_the_teachers(run_folder):
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
def test_a_text_takes_a_prompt_and_no_files(run_folder, flags, says):
    with pytest.raises(UsageError, match=re.escape(says)):
        infer.main(["--run", str(run_folder), *flags])


def test_images_have_no_prompt(tiny_run):
    with pytest.raises(UsageError, match="--prompt: digits is no text"):
        infer.main(["--run", str(tiny_run), "--prompt", "The"])


def test_words_outside_the_vocabulary_are_counted(capsys):
    text.encode(["a", "b", "c"], ["<eos>", "a", "<unk>"], "here")
    assert capsys.readouterr().err == "here: 2 of 3 words are not in the vocabulary: <unk>\n"


def test_an_untied_teacher_is_refused(run_folder, tmp_path):
    """Embedding and softmax share their weights; a file in which they differ is refused."""
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
def test_a_text_trains_in_bf16_and_by_the_papers_recipe(tmp_path, flags):
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
