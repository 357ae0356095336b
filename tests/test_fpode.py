"""The fixed-point ODE and the clock.

Euler's method with step 1 is Picard's iteration; the flow ends at the equilibrium.
Times grow, fill [eps, T] and survive fp32; rho follows the measured contraction.
"""

import math

import pytest
import torch

from anderson import Counter, anderson, picard
from fpode import TimeMap, contraction, euler, field, propose_rho, rk4

A = 0.9 * torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
b = torch.tensor([[1.0, 2.0]], dtype=torch.float64)


def f(z):
    return z @ A.T + b


def test_the_steady_state_of_the_ode_is_the_equilibrium():
    """Eq. 2: the field vanishes at z* and nowhere near it."""
    star = torch.linalg.solve(torch.eye(2, dtype=torch.float64) - A, b[0])[None]
    assert field(f)(star).norm() < 1e-12 and field(f)(star + 0.1).norm() > 1e-2


def test_picard_is_euler_with_step_one():
    z0 = torch.zeros_like(b)
    assert torch.allclose(picard(f, z0, 10), euler(f, z0, 10, h=1.0), atol=1e-14)


@pytest.mark.parametrize("method, order, cost", [(euler, 1, 1), (rk4, 4, 4)])
def test_integrators_converge_at_their_order(method, order, cost):
    """Against the matrix exponential, z(t) = z* + exp((A - I) t) (z_0 - z*)."""
    eye = torch.eye(2, dtype=torch.float64)
    star = torch.linalg.solve(eye - A, b[0])
    exact = star + torch.linalg.matrix_exp(A - eye) @ (-star)
    counter = Counter(f)
    errors = [(method(counter, 0 * b, n, h=1 / n)[-1, 0] - exact).norm() for n in (20, 40)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)
    assert counter.nfe == cost * 60


def test_times_start_at_eps_grow_and_stay_below_T():
    """Eq. 6."""
    times = TimeMap(rho=0.2, K=20, eps=0.002, T=5.0)
    t = times.t(torch.arange(21))
    assert t[0].item() == pytest.approx(0.002) and t[-1] < 5.0 and bool((t.diff() > 0).all())
    assert t[7].item() == pytest.approx(0.002 + (1 - math.exp(-1.4)) * 4.998, rel=1e-6)
    assert times.s(t)[7].item() == pytest.approx(1 - math.exp(-1.4), rel=1e-5)


def test_a_clock_that_fp32_cannot_tell_apart_is_refused():
    with pytest.raises(ValueError, match="too large"):
        TimeMap(rho=0.5, K=40)


def test_the_schedule_starts_at_eps_and_is_a_prefix_of_longer_ones():
    """App. B.3; Alg. 1 begins at t_0 = eps."""
    times = TimeMap(rho=0.2, K=20)
    t = times.schedule(8, 0.8)
    assert t[0] == 0.002
    assert [times.s(v) for v in t] == pytest.approx([1 - 0.8**j for j in range(8)])
    assert times.schedule(3, 0.8) == t[:3]


def test_contraction_is_measured_as_it_is():
    """Picard on an isometry times .9 errs by exactly .9 per step."""
    assert contraction(picard(f, 0 * b, 400)) == pytest.approx(0.9, abs=1e-3)


def test_proposed_rho_keeps_the_overshoot_bounded():
    """e^rho <= 1 / rate, and never beyond s_K = .98."""
    assert propose_rho(0.95, 20) == pytest.approx(-math.log(0.95))
    assert propose_rho(0.3, 20) == pytest.approx(math.log(50) / 20)
    trajectory = anderson(f, 0 * b, 10, m=1)
    assert TimeMap(propose_rho(contraction(trajectory), 10), 10).rho > 0
