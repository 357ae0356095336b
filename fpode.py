r"""The fixed-point ODE, the map from solver steps to virtual time, the inference schedule.

Paper: Sec. 3.1, Sec. 3.3 (time mapping), App. B.3.

    dz_t / dt = f(z_t, x) - z_t                                                               (2)
    t_k = eps + (1 - e^(-rho k)) (T - eps), k = 0 .. K: times of the teacher's trajectory      (6)
    t_j = eps + (1 - decay^j) (T - eps), j = 0 .. J-1: times of a J-step inference          (B.3)

The steady state of (2) is the equilibrium. Picard iteration is Euler's method on it with step 1;
Anderson acceleration is a multistep method with weights fitted to the residuals.

Only s = (t - eps) / (T - eps) in [0, 1] ever reaches a network or a coefficient: eps and T are the
units of the clock. All times are fp32: in bf16, neighbouring t_k are equal.

Departs from the paper: it gives no values for rho, eps and T. Here rho is measured, see
`propose_rho`. The schedule's base, a second beta in the paper, is called `decay`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anderson import Map


def field(f: Map) -> Map:
    """The vector field of the FP-ODE, z -> f(z) - z."""
    return lambda z: f(z) - z  # Eq. 2


@torch.no_grad()
def euler(f: Map, z0: Tensor, K: int, *, h: float = 1.0) -> Tensor:
    """K Euler steps of length h from z0: states (K + 1, *z0.shape), K evaluations of f."""
    v = field(f)
    return _march(lambda z: z + h * v(z), z0, K)


@torch.no_grad()
def rk4(f: Map, z0: Tensor, K: int, *, h: float = 1.0) -> Tensor:
    """K classical Runge-Kutta steps of length h: states (K + 1, *z0.shape), 4 K evaluations."""
    v = field(f)

    def step(z: Tensor) -> Tensor:
        k1 = v(z)
        k2 = v(z + h / 2 * k1)
        k3 = v(z + h / 2 * k2)
        k4 = v(z + h * k3)
        return z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)

    return _march(step, z0, K)


def _march(step: Callable[[Tensor], Tensor], z0: Tensor, K: int) -> Tensor:
    states = [z0]
    for _ in range(K):
        states.append(step(states[-1]))
    return torch.stack(states)


@dataclass(frozen=True)
class TimeMap:
    """The clock of a trajectory of K solver steps: t_k (Eq. 6), and s in [0, 1].

    Raises ValueError where rho K is so large that fp32 times stop growing before step K.
    """

    rho: float
    K: int
    eps: float = 0.002
    T: float = 5.0

    def __post_init__(self):
        if not (self.rho > 0 and self.K >= 1 and 0 <= self.eps < self.T):
            raise ValueError(f"need rho > 0, K >= 1 and 0 <= eps < T; got {self}")
        if not bool((self.t(torch.arange(self.K + 1)).diff() > 0).all()):
            raise ValueError(
                f"rho * K = {self.rho * self.K:g} is too large: fp32 times stop growing before "
                f"k = {self.K}; take rho <= {12 / self.K:.3g}"
            )

    def t(self, k: Tensor) -> Tensor:
        """Solver steps (any shape, integer) -> virtual times, fp32."""
        return self.eps + (1 - torch.exp(-self.rho * k.float())) * (self.T - self.eps)  # Eq. 6

    def s(self, t: Tensor | float) -> Tensor | float:
        """Virtual times -> fractions of the way to the equilibrium, in [0, 1]."""
        return (t - self.eps) / (self.T - self.eps)

    def schedule(self, J: int, decay: float) -> list[float]:
        """Times t_0 .. t_{J-1} of a J-step inference; a prefix of any longer one."""
        if J < 1 or not 0 < decay < 1:
            raise ValueError(f"need J >= 1 and 0 < decay < 1; got {J=}, {decay=}")
        return [self.eps + (1 - decay**j) * (self.T - self.eps) for j in range(J)]  # App. B.3


def contraction(states: Sequence[Tensor], sample_dims: int = 1, floor: float = 1e-3) -> float:
    """Measured error factor per solver step of states z_0 .. z_K, each (B, ...), median over
    problems.

    |z_k - z_K| / |z_0 - z_K| is followed until it drops below `floor`, where z_K can no longer
    stand for z*; the factor is the geometric mean of its decrease per step up to there.
    """
    gaps = ((z.float() - states[-1].float()).flatten(sample_dims) for z in states)
    error = torch.stack([torch.linalg.vector_norm(gap, dim=-1).flatten() for gap in gaps])
    relative = error[:-1] / (error[0] + torch.finfo(error.dtype).tiny)
    above = (relative > floor).cumprod(0)
    steps = (above.sum(0) - 1).clamp(min=1)
    end = relative.gather(0, steps[None].clamp(max=len(relative) - 1))[0]
    return float((end.clamp(min=1e-12) ** (1 / steps)).median())


def propose_rho(rate: float, K: int) -> float:
    """The largest safe rho of Eq. 6 for a teacher that contracts by `rate` per step.

    g keeps 1 - e^(-rho k) of z_k (Eq. 5), so P must overshoot z* by e^(rho k) - 1 times the error
    that is left. This stays bounded only if e^rho <= 1 / rate. The bound ln(50) / K keeps s_K at
    .98 or below, so that late steps still have times of their own.
    """
    bounds = [math.log(50) / K]
    if 0 < rate < 1:
        bounds.append(-math.log(rate))
    return min(bounds)
