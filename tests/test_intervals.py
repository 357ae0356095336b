"""The intervals of differences.

They are as wide as theory says; pairing cancels what both methods share.
Views of one picture count as one piece of evidence; seeds that disagree widen the interval.
"""

import math

import numpy as np
import pytest
import torch

from evidence import tables
from evidence.intervals import difference


def items(values, units=None) -> torch.Tensor:
    """Items of one label each."""
    values = torch.as_tensor(values, dtype=torch.float64)
    units = torch.arange(len(values)) if units is None else units
    return torch.stack([units.double(), values, torch.ones_like(values)], dim=1)


def coin(n: int, p: float, seed: int = 0) -> torch.Tensor:
    return 100 * (torch.rand(n, generator=torch.Generator().manual_seed(seed)) < p).double()


def width(interval: tuple[float, float, float]) -> float:
    return interval[2] - interval[1]


def test_a_method_does_not_differ_from_itself():
    a = items(coin(500, 0.8))
    assert difference({0: a}, {0: a}, perplexity=False) == (0, 0, 0)


def test_the_interval_of_a_mean_is_the_textbooks():
    """For n differences of items: mean +- 1.96 sd / sqrt(n)."""
    a, b = coin(2000, 0.8), coin(2000, 0.7, seed=1)
    found = difference({0: items(a)}, {0: items(b)}, perplexity=False)
    assert found[0] == pytest.approx((a - b).mean().item())
    assert width(found) == pytest.approx(2 * 1.96 * (a - b).std().item() / 2000**0.5, rel=0.1)


def test_what_both_methods_share_cancels():
    """b fails wherever a does, and on up to ten items more: the interval of the difference is
    narrower than that of a alone."""
    a = coin(1000, 0.7)
    b = a.clone()
    b[:10] = 0
    paired = difference({0: items(a)}, {0: items(b)}, perplexity=False)
    alone = difference({0: items(a)}, {0: items(torch.zeros(1000))}, perplexity=False)
    assert width(paired) < width(alone) / 4


def test_ten_views_of_a_picture_are_one_piece_of_evidence():
    a, zero = coin(300, 0.8).repeat_interleave(10), torch.zeros(3000)
    picture = torch.arange(300).repeat_interleave(10)
    one = difference({0: items(a[::10])}, {0: items(zero[::10])}, perplexity=False)
    together = difference({0: items(a, picture)}, {0: items(zero, picture)}, perplexity=False)
    apart = difference({0: items(a)}, {0: items(zero)}, perplexity=False)
    assert together == pytest.approx(one)
    assert width(apart) == pytest.approx(width(together) / 10**0.5, rel=0.15)


def test_a_perplexity_is_exp_of_the_mean_over_labels():
    """Two streams of 30 and 10 words: (90 + 10) / 40 nats a word against 2."""
    a = torch.tensor([[0.0, 90, 30], [1, 10, 10]])
    b = torch.tensor([[0.0, 60, 30], [1, 20, 10]])
    value, low, high = difference({0: a}, {0: b}, perplexity=True)
    assert value == pytest.approx(math.exp(2.5) - math.exp(2))
    assert low == pytest.approx(math.exp(1) - math.exp(2)) and low < value < high


def test_seeds_widen_the_interval():
    """Two seeds that disagree by ten points: the interval contains both."""
    a = {seed: items(np.full(1000, 80.0 + 10 * seed)) for seed in (0, 1)}
    b = {seed: items(np.full(1000, 80.0)) for seed in (0, 1, 2)}
    assert difference(a, b, perplexity=False) == pytest.approx((5, 0, 10))


def test_other_units_and_other_seeds_are_refused():
    a, b = items(coin(10, 0.5)), items(coin(11, 0.5))
    with pytest.raises(ValueError, match="same units"):
        difference({0: a}, {0: b}, perplexity=False)
    with pytest.raises(ValueError, match="no seed in common"):
        difference({0: a}, {1: a}, perplexity=False)


@pytest.mark.parametrize(
    ("interval", "higher_is_better", "word"),
    [
        ((1.0, 0.5, 1.5), True, "ahead"),
        ((1.0, 0.5, 1.5), False, "behind"),
        ((-1.0, -1.5, -0.5), False, "ahead"),
        ((1.0, -0.1, 2.0), True, "no difference"),
        ((0.0, 0.0, 0.0), True, "no difference"),
        ((1.4, 3e-15, 2.9), True, "no difference"),
    ],
)
def test_ahead_is_said_only_where_the_interval_excludes_zero(interval, higher_is_better, word):
    assert tables.verdict(interval, {"higher_is_better": higher_is_better}).endswith(f") {word}")
