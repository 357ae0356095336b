"""Language modelling tasks: the next word of running text, perplexity.

`wikitext103`, `wikitext2`, and `text`, any folder of the same layout: --data DIR with
wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens. `docstrings`, embedded: the docstrings of
the running Python's standard library; 3.11.7 has 304,000 words, other versions differ a little.

Words are separated by white space, each line ends with <eos>, case is kept. The vocabulary is that
of the train split, <eos> first and then by falling frequency, as in the published checkpoints.

The train split is cut into windows of memory + segment positions, which may come in any order. The
other splits are cut into a fixed number of streams, each read from its start, so that every word
counts once and with the same history, whatever the batch size and the number of ranks.
"""

import ast
import collections
import functools
import re
import sys
import sysconfig
import warnings
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from checkpoint import UsageError, atomic
from models.explicit import language
from models.transformer import PRESETS, DEQTransformer
from tasks import Split, Task

END, UNKNOWN = "<eos>", "<unk>"
PARTS = ("train", "valid", "test")
STREAMS = 32
FEWEST = 2  # words of a split
# Modules of the standard library without documentation, or not on every system.
OMITTED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "encodings"}
OMITTED |= {"pydoc_data", "tkinter", "site-packages"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def words(lines: Iterable[str]) -> list[str]:
    return [word for line in lines for word in (*line.split(), END)]


def vocabulary(train: list[str], fewest: int = 1) -> list[str]:
    """The words that occur at least this often, equally frequent ones in order of appearance."""
    counts = collections.Counter(train)
    counts.pop(END, None)
    known = [END, *(word for word, n in counts.most_common() if n >= fewest)]
    return known if UNKNOWN in known else [*known, UNKNOWN]


def encode(text: list[str], known: list[str], where: str) -> Tensor:
    """The numbers of words; words outside the vocabulary become <unk>, and a line counts them."""
    numbers = {word: i for i, word in enumerate(known)}
    unknown = numbers[UNKNOWN]
    ids = torch.tensor([numbers.get(word, unknown) for word in text], dtype=torch.long)
    if strange := sum(word not in numbers for word in text):
        print(
            f"{where}: {strange:,} of {len(text):,} words are not in the vocabulary: {UNKNOWN}",
            file=sys.stderr,
        )
    return ids


def windows(ids: Tensor, length: int, where: str) -> Split:
    """Inputs and next words, cut into windows (n, length); a rest at the end is dropped."""
    n = len(ids) // length
    if not n:
        raise UsageError(
            f"{where} has {len(ids)} words, fewer than --memory + --segment = {length}"
        )
    x = torch.cat([ids.new_zeros(1), ids])[: n * length]  # the first word follows an <eos>
    return Split(x.view(n, length), ids[: n * length].view(n, length))


def streams(ids: Tensor, segment: int) -> Split:
    """Inputs and next words as parallel streams (n, T); labels -1 fill the last one."""
    n = max(1, min(STREAMS, len(ids) // segment))
    T = -(-len(ids) // n)
    y = torch.cat([ids, ids.new_full((n * T - len(ids),), -1)])
    x = torch.cat([ids.new_zeros(1), y[:-1].clamp(min=0)])
    return Split(x.view(n, T), y.view(n, T))


def read_folder(folder: Path) -> tuple[list[str], list[Tensor]]:
    """The vocabulary and the numbers of the three splits, from a cache beside the files if any."""
    files = [folder / f"wiki.{part}.tokens" for part in PARTS]
    for file in files:
        if not file.is_file():
            raise UsageError(
                f"{file} is missing; --data needs wiki.train.tokens, wiki.valid.tokens and "
                "wiki.test.tokens, words separated by white space"
            )
    key = [number for file in files for number in (file.stat().st_size, file.stat().st_mtime_ns)]
    cache = folder / "cdeq-words.npz"
    if cache.exists():
        try:
            with np.load(cache) as saved:
                if saved["key"].tolist() == key:
                    known = saved["vocabulary"].tobytes().decode().split("\n")
                    ids = [torch.from_numpy(saved[part].astype(np.int64)) for part in PARTS]
                    if all(part.min() >= 0 and part.max() < len(known) for part in ids):
                        return known, ids
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):  # damaged: made anew
            pass
    texts = []
    for file in files:
        try:
            with open(file, encoding="utf-8-sig") as lines:  # without a byte-order mark
                texts.append(words(lines))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{file} cannot be read as UTF-8 text ({error})") from error
        if (found := len(texts[-1]) - texts[-1].count(END)) < FEWEST:
            raise UsageError(f"{file} has {found} words; a perplexity needs {FEWEST} at least")
    known = vocabulary(texts[0])
    ids = [encode(t, known, str(file)) for t, file in zip(texts, files, strict=True)]
    arrays = {part: i.numpy().astype(np.int32) for part, i in zip(PARTS, ids, strict=True)}
    letters = np.frombuffer("\n".join(known).encode(), np.uint8)
    try:
        with atomic(cache) as file:
            np.savez(file, key=np.array(key), vocabulary=letters, **arrays)
    except UsageError:  # a read-only folder: read again next time
        pass
    return known, ids


def docstrings() -> dict[str, list[str]]:
    """The docstrings of each module of the running Python's standard library, by its path."""
    root, found = Path(sysconfig.get_paths()["stdlib"]), {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] not in sys.stdlib_module_names or not OMITTED.isdisjoint(parts):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(path.read_bytes())
        nodes = (node for node in ast.walk(tree) if isinstance(node, DOCUMENTED))
        found["/".join(parts)] = [text for node in nodes if (text := ast.get_docstring(node))]
    return found


def unrepeated(documents: dict[str, list[str]], n: int = 8) -> dict[str, list[str]]:
    """The paragraphs of each document, as lines of words and marks. A paragraph is left out if half
    of its n-grams occur earlier: otherwise the test split would repeat the train split."""
    seen: set[tuple[str, ...]] = set()
    kept: dict[str, list[str]] = {name: [] for name in documents}
    for name, texts in documents.items():
        for paragraph in re.split(r"\n\s*\n", "\n\n".join(texts)):
            line = re.findall(r"\w+|[^\w\s]", paragraph)
            found = grams(line, n) or {tuple(line)}
            if line and 2 * len(found & seen) < len(found):
                kept[name].append(" ".join(line))
            seen |= found
    return kept


def grams(text: list[str], n: int) -> set[tuple[str, ...]]:
    """All sequences of n consecutive words."""
    return set(zip(*(text[i:] for i in range(n)), strict=False))


def overlap(ids: Tensor, train: Tensor, n: int = 10) -> float:
    """The share of a text's distinct n-grams that also occur in the train split.

    Each n-gram is hashed to a number modulo 2^64; collisions are too rare to matter.
    """

    def numbers(ids: Tensor) -> np.ndarray:
        rows = np.lib.stride_tricks.sliding_window_view(ids.numpy().astype(np.uint64) + 1, n)
        factors = np.uint64(0x9E3779B97F4A7C15) ** np.arange(1, n + 1, dtype=np.uint64)
        return np.unique(rows @ factors)

    if len(ids) < n or len(train) < n:
        return 0.0
    found = numbers(ids)
    return float(np.isin(found, numbers(train), assume_unique=True).mean())


@functools.cache
def read_docstrings() -> tuple[list[str], dict[str, list[str]]]:
    """The vocabulary, and the words of each split, made of whole modules: of every ten, one is for
    validation and one for the test. Words that occur once in the train split are <unk>."""
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    for i, lines in enumerate(unrepeated(docstrings()).values()):
        parts[{8: "valid", 9: "test"}.get(i % 10, "train")] += words(lines)
    known = vocabulary(parts["train"], fewest=2)
    here = set(known)
    texts = {part: [w if w in here else UNKNOWN for w in text] for part, text in parts.items()}
    return known, texts


def text_task(
    name: str, known: list[str], ids: list[Tensor], segment: int, memory: int, **more
) -> Task:
    """A language modelling task whose networks are DEQ-Transformers."""
    train, valid, test = ids

    def remark() -> str:
        shares = f"valid {overlap(valid, train):.1%}, test {overlap(test, train):.1%}"
        return f"{name}: 10-grams that stand in the train split, too: {shares}"

    def network(settings: dict) -> DEQTransformer:
        chosen = PRESETS[settings["preset"]]
        return DEQTransformer(len(known), segment=segment, memory=memory, **chosen)

    return Task(
        name=name,
        metric="perplexity",
        higher_is_better=False,
        train=windows(train, memory + segment, f"{name}'s train split"),
        valid=streams(valid, segment),
        test=streams(test, segment),
        network=network,
        score=None,
        read=lambda line: encode(line.split(), known, "--prompt")[None],
        classes=tuple(known),
        remark=remark,
        margin=0.05,
        choice=4,  # streams: an eighth of the words
        explicit=functools.partial(language, words=len(known), segment=segment, memory=memory),
        **dict(references=("transformer-xl", "tcn")) | more,
    )


# One or two hours on two CPU cores.
LITTLE = dict(
    batch=16, teacher_steps=6000, teacher_lr=3e-3, teacher_decay=0.05, growing=0.7,
    before=6, layers=4, student_steps=1500,
    store="rolling", cache_gb=1.0, chunk=16, save_every=100,
)  # fmt: skip


# The schedule of the reference: a tenth of it unrolled, two layers deep.
WT103_SETTINGS = dict(
    batch=56, teacher_steps=300_000, teacher_lr=2.5e-4, teacher_decay=0.0, clip=0.25,
    growing=0.1, before=24, layers=3, K=38, student_steps=50_000, student_lr=1e-4,
    cache_dtype="bf16", chunk=8, cache_gb=16.0, dtype="bf16", save_every=1000,
)  # fmt: skip


def wikitext103(data: Path, segment: int = 150, memory: int = 150) -> Task:
    names = ("transformer-103", "transformer-103-pre-ln", "transformer-small", "transformer-tiny")
    known, ids = read_folder(where(data, "wikitext-103"))
    return text_task(
        "wikitext103", known, ids, segment, memory, presets=names, defaults=WT103_SETTINGS
    )


def wikitext2(data: Path, segment: int = 64, memory: int = 64) -> Task:
    known, ids = read_folder(where(data, "wikitext-2"))
    names = ("transformer-tiny", "transformer-small")
    return text_task("wikitext2", known, ids, segment, memory, presets=names, defaults=LITTLE)


def folder(data: Path, segment: int = 64, memory: int = 64) -> Task:
    known, ids = read_folder(data)
    names = ("transformer-tiny", "transformer-small", "transformer-103", "transformer-103-pre-ln")
    return text_task("text", known, ids, segment, memory, presets=names, defaults=LITTLE)


def embedded(data: Path, segment: int = 32, memory: int = 32) -> Task:
    """The embedded text; `data` is not used."""
    defaults = LITTLE | dict(teacher_steps=3000, layers=2, student_steps=600)
    known, texts = read_docstrings()
    ids = [encode(texts[part], known, "docstrings") for part in PARTS]
    more = dict(presets=("transformer-tiny",), defaults=defaults, references=())
    return text_task("docstrings", known, ids, segment, memory, **more)


def where(data: Path, name: str) -> Path:
    return data / name if (data / name).is_dir() else data


TASKS: dict[str, Callable[..., Task]] = {
    "wikitext103": wikitext103,
    "wikitext2": wikitext2,
    "text": folder,
    "docstrings": embedded,
}
