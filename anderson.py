r"""Fixed-point solvers: Picard, Anderson acceleration and its two-state closed form.

Paper: Sec. 3.1-3.3, Def. 3.1, App. B.1, Alg. 3. A solver starts at z_0 and looks for an
equilibrium

    z* = f(z*, x)                                                                              (1)

    z_{k+1} = S_AA({z_i}; f, x), the last m_k + 1 states i = k - m_k .. k                     (3)
            = beta sum_i a_i f(z_i) + (1 - beta) sum_i a_i z_i                          (4), (12)
    a = argmin |sum_i a_i r_i|  subject to  sum_i a_i = 1,  with residuals r_i = f(z_i) - z_i
    P = S_AA(z_k, z_{k-1}; h): two states, so the one free weight has a closed form           (7)

Shapes: z is (P..., state...). Its first `sample_dims` dimensions index P independent problems,
each with weights of its own; all other dimensions are one state of n numbers.

One step of `anderson` reads the window twice (a Gram row, a combination) and makes seven more
passes over the state: 2m + 7. It holds 2m + 2 states: m values, m residuals, the old and the new.

Departs from the paper: `m` counts the states in the window (the paper's m_k + 1), as in all public
DEQ code. The ridge of the least squares is relative to the residuals' size: an absolute one swamps
small residuals, and Anderson is then slower than Picard.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils import parametrize

Map = Callable[[Tensor], Tensor]


class Counter:
    """Wraps an f-sized map and counts its evaluations: the NFE of every table."""

    def __init__(self, f: Callable[..., Tensor]):
        self.f, self.nfe = f, 0

    def __call__(self, *args) -> Tensor:
        self.nfe += 1
        return self.f(*args)


def picard(f: Map, z0: Tensor, K: int, *, sample_dims: int = 1, **options) -> Tensor:
    """z_{k+1} = f(z_k): exactly K evaluations of f; `options` and result as in `iterate`."""
    P = math.prod(z0.shape[:sample_dims])

    def step(z: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        f_z = f(z)
        gap = torch.linalg.vector_norm((f_z - z).reshape(P, -1), dim=1, dtype=accumulator(z))
        return f_z, f_z, gap.square()

    return iterate(step, z0, K, sample_dims=sample_dims, **options)


def anderson(
    f: Map,
    z0: Tensor,
    K: int,
    *,
    m: int = 6,
    beta: float = 1.0,
    ridge: float = 1e-6,
    sample_dims: int = 1,
    **options,
) -> Tensor:
    """Anderson acceleration (Alg. 3): exactly K evaluations of f for K steps.

    m: states in the window; beta in (0, 1]: mixing; ridge: relative to the mean squared residual.
    `options` (tol, last) and result as in `iterate`. Window and weights are kept in fp32 (fp64 for
    fp64 states) whatever the dtype of z.
    """
    if m < 1 or not 0 < beta <= 1 or ridge < 0:
        raise ValueError(f"need m >= 1, 0 < beta <= 1, ridge >= 0; got {m=}, {beta=}, {ridge=}")
    P = math.prod(z0.shape[:sample_dims])
    m = max(1, min(m, K))
    F = torch.empty(P, m, z0.numel() // P, dtype=accumulator(z0), device=z0.device)
    R, G = torch.empty_like(F), F.new_zeros(P, m, m)
    states = F.new_empty(2, P, 1, F.shape[2])  # old and new take turns: no allocation

    def step(z: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        slot, used = k % m, min(k + 1, m)  # Alg. 3, l. 4
        F[:, slot] = f(z).reshape(P, -1)
        with torch.autocast(z.device.type, enabled=False):  # f's own; bmm would be bf16 in it
            torch.sub(F[:, slot], z.reshape(P, -1), out=R[:, slot])
            # Only the newest residual changes the Gram matrix: one row, not m of them.
            row = torch.bmm(R[:, slot, None], R[:, :used].mT)[:, 0]
            G[:, slot, :used] = G[:, :used, slot] = row
            alpha = window_weights(G[:, :used, :used], ridge)[:, None]  # Alg. 3, l. 5
            z_next = torch.bmm(alpha, F[:, :used], out=states[k % 2])  # Eq. 4
            if beta != 1:  # sum a z = sum a (f - r): the old states themselves are never needed
                z_next -= (1 - beta) * torch.bmm(alpha, R[:, :used])  # Eq. 12; Alg. 3, l. 6
        return z_next.view_as(z).to(z.dtype), F[:, slot].view_as(z), row[:, slot]  # Eq. 3

    return iterate(step, z0, K, sample_dims=sample_dims, **options)


def window_weights(gram: Tensor, ridge: float) -> Tensor:
    """argmin |R a| with sum(a) = 1, from gram = R R^T: (P, n, n) -> (P, n). No GPU wait."""
    scale = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    info = torch.finfo(gram.dtype)
    # The floors keep a window of zero residuals (a solved problem) regular: equal weights.
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    system = gram / (scale + info.tiny) + (ridge + info.eps) * eye
    alpha, _ = torch.linalg.solve_ex(system, torch.ones_like(gram[..., 0]))
    return alpha / alpha.sum(1, keepdim=True)


def two_point(
    h_new: Tensor,
    r_new: Tensor,
    h_old: Tensor,
    r_old: Tensor,
    *,
    sample_dims: int = 1,
    ridge: float = 1e-6,
) -> Tensor:
    """The Anderson step from two states, S_AA(z_new, z_old; h) of Eq. 7; shape of h_new.

    h: values at the states; r = h - z: their residuals. With d = r_new - r_old, the weight of the
    *older* state is <r_new, d> / |d|^2, so that a repeated state (d = 0) gives the plain step
    h_new. No gradient flows through the weight.
    """
    with torch.no_grad():
        # <r_new, d> by polarisation, from three norms: quicker than a dot product over the batch,
        # and exactly zero for a repeated state.
        new, old, step = (
            torch.linalg.vector_norm(v.flatten(sample_dims), dim=-1, dtype=accumulator(v)).square()
            for v in (r_new, r_old, r_new - r_old)
        )
        a_old = (new - old + step) / 2
        a_old = a_old / (step + ridge * (new + old) + torch.finfo(step.dtype).tiny)
        a_old = a_old.to(h_new.dtype).view(*a_old.shape, *[1] * (h_new.dim() - sample_dims))
    return torch.lerp(h_new, h_old, a_old)  # Eq. 7


def accumulator(z: Tensor) -> torch.dtype:
    """The dtype in which norms, Gram matrices and weights of z are computed: fp32 or fp64."""
    return torch.promote_types(z.dtype, torch.float32)


@torch.no_grad()
@parametrize.cached()  # weight normalisation and the like: once per solve, not per step
def iterate(
    step: Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]],
    z0: Tensor,
    K: int,
    *,
    tol: float = 0.0,
    sample_dims: int = 1,
    last: bool = False,
) -> Tensor:
    """Drives any solver: K steps of step(z_k, k) -> (z_{k+1}, f(z_k), |f(z_k) - z_k|^2 (P,)).

    Returns all states z_0 .. z_K as (K + 1, *z0.shape), or z_K alone with `last`.
    tol > 0: a problem whose relative residual |f(z) - z| / |f(z)| falls below tol is frozen; its
      answer, and that of a problem which never gets there, is the f(z) of its smallest residual.
      Costs one host synchronisation a step; without tol there is none before the end.
    Raises FloatingPointError naming the first step and problem at which f is not finite.
    """
    if K < 1 or tol < 0:
        raise ValueError(f"need K >= 1 and tol >= 0; got {K=}, {tol=}")
    if not last:
        trajectory = z0.new_empty(K + 1, *z0.shape)
        trajectory[0] = z0
    problems = z0.shape[:sample_dims]
    spread = (*problems, *[1] * (z0.dim() - sample_dims))  # per-problem numbers against z
    first_bad = torch.full((math.prod(problems),), K, device=z0.device)
    best = first_bad.new_full(first_bad.shape, math.inf, dtype=accumulator(z0))
    z = answer = z0
    for k in range(K):
        z, f_z, squared = step(z, k)
        first_bad = torch.where(squared.isfinite(), K, k).minimum(first_bad)
        if tol > 0:
            size = torch.linalg.vector_norm(f_z.reshape(*best.shape, -1), dim=-1)
            residual = squared.sqrt() / (size + torch.finfo(size.dtype).tiny)
            better = (residual < best) & (best >= tol)  # a frozen answer stays as it is
            answer = torch.where(better.view(spread), f_z.to(z.dtype), answer)
            best = torch.where(better, residual, best)
            z = torch.where(((best < tol) | (k == K - 1)).view(spread), answer, z)
        if not last:
            trajectory[k + 1] = z
        if tol > 0 and bool((best < tol).all()):
            if not last:
                trajectory[k + 2 :] = z
            break
    refuse_not_finite(first_bad, K)
    return z if last else trajectory


def refuse_not_finite(first_bad: Tensor, K: int) -> None:
    """FloatingPointError if any problem's first bad step (P,) came before K. Here, and only here,
    a solve waits for the device."""
    step = int(first_bad.min())
    if step < K:
        where = int((first_bad == step).nonzero()[0])
        raise FloatingPointError(f"f is not finite at solver step {step + 1}, sample {where}")
