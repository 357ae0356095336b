r"""The losses of a student, on its own run or on the teacher's trajectory, and of a teacher.

Paper: Sec. 3.4, App. B.4.

    L_global = E d(g(z_k, t_k, x), z_K)                                                        (9)
    L_local  = E d(g(z_k, t_k, x), stopgrad g_ema(z_{k-1}, t_{k-1}, x))                       (10)
    L_task   = E CE(head(h(z_k, t_k, x)), y), k among the first steps                         (14)
    L        = lam1 L_global + (1 - lam1) L_local + lam2 L_task                               (11)

d is the squared error divided by the reference's mean square, per sample and branch. Branches have
different scales, and without the division one of them would make up most of the loss.

Departs from the paper: these four losses are the recipe `paper`. The default recipe trains the
student at the states that inference visits, those of its own run of Alg. 1 from t_0 on, and only
there. L_distance is (9) at these states. L_prediction is KL(p || q), where p is the head's
prediction at z_K and q the one at the student's answer; it knows which errors of a state matter.
Neither needs labels. L_start = d(start(u), z_K) trains the start, as in HyperDEQ: f contracts, so
little of the gradient of (9) reaches the start through it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from models import Equilibrium
from student import Student

TOKENS = 512  # of each batch of a text have their predictions compared
EARLY = 0.25  # Eq. 14: the task loss applies to this first share of the steps


@dataclass(frozen=True)
class OwnRunBatch:
    """The input of OwnRun: x and z_K (B, ...); times t_0 .. t_J of the run. Of a text, the first
    `past` positions (dimension 1) are only history for the others; their states are the teacher's
    equilibrium or, if `own`, the end of the student's run on them."""

    x: Tensor
    z_K: Tensor
    times: list[float]
    past: int = 0
    own: bool = False


@dataclass(frozen=True)
class TrajectoryBatch:
    """The input of Distillation: x, y (B, ...); k (B,); states (z_{k-2}, z_{k-1}, z_k, z_K), each
    (B, ...), with z_0 for z_{-1}; early (B,): weights of the task loss. Of a text, the first `past`
    positions (dimension 1) are only history for the others, at the teacher's equilibrium."""

    x: Tensor
    y: Tensor
    k: Tensor
    states: tuple[Tensor, ...]
    early: Tensor
    past: int = 0


@dataclass(frozen=True)
class TeacherBatch:
    """The input of TeacherLoss: x, y (B, ...); steps of Picard's iteration from z_0, without
    gradient; layers of f after them, with gradient; probe (B, state...): the direction of the
    Jacobian estimate, or None for no estimate."""

    x: Tensor
    y: Tensor
    steps: int
    layers: int
    probe: Tensor | None = None


def distance(a: Tensor, b: Tensor, cell: nn.Module) -> Tensor:
    """d(a, b) of states (B, ...), relative to b, mean over branches: (B,) fp32."""
    total = 0.0
    for p, q in zip(cell.features(a), cell.features(b), strict=True):
        p, q = p.flatten(1).float(), q.flatten(1).float()
        total = total + (p - q).square().mean(1) / (q.square().mean(1) + 1e-12)
    return total / len(cell.channels)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q), nats, the mean over predictions: log_p, log_q (..., classes)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def weights(recipe: str, lam1: float, lam2: float, kl: float) -> dict[str, float]:
    """The weight of each loss term of a recipe."""
    if recipe == "paper":
        return {"global": lam1, "local": 1 - lam1, "task": lam2}  # Eq. 11
    return {"distance": 1 - kl, "prediction": kl, "start": 1.0}


def early(K: int, k: Tensor) -> Tensor:
    """Weights of the task loss at steps k: 0 unless k is early; scaled so that their mean over k,
    uniform on 1 .. K, is 1."""
    last = math.ceil(EARLY * K)
    return (k <= last).float() * K / last


