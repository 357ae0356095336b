"""Tasks: what to learn, in three splits, and the presets that go with it.

Training uses the train split, every choice the validation split, every reported number the test
split; nothing else in the project knows where data comes from.
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

    augment: a random transform of one input, or None. draws: so many samples, one after another,
    are views of one picture, and no evidence independent of each other.
    """

    x: Tensor
    y: Tensor
    augment: Callable[[Tensor], Tensor] | None = None
    draws: int = 1

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, rows: Tensor, seeds: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x and y of these samples; augmented, each from its own seed, where seeds (B,) are given.

        A seed per sample, not per batch, makes the images the same on any number of ranks.
        """
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
        """`batch` of each (rows, seeds), in order; read ahead by so many processes where reading
        takes time, which here it does not."""
        return (self.batch(*batch) for batch in batches)


@dataclass(frozen=True)
class Task:
    """A data set with its network and metric.

    score(logits, y): the metric's summand for each label, the shape of y, or None where the metric
    is the perplexity, exp of the mean nll over labels; further: more summands by name, reported
    beside it. read: a user's own input as x (1, ...), of a path or, for texts, of a line.
    network(settings): the teacher that a dict of settings asks for by `preset` and `options`, the
    settings besides it that this network knows. defaults: settings that suit the task. nfes:
    columns of its tables. note: said in every table. margin: within it, a metric counts as equal to
    the teacher's; of perplexity, a share. directs: evaluations J that its tables train a network
    for directly. decays: candidates for the base of the inference schedule. choice: samples of the
    validation split that it and the tables' equal NFE are chosen on, 0 for all. explicit(name,
    settings): the reference network of finite depth of this name, trained with explicit_defaults in
    place of the teacher's; references: those that the tables have; learned: the learned solvers
    that they have; rivals: other teachers with rows of their own, presets or the first one with its
    student's updates added. said(): what is to be known of the data before training. edges: a
    graph's.
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
    said: Callable[[], str] = str
    edges: Tensor | None = None

    def fingerprint(self) -> str:
        """Eight hexadecimal digits that change with the data: samples, labels, classes, edges."""
        crc = zlib.crc32("\n".join(self.classes).encode())
        for split in (self.train, self.valid, self.test):
            crc = split.fingerprint(crc)
        if self.edges is not None:
            crc = zlib.crc32(self.edges.contiguous().numpy(), crc)
        return f"{crc:08x}"

    def to_choose(self) -> Split:
        """The part of the validation split that choices are made on."""
        if not self.choice:
            return self.valid
        return Split(*self.valid.batch(torch.arange(min(self.choice, len(self.valid)))))

    def as_good(self, value: float, teacher: float) -> bool:
        """Whether a metric counts as equal to the teacher's, or is better."""
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
