"""Tasks: data in three splits, with the networks, the metric and the settings that suit it.

Training uses the train split, every choice the validation split, every reported number the test
split. No code outside this folder knows where data comes from.
"""

import functools
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from models import Equilibrium


@dataclass(frozen=True)
class Split:
    """Inputs x (N, ...) and labels y (N, ...) held in memory.

    augment: a random transform of one input, or None. draws: this many consecutive samples are
    views of one picture, so they are not independent of each other.
    """

    x: Tensor
    y: Tensor
    augment: Callable[[Tensor], Tensor] | None = None
    draws: int = 1

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, rows: Tensor, seeds: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x and y of these samples; if seeds (B,) are given, each x is augmented from its own seed,
        so that it is the same on any number of ranks."""
        x, y = self.x[rows], self.y[rows]
        if self.augment is None or seeds is None:
            return x, y
        with torch.random.fork_rng(devices=[]):
            views = []
            for image, seed in zip(x, seeds.tolist(), strict=True):
                torch.manual_seed(seed)
                views.append(self.augment(image))
        return torch.stack(views), y

    def fingerprint(self, crc: int) -> int:
        """A checksum of the samples, continued from crc."""
        for part in (self.x, self.y):
            crc = zlib.crc32(part.contiguous().view(-1).view(torch.uint8).numpy(), crc)
        return crc

    def stream(self, batches: Iterable[tuple], workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """`batch` of each (rows, seeds), in order. workers: processes that read ahead if reading
        takes time, which it does not here."""
        return (self.batch(*batch) for batch in batches)


@dataclass(frozen=True)
class Task:
    """A data set with its networks, its metric and the settings that suit it.

    Metric. score(logits, y): its summand for each label, in the shape of y; None if the metric is
    the perplexity, exp of the mean nll. further: more summands, by name, that reports have. margin:
    a metric this near to the teacher's counts as equal (for perplexity, a share).
    Data. read: a user's own input, a path or a line of text, as x (1, ...). note: the title in
    tables. remark(): a line about the data that is printed before training. edges: of a graph.
    Networks. network(settings): the teacher that a dict of settings asks for; options: the settings
    besides `preset` that it depends on. explicit(name, settings): a network of finite depth,
    trained with explicit_defaults in place of the teacher's settings.
    Inference. nfes: columns of the tables. decays: candidates for the base of the schedule. choice:
    how many samples of the validation split it is chosen on; 0: all.
    Rows of the tables. directs: evaluations J of networks trained directly; learned: learned
    solvers; references: explicit networks; rivals: other teachers, presets or `teacher-longer`.
    """

    name: str
    metric: str
    higher_is_better: bool
    train: Split
    valid: Split
    test: Split
    network: Callable[[dict], Equilibrium]
    presets: tuple[str, ...]
    score: Callable[[Tensor, Tensor], Tensor] | None
    read: Callable[..., Tensor]
    classes: tuple[str, ...]
    further: dict[str, Callable[[Tensor, Tensor], Tensor]] = field(default_factory=dict)
    defaults: dict = field(default_factory=dict)
    options: tuple[str, ...] = ()
    nfes: tuple[int, ...] = (1, 2, 4, 8, 20)
    note: str = ""
    margin: float = 0.5
    directs: tuple[int, ...] = (1, 2, 4)
    decays: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9, 0.95)
    choice: int = 0
    explicit: Callable[[str, dict], nn.Module] | None = None
    explicit_defaults: dict = field(default_factory=dict)
    references: tuple[str, ...] = ()
    learned: tuple[str, ...] = ("hyperdeq",)
    rivals: tuple[str, ...] = ("teacher-longer",)
    remark: Callable[[], str] = str
    edges: Tensor | None = None

    def fingerprint(self) -> str:
        """Eight hexadecimal digits that change with samples, labels, classes or edges."""
        crc = zlib.crc32("\n".join(self.classes).encode())
        for split in (self.train, self.valid, self.test):
            crc = split.fingerprint(crc)
        if self.edges is not None:
            crc = zlib.crc32(self.edges.contiguous().numpy(), crc)
        return f"{crc:08x}"

    def to_choose(self) -> Split:
        """The samples of the validation split on which choices are made."""
        if not self.choice:
            return self.valid
        return Split(*self.valid.batch(torch.arange(min(self.choice, len(self.valid)))))

    def as_good(self, value: float, teacher: float) -> bool:
        """Whether a metric is better than the teacher's or counts as equal."""
        if self.higher_is_better:
            return value >= teacher - self.margin
        return value <= teacher * (1 + self.margin)


def positions(n: int, first: int, count: int, seed: int) -> tuple[Tensor, int]:
    """Entries first .. first + count of an endless stream of shuffled passes over range(n).

    A pure function of its arguments, so that a resumed run and any rank see the same stream.
    Also returns the pass in which the first entry lies.
    """
    wanted = torch.arange(first, first + count)
    rows = torch.empty(count, dtype=torch.long)
    for epoch in wanted.div(n, rounding_mode="floor").unique().tolist():
        here = wanted.div(n, rounding_mode="floor") == epoch
        rows[here] = shuffled(n, seed * 1_000_003 + epoch)[wanted[here] % n]
    return rows, first // n


@functools.lru_cache(maxsize=4)
def shuffled(n: int, seed: int) -> Tensor:
    """A permutation of range(n)."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))