class OwnRun(nn.Module):
    """The unweighted loss terms of the default recipe, at the states of the student's own run of
    Alg. 1. teacher: frozen, for its head and its memory."""

    def __init__(self, teacher: Equilibrium, student: Student):
        super().__init__()
        self.teacher, self.student = teacher, student

    def forward(self, batch: OwnRunBatch) -> dict[str, Tensor]:
        """Means over the states of the run. No gradient flows from one step into the one before."""
        x, z_K, past, student, memory = batch.x, batch.z_K, batch.past, self.student, None
        if past:
            u, z = student.inject(x[:, :past]), z_K[:, :past]
            memory = self.teacher.remember(u, self.end(u, batch.times) if batch.own else z)
            x, z_K = x[:, past:], z_K[:, past:]
        u = student.inject(x, memory)
        compared = self.compared(z_K)
        with torch.no_grad():
            wanted = self.teacher.log_probabilities(compared(z_K))
        z, history = self.teacher.initial(u).detach(), None
        errors, gaps = [], []
        for t in batch.times:
            g, now = student.step(z, t, u, history)
            errors.append(distance(g, z_K, student.cell).mean())  # Eq. 9, on its own states
            gaps.append(divergence(wanted, self.teacher.log_probabilities(compared(g))))
            z, history = g.detach(), tuple(v.detach() for v in now)
        terms = {"distance": torch.stack(errors).mean(), "prediction": torch.stack(gaps).mean()}
        if student.start is not None:
            terms["start"] = distance(student.guess(u), z_K, student.cell).mean()
        return terms

    def compared(self, z: Tensor) -> Callable[[Tensor], Tensor]:
        """A function that selects the states whose predictions are compared: all of them or, of a
        text, TOKENS at random, since a softmax over tens of thousands of words costs more than f.
        """
        if self.teacher.sample_dims == 1:
            return lambda z: z
        rows = torch.randperm(z.shape[0] * z.shape[1])[:TOKENS]
        rows = rows.pin_memory().to(z.device, non_blocking=True) if z.is_cuda else rows
        return lambda z: z.flatten(0, 1)[rows][None]

    @torch.no_grad()
    def end(self, u: Tensor, times: list[float]) -> Tensor:
        """The last state of the student's own run of Alg. 1."""
        z, history = self.teacher.initial(u), None
        for t in times:
            z, history = self.student.step(z, t, u, history)
        return z


class Distillation(nn.Module):
    """The unweighted loss terms of the recipe `paper`, at states of the teacher's trajectory
    (Alg. 2). teacher: frozen, for its head and its memory; ema: the running average phi^-."""

    def __init__(self, teacher: Equilibrium, student: Student, ema: Student):
        super().__init__()
        self.teacher, self.student, self.ema = teacher, student, ema

    def forward(self, batch: TrajectoryBatch) -> dict[str, Tensor]:
        x, y, past, student, memory = batch.x, batch.y, batch.past, self.student, None
        if past:
            u, z_K = student.inject(x[:, :past]), batch.states[-1][:, :past]
            memory = self.teacher.remember(u, z_K)
            x, y = x[:, past:], y[:, past:]
        z_2, z_1, z_k, z_K = (z[:, past:] if past else z for z in batch.states)
        t_2, t_1, t_k = (student.times.t((batch.k - back).clamp(min=0)) for back in (2, 1, 0))
        with torch.no_grad():
            target = self.ema.g(z_1, z_2, t_1, t_2, self.ema.inject(x, memory))
        u = student.inject(x, memory)
        history = student.history(z_1, t_1, u) if student.anderson else None
        g, (h, _) = student.step(z_k, t_k, u, history)
        return {
            "global": distance(g, z_K, student.cell).mean(),  # Eq. 9; Alg. 2, l. 4
            "local": distance(g, target, student.cell).mean(),  # Eq. 10; Alg. 2, l. 6
            "task": (batch.early * self.teacher.nll(h, y)).mean(),  # Eq. 14
        }


class TeacherLoss(nn.Module):
    """The loss that trains a DEQ: evaluations of f without gradient, then a few layers with it.

    After many evaluations, the layers give a phantom gradient at the equilibrium (Geng et al.,
    2021; with a single layer it is Jacobian-free, Fung et al., 2022). After none, they are an
    unrolled network. Both are ordinary autograd, which works under DDP, and the memory that they
    need does not depend on the evaluations before.
    """

    def __init__(self, net: Equilibrium):
        super().__init__()
        self.net = net

    def forward(self, batch: TeacherBatch) -> dict[str, Tensor]:
        net, probe = self.net, batch.probe
        net.redraw()
        u = net.inject(batch.x)
        z, terms = net.initial(u), {}
        with torch.no_grad(), parametrize.cached():  # weights without gradient, not kept for below
            for _ in range(batch.steps):
                z = net.f(z, u)
        with parametrize.cached():
            if probe is not None:  # |v^T J|^2 / n estimates |J|_F^2 / n (Bai et al., 2021b)
                z_in = z.requires_grad_(True)
                f_z = net.cell.join(net.cell.forward(z_in, u))  # not compiled: differentiated twice
                (vjp,) = torch.autograd.grad(f_z, z_in, probe, create_graph=True)
                terms["jacobian"] = vjp.float().square().mean()
                z = z.detach()
            for _ in range(batch.layers):
                z = net.f(z, u)
        return {"task": net.nll(z, batch.y).mean(), **terms}
