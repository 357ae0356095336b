"""How sure a difference between two methods is: 95 % intervals by the paired bootstrap.

Two methods are tested on the same sample, with networks of the same seeds. Their difference is
recomputed on resampled units of the sample (a picture with all its views, a node, a segment of a
stream of words), the same ones for both methods, and on resampled seeds; the interval holds the
middle 95 % of the results (Efron & Tibshirani, 1993). Pairing matters: methods fail together on
inputs that are hard for all of them, and this cancels in the difference.

A few hundred units are enough for the sample's share of the interval. With three seeds, the share
of the seeds is a fifth too narrow, since only two of them are free; with one seed it is left out.
"""

import functools

import numpy as np
from torch import Tensor

DRAWS = 1000
BySeed = dict[int, Tensor]  # seed -> items (n, 3): unit, sum of the metric, number of labels


@functools.lru_cache(maxsize=2)
def draws(seeds: int, units: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each unit is drawn, (DRAWS, units), and which seeds are, (DRAWS, seeds)."""
    random = np.random.default_rng(0)
    times = random.multinomial(units, np.full(units, 1 / units), size=DRAWS)
    return times.astype(np.float32), random.integers(seeds, size=(DRAWS, seeds))


def by_unit(items: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Names of the units, (units,), and for each of them the sum and the labels, (units, 2)."""
    names, place = np.unique(items[:, 0].numpy(), return_inverse=True)
    sums = [np.bincount(place, items[:, column].numpy()) for column in (1, 2)]
    return names, np.stack(sums, axis=1)


def difference(a: BySeed, b: BySeed, perplexity: bool) -> tuple[float, float, float]:
    """The metric of a minus that of b, the mean over their common seeds, and its interval.

    perplexity: the metric is exp of the mean, not the mean. Raises ValueError if a and b were not
    measured on the same units or have no seed in common.
    """
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        raise ValueError(f"no seed in common: {sorted(a)} and {sorted(b)}")
    units = [by_unit(side[seed]) for seed in seeds for side in (a, b)]
    names = units[0][0]
    if any(not np.array_equal(names, other) for other, _ in units):
        raise ValueError("not measured on the same units")
    times, picked = draws(len(seeds), len(names))
    scale = np.exp if perplexity else np.asarray
    whole, drawn = [], []
    for (_, one), (_, other) in zip(units[::2], units[1::2], strict=True):
        sums = [np.vstack([v.sum(0), times @ v.astype(np.float32)]) for v in (one, other)]
        first, second = (scale(v[:, 0] / v[:, 1]) for v in sums)
        whole.append(first[0] - second[0])
        drawn.append(first[1:] - second[1:])
    found = np.take_along_axis(np.stack(drawn, axis=1), picked, axis=1).mean(axis=1)
    low, high = np.quantile(found, (0.025, 0.975))
    return float(np.mean(whole)), float(low), float(high)
