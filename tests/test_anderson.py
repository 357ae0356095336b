"""Solvers on problems whose answers are known otherwise.

An affine map's fixed point is found in D + 1 evaluations; K steps make K evaluations.
Problems do not touch each other; a converged one stays; a diverged one is named.
The two-point step is Anderson's with two states.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from anderson import Counter, anderson, picard, two_point

SOLVERS = {"picard": picard, "anderson": anderson}


def affine(P: int = 3, D: int = 6, norm: float = 0.9, seed: int = 0):
    """f(z) = A z + b in fp64, one contraction per problem, and its exact fixed point."""
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(P, D, D, generator=g, dtype=torch.float64)
    A = norm * A / torch.linalg.matrix_norm(A, 2)[:, None, None]
    b = torch.randn(P, D, generator=g, dtype=torch.float64)
    star = torch.linalg.solve(torch.eye(D, dtype=torch.float64) - A, b)
    return (lambda z: torch.einsum("pij,pj->pi", A, z) + b), star


def test_affine_map_is_solved_exactly_in_one_more_evaluation_than_dimensions():
    """Eqs. 3, 4: D residual differences span the space, so z_{D+1} is the fixed point."""
    f, star = affine(D=6)
    z = anderson(f, torch.zeros_like(star), 7, m=7, ridge=0.0, last=True)
    assert torch.allclose(z, star, atol=1e-10)


def test_weights_solve_the_constrained_least_squares_problem():
    """Alg. 3, l. 5: against lstsq on the differences, an independent computation."""
    f, star = affine()
    z = anderson(f, torch.zeros_like(star), 4, m=3, ridge=0.0)
    F = torch.stack([f(v) for v in z[1:4]], 1)
    R = F - z[1:4].transpose(0, 1)
    free = torch.linalg.lstsq((R[:, :-1] - R[:, -1:]).mT, -R[:, -1, :, None]).solution[..., 0]
    alpha = torch.cat([free, 1 - free.sum(1, keepdim=True)], 1)
    assert torch.allclose((alpha[:, None] @ F)[:, 0], z[4], atol=1e-9)


def test_mixing_averages_values_and_states():
    """Eq. 12 with m = 1: z_{k+1} = beta f(z_k) + (1 - beta) z_k."""
    f, star = affine()
    z = anderson(f, torch.zeros_like(star), 5, m=1, beta=0.3)
    assert torch.allclose(z[1:], torch.stack([0.3 * f(v) + 0.7 * v for v in z[:-1]]))


def test_a_window_of_one_is_picard():
    f, star = affine()
    z0 = torch.zeros_like(star)
    assert torch.equal(anderson(f, z0, 6, m=1), picard(f, z0, 6))


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("K", [1, 2, 9])
def test_K_steps_cost_exactly_K_evaluations(solver, K):
    f, star = affine()
    counter = Counter(f)
    states = solver(counter, torch.zeros_like(star), K)
    assert counter.nfe == K and states.shape == (K + 1, *star.shape)
    assert torch.equal(states[1], f(torch.zeros_like(star)))  # NFE = 1 is f(z_0)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_last_state_equals_the_end_of_the_trajectory(solver):
    f, star = affine()
    z0 = torch.zeros_like(star)
    assert torch.equal(solver(f, z0, 8, last=True), solver(f, z0, 8)[-1])


@pytest.mark.parametrize("tol", [0.0, 1e-4])
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_a_sample_does_not_depend_on_its_neighbours(solver, tol):
    """Weights, stopping and freezing are per problem."""
    f, star = affine(P=3)
    g, _ = affine(P=3, norm=0.2)  # the neighbours converge at another speed
    mixed = lambda z: torch.cat([f(z)[:1], g(z)[1:]])  # noqa: E731
    z0 = torch.zeros_like(star)
    assert torch.allclose(solver(f, z0, 20, tol=tol)[:, 0], solver(mixed, z0, 20, tol=tol)[:, 0])


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_tolerance_freezes_each_sample_at_an_answer_that_meets_it(solver):
    f, star = affine(P=8)
    counter = Counter(f)
    states = solver(counter, torch.zeros_like(star), 400, tol=1e-3)
    z = states[-1]
    assert counter.nfe < 400
    assert ((f(z) - z).norm(dim=1) <= 1e-3 * f(z).norm(dim=1)).all()
    frozen = (states[:-1] == states[-1]).all(-1).int()
    assert (frozen.diff(dim=0) >= 0).all() and frozen[-1].all()


def test_without_convergence_the_smallest_residual_wins():
    """On an oscillating map the answer is the f(z) of the smallest residual, not the last one."""
    values = iter([1.0, 1.1, 5.0, -7.0])
    f = lambda z: torch.full_like(z, next(values))  # noqa: E731
    assert picard(f, torch.zeros(1, 1), 4, tol=1e-6, last=True).item() == pytest.approx(1.1)


def test_relative_ridge_beats_picard_on_small_states():
    """An absolute ridge of 1e-4 would turn the weights into a plain average here."""
    f, star = affine(P=16, D=32, norm=0.97)
    small = lambda z: 1e-4 * f(z / 1e-4)  # noqa: E731
    z0 = torch.zeros_like(star)
    error = lambda z: (z / 1e-4 - star).norm() / star.norm()  # noqa: E731
    fast, slow = (solver(small, z0, 40, last=True) for solver in (anderson, picard))
    assert error(fast) < error(slow) / 10


@pytest.mark.parametrize("shape, dims", [((4, 3, 5), 1), ((4, 3, 5), 2), ((2, 3, 2, 2), 1)])
def test_any_state_shape_and_any_number_of_sample_dimensions(shape, dims):
    """Problems solved together equal the same problems solved one by one."""
    scale = torch.linspace(0.1, 0.9, torch.Size(shape[:dims]).numel()).view(*shape[:dims])
    scale = scale.view(*shape[:dims], *[1] * (len(shape) - dims))
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    f = lambda z: torch.cos(z) * scale + bias  # noqa: E731
    together = anderson(f, torch.zeros(shape), 6, sample_dims=dims)
    index = (0,) * dims
    one = lambda z: torch.cos(z) * scale[index] + bias[index]  # noqa: E731
    alone = anderson(one, torch.zeros(1, *shape[dims:]), 6)[:, 0]
    assert torch.allclose(together[(slice(None), *index)], alone, atol=1e-5)


def test_half_precision_states_are_solved_in_single_precision():
    """Weights in bf16 would not sum to one. The answer is as accurate as bf16 allows."""
    f, star = affine(norm=0.5)
    g = lambda z: f(z.double()).to(z.dtype)  # noqa: E731
    z = anderson(g, torch.zeros_like(star, dtype=torch.bfloat16), 20, last=True)
    assert z.dtype == torch.bfloat16
    assert (z.double() - star).abs().max() < 0.02 * star.abs().max()


def test_a_solved_problem_stays_solved():
    """All residuals are 0, and only the floors keep the window's system regular."""
    z = anderson(lambda z: z, torch.ones(2, 3), 8)
    assert torch.allclose(z, torch.ones_like(z))


