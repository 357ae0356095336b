"""Language modelling tasks: the next word of running text, perplexity.

`wikitext103`, `wikitext2`, and `text`, any folder of the same layout: --data DIR with
wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens. `pydoc`: the English prose of CPython's
own documentation, embedded; other Python versions have other prose.

Words are what white space separates, each line ends with <eos>, case is kept. The vocabulary is the
train split's, <eos> first and then by falling frequency, as the published checkpoints have it.

The train split is cut into windows of memory + segment positions, in any order: a resumed run and
any number of ranks see the same ones. The others are cut into a fixed number of streams, each read
from its start, so that every word counts once and with the same history whatever the batch size and
the number of ranks.
"""

import collections
import functools
import re
import sys
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


def words(lines: Iterable[str]) -> list[str]:
    return [word for line in lines for word in (*line.split(), END)]


def vocabulary(train: list[str], fewest: int = 1) -> list[str]:
    """Words that occur so often at least, equals in the order of their first occurrence."""
    counts = collections.Counter(train)
    counts.pop(END, None)
    known = [END, *(word for word, n in counts.most_common() if n >= fewest)]
    return known if UNKNOWN in known else [*known, UNKNOWN]


def encode(text: list[str], known: list[str], where: str) -> Tensor:
    """Numbers of the words; those outside the vocabulary are <unk>, and counted."""
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
    """Inputs and next words, cut into windows (n, length); what is left at the end is dropped."""
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
    """Vocabulary and the three splits' numbers, from a cache beside the files where one fits."""
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
                    return known, [torch.from_numpy(saved[part].astype(np.int64)) for part in PARTS]
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):  # damaged: made anew
            pass
    texts = []
    for file in files:
        try:
            with open(file, encoding="utf-8") as lines:
                texts.append(words(lines))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{file} cannot be read as UTF-8 text ({error})") from error
        if len(texts[-1]) < 2:
            raise UsageError(f"{file} is empty")
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


def read_pydoc() -> tuple[list[str], list[Tensor]]:
    """CPython's help topics: every tenth validates, every tenth tests; rare words are <unk>."""
    from pydoc_data.topics import topics

    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    for i, name in enumerate(sorted(topics)):
        lines = (" ".join(re.findall(r"\w+|[^\w\s]", line)) for line in topics[name].splitlines())
        part = {4: "valid", 9: "test"}.get(i % 10, "train")
        parts[part] += words(line for line in lines if line)
    known = vocabulary(parts["train"], fewest=2)
    here = set(known)
    texts = [[word if word in here else UNKNOWN for word in parts[part]] for part in PARTS]
    return known, [encode(text, known, "pydoc") for text in texts]


def text_task(
    name: str, known: list[str], ids: list[Tensor], segment: int, memory: int, **more
) -> Task:
    """A language modelling task whose networks are DEQ-Transformers."""
    train, valid, test = ids

    def network(settings: dict) -> DEQTransformer:
        chosen = PRESETS[settings["preset"]]
        net = DEQTransformer(len(known), segment=segment, memory=memory, **chosen)
        net.sample_dims = 2 if settings.get("per_token", True) else 1
        return net

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
        options=("per_token", "own_memory"),
        nfes=(1, 2, 4, 8, 20),
        margin=0.05,
        choice=4,  # streams: an eighth of the words
        decays=(0.5, 0.8, 0.95),
        explicit=functools.partial(language, words=len(known), segment=segment, memory=memory),
        references=("transformer-xl", "tcn"),
        unmeasured=("gcnn", "awd-qrnn"),
        **more,
    )


# An hour or two of two CPU cores; one of them for a student.
LITTLE = dict(
    batch=16, teacher_steps=6000, teacher_lr=3e-3, teacher_decay=0.05, pretrain=3000,
    pretrain_layers=4, solver_steps=8, jac_weight=0.1, jac_prob=0.2, student_steps=1500,
    student_lr=1e-3, store="rolling", cache_gb=1.0, chunk=16, explicit_steps=6000,
    explicit_lr=3e-3, explicit_decay=0.05, save_every=100, log_every=50,
)  # fmt: skip


def wikitext103(data: Path, segment: int = 150, memory: int = 150) -> Task:
    """The schedule of the reference: a tenth of it unrolled, two layers deep."""
    defaults = dict(
        batch=56, teacher_steps=300_000, teacher_lr=2.5e-4, teacher_decay=0.0, clip=0.25,
        pretrain=32_000, pretrain_layers=2, solver_steps=24, phantom=3, jac_weight=1.9,
        jac_prob=0.1, K=38, student_steps=50_000, student_lr=1e-4, cache_dtype="bf16", chunk=8,
        cache_gb=16.0, dtype="bf16", explicit_steps=300_000, explicit_lr=2.5e-4, save_every=1000,
        log_every=100,
    )  # fmt: skip
    names = ("transformer-103", "transformer-103-pre-ln", "transformer-small", "transformer-tiny")
    known, ids = read_folder(where(data, "wikitext-103"))
    return text_task("wikitext103", known, ids, segment, memory, presets=names, defaults=defaults)


def wikitext2(data: Path, segment: int = 64, memory: int = 64) -> Task:
    known, ids = read_folder(where(data, "wikitext-2"))
    names = ("transformer-tiny", "transformer-small")
    return text_task("wikitext2", known, ids, segment, memory, presets=names, defaults=LITTLE)


def folder(data: Path, segment: int = 64, memory: int = 64) -> Task:
    known, ids = read_folder(data)
    names = ("transformer-tiny", "transformer-small", "transformer-103", "transformer-103-pre-ln")
    return text_task("text", known, ids, segment, memory, presets=names, defaults=LITTLE)


def pydoc(data: Path, segment: int = 32, memory: int = 32) -> Task:
    """The embedded text; `data` is not used."""
    defaults = LITTLE | dict(
        teacher_steps=800, pretrain=400, student_steps=800, first=True, explicit_steps=800
    )
    known, ids = read_pydoc()
    names = ("transformer-tiny",)
    return text_task("pydoc", known, ids, segment, memory, presets=names, defaults=defaults)


def where(data: Path, name: str) -> Path:
    return data / name if (data / name).is_dir() else data


TASKS: dict[str, Callable[..., Task]] = {
    "wikitext103": wikitext103,
    "wikitext2": wikitext2,
    "text": folder,
    "pydoc": pydoc,
}
