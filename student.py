r"""The C-DEQ student: one teacher-like layer that maps any state of a trajectory to its end.

Paper: Sec. 3.3.

    g(z, t, x) = c_skip(t) z + c_out(t) P(z, t, x),  c_skip = s^gamma, c_out = 1 - s^gamma     (5)
    P(z_k, t_k, x) = S_AA(z_k, z_{k-1}; h, x), the two-state Anderson step over h              (7)
    h(z, t, x) = W [f'(z, x) || t]                                                             (8)

with s = (t - eps) / (T - eps). W acts on each branch's channels: W [f' || t] = W_f f' + w_t s + b,
so nothing is ever concatenated. W_f starts as the identity, w_t and b as zero and f' as a copy of
the teacher's f: a fresh student's P *is* one Anderson step of the teacher.

Shapes: z, h, P, g (B, state...); t (B,) fp32, or a number.

Weights that the teacher constrains so that it has an equilibrium (weight norm, kappa) are free in
the student, which need not be a contraction: P has to overshoot z*.

Departs from the paper: at k = 0 there is no history and P = h, as in Alg. 1, line 1. Writing this
as z_{-1} = z_0 needs no special case, since a repeated state makes S_AA the plain step. With
`start`, h is not evaluated at z_0 at time t_0 but at a guess of z* that a small network computes
from u, as in HyperDEQ: no single W can carry z_0 = 0 to z* and also leave z* where it is.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from anderson import two_point
from fpode import TimeMap
from models import Equilibrium

Time = Tensor | float  # of each sample, (B,), or of all
# h(z_{j-1}, t_{j-1}, x) and its residual h - z_{j-1}, kept from the step before
History = tuple[Tensor, Tensor] | None


class Student(nn.Module):
    """g, P and h, distilled from one teacher. The head stays the teacher's, frozen, and so does the
    injection unless the student has its own.

    gamma >= 1: exponent of c_skip. anderson=False drops Eq. 7 and takes P = h (Fig. 3's ablation).
    own_injection: train a copy of the teacher's injection instead of sharing it. start: a guess in
    place of z_0; a fresh one is 0.
    """

    def __init__(
        self,
        teacher: Equilibrium,
        times: TimeMap,
        gamma: float = 1.0,
        anderson: bool = True,
        own_injection: bool = False,
        start: bool = False,
    ):
        super().__init__()
        self.times, self.gamma, self.anderson = times, gamma, anderson
        self.two_point = dict(sample_dims=teacher.sample_dims)
        self.memory = teacher.memory
        self.cell = fold(copy.deepcopy(teacher.cell)).requires_grad_(True)
        self.W = nn.ModuleList(nn.Linear(C, C) for C in self.cell.channels)
        self.w_t = nn.ParameterList(torch.zeros(C) for C in self.cell.channels)
        for W in self.W:
            nn.init.eye_(W.weight)
            nn.init.zeros_(W.bias)
        self.start = self.cell.start() if start else None
        if self.start is not None:
            for p in self.start.out.parameters():
                nn.init.zeros_(p)
        self.own_injection = own_injection
        if own_injection:
            self.injection = fold(copy.deepcopy(teacher.injection)).requires_grad_(True)
        self.shared = (teacher.injection,)  # in a tuple: no part of this module

    def inject(self, x: Tensor, memory=None) -> Tensor:
        """The injection u for h, once per input; arguments as in Equilibrium.inject."""
        injection = self.injection if self.own_injection else self.shared[0]
        return injection(x) if memory is None else injection(x, memory)

    def h(self, z: Tensor, t: Time, u: Tensor) -> Tensor:
        """The time-aware layer: one NFE."""
        s, out = self.times.s(t), []
        for v, W, w_t in zip(self.cell(z, u), self.W, self.w_t, strict=True):
            if isinstance(s, Tensor):
                out.append(W(v) + per_sample(s, v) * w_t)
            else:  # one time for all samples: the bias takes it up
                out.append(F.linear(v, W.weight, torch.add(W.bias, w_t, alpha=s)))
        return self.cell.join(out)  # Eq. 8

    def step(
        self, z: Tensor, t: Time, u: Tensor, history: History = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """g at (z, t), given the history of the step before; also returns this one's: one NFE."""
        now = self.history(z, t, u)
        P = now[0]
        if history is not None and self.anderson:
            P = two_point(*now, *history, **self.two_point)  # Eq. 7
        c_skip = self.times.s(t) ** self.gamma
        if isinstance(c_skip, Tensor):
            c_skip = per_sample(c_skip, z)
        elif c_skip == 0:  # the first step of an inference keeps nothing of z_0
            return P, now
        return torch.lerp(P, z, c_skip), now  # Eq. 5

    def begin(self, z: Tensor, t: Time, u: Tensor) -> Tensor:
        """Where h is evaluated: at z, but at time t_0 at the start's guess, if there is a start."""
        s = self.times.s(t)
        if self.start is None:
            return z
        if isinstance(s, Tensor):
            return torch.where(per_sample(s, z) == 0, self.guess(u), z)
        return z if s else self.guess(u)

    def guess(self, u: Tensor) -> Tensor:
        return self.cell.join(self.start(u))

    def history(self, z: Tensor, t: Time, u: Tensor) -> tuple[Tensor, Tensor]:
        """h and its residual at this state, which the next `step` needs: one NFE."""
        z = self.begin(z, t, u)
        h = self.h(z, t, u)
        return h, h - z

    def g(self, z: Tensor, z_prev: Tensor, t: Time, t_prev: Time, u: Tensor) -> Tensor:
        """The consistency map from two states of a trajectory: two NFE (one without Anderson)."""
        history = self.history(z_prev, t_prev, u) if self.anderson else None
        return self.step(z, t, u, history)[0]


def per_sample(s: Tensor, v: Tensor) -> Tensor:
    """One number per sample, shaped to multiply v (B, ...); stays fp32 if v is bf16."""
    return s.to(torch.promote_types(s.dtype, v.dtype)).view(-1, *[1] * (v.dim() - 1))


def fold(module: nn.Module) -> nn.Module:
    """Turns weights that are computed from others (weight norm, ...) into plain parameters."""
    for part in list(module.modules()):
        if parametrize.is_parametrized(part):
            # torch's remove_parametrizations would strip the class, which copies share.
            values = {name: getattr(part, name).detach() for name in part.parametrizations}
            del part.parametrizations
            part.__class__ = type(part).__base__
            for name, value in values.items():
                part.register_parameter(name, nn.Parameter(value.clone()))
    return module


@torch.no_grad()
def update_ema(ema: nn.Module, online: nn.Module, mu: float) -> None:
    """phi^- <- mu phi^- + (1 - mu) phi, in place; buffers are copied."""
    torch._foreach_lerp_(list(ema.parameters()), list(online.parameters()), 1 - mu)
    for kept, new in zip(ema.buffers(), online.buffers(), strict=True):
        kept.copy_(new)