def test_non_finite_values_name_the_step_and_the_sample():
    def f(z):
        out = z + 1
        out[2] = torch.where(z[2] >= 3, torch.nan, out[2])
        return out

    with pytest.raises(FloatingPointError, match="step 4, sample 2"):
        picard(f, torch.zeros(4, 2), 6)


@pytest.mark.parametrize("wrong", [dict(m=0), dict(beta=0.0), dict(beta=1.5), dict(ridge=-1.0)])
def test_bad_options_say_what_is_needed(wrong):
    with pytest.raises(ValueError, match="need m >= 1, 0 < beta <= 1"):
        anderson(lambda z: z, torch.zeros(1, 1), 2, **wrong)


def test_two_point_step_is_anderson_with_two_states():
    """Eq. 7 against Eqs. 3, 4 with a window of two."""
    f, star = affine()
    z = anderson(f, torch.zeros_like(star), 2, m=2, ridge=0.0)
    step = two_point(f(z[1]), f(z[1]) - z[1], f(z[0]), f(z[0]) - z[0], ridge=0.0)
    assert torch.allclose(step, z[2], atol=1e-12)


def test_two_point_step_falls_back_to_the_newest_state():
    """A repeated state, as Eq. 13 makes them, has no direction: P = h."""
    f, star = affine()
    z = torch.randn_like(star)
    assert torch.equal(two_point(f(z), f(z) - z, f(z), f(z) - z), f(z))


def test_no_gradient_goes_through_the_two_point_weights():
    """dP/dh_new is 1 - a_old, one number for a whole state."""
    h_new, h_old, z_new, z_old = torch.randn(4, 2, 5, dtype=torch.float64)
    h_new.requires_grad_(True)
    P = two_point(h_new, h_new - z_new, h_old, h_old - z_old)
    (gradient,) = torch.autograd.grad(P.sum(), h_new)
    assert torch.allclose(gradient, gradient[:, :1].expand_as(gradient))


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux reports it")
def test_the_window_holds_at_most_two_m_plus_two_states():
    code = "from evidence.speed import DRY, solver_overhead as measured\n"
    code += "print(measured(DRY, (1, 10**7))['window_states'])"
    here = Path(__file__).parents[1]
    out = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True)
    assert float(out.stdout) <= 2 * 6 + 2 + 0.1  # and a tenth for the process itself
