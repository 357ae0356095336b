r"""The losses: of a student on its own run or on the teacher's trajectory, and of a teacher.

Paper: Sec. 3.4, App. B.4.

    L_global = E d(g(z_k, t_k, x), z_K)                                                        (9)
    L_local  = E d(g(z_k, t_k, x), stopgrad g_ema(z_{k-1}, t_{k-1}, x))                       (10)
    L_task   = E CE(head(h(z_k, t_k, x)), y), k among the first steps                         (14)
    L        = lam1 L_global + (1 - lam1) L_local + lam2 L_task                               (11)

d is the squared error relative to the reference's own mean square, per sample and branch: scales
differ between branches, and one of them would otherwise be most of the loss.

Departs from the paper: these four are the recipe `paper`. The default one trains the student where
it is asked, at every state of its own run of Alg. 1 from t_0 on, and nowhere else: L_distance is
(9) there, and L_prediction the divergence KL(p || q) of its prediction q from the head's prediction
p at z_K. The latter knows which errors of a state matter. Neither needs labels. L_start is
d(start(u), z_K), HyperDEQ's: f contracts, so that little of (9) comes back through it to a start.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from models import Equilibrium
from student import Student

TOKENS = 512  # of a text's batch, whose predictions are compared
EARLY = 0.25  # Eq. 14: the first share of steps, which have the task loss


@dataclass(frozen=True)
class OwnRunBatch:
    """What OwnRun wants of a part of a batch: x and z_K (B, ...); times t_0 .. t_J of the run;
    past: positions (dimension 1) that are the others' history, with the teacher's equilibrium or,
    if `own`, the end of the student's run."""

    x: Tensor
    z_K: Tensor
    times: list[float]
    past: int = 0
    own: bool = False


@dataclass(frozen=True)
class TrajectoryBatch:
    """What Distillation wants: x, y (B, ...); k (B,); states (z_{k-2}, z_{k-1}, z_k, z_K), each
    (B, ...), with z_0 for z_{-1}; early (B,): weights of the task loss; past: positions (dimension
    1) that are the others' history, with the teacher's equilibrium."""

    x: Tensor
    y: Tensor
    k: Tensor
    states: tuple[Tensor, ...]
    early: Tensor
    past: int = 0


@dataclass(frozen=True)
class TeacherBatch:
    """What TeacherLoss wants: x, y (B, ...); steps of Picard's iteration from z_0; layers of f
    after them, which have the gradient; probe (B, state...): direction of the Jacobian estimate, or
    None for no estimate."""

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
    """What each of a recipe's loss terms counts in their sum."""
    if recipe == "paper":
        return {"global": lam1, "local": 1 - lam1, "task": lam2}  # Eq. 11
    return {"distance": 1 - kl, "prediction": kl, "start": 1.0}


def early(K: int, k: Tensor) -> Tensor:
    """Weights of the task loss at steps k, uniform on 1 .. K: 0 where k is not early, else such
    that their mean over draws is 1."""
    last = math.ceil(EARLY * K)
    return (k <= last).float() * K / last


class OwnRun(nn.Module):
    """The default recipe's unweighted loss terms: at the states of the student's run of Alg. 1.

    teacher: frozen, gives the injection, the head and the states z_K.
    """

    def __init__(self, teacher: Equilibrium, student: Student):
        super().__init__()
        self.teacher, self.student = teacher, student

    def forward(self, batch: OwnRunBatch) -> dict[str, Tensor]:
        """Means over the run's states. No gradient goes from one step into the one before."""
        x, z_K, past, student, memory = batch.x, batch.z_K, batch.past, self.student, None
        if past:
            u, z = student.inject(x[:, :past]), z_K[:, :past]
            memory = self.teacher.remember(u, self.walk(u, batch.times) if batch.own else z)
            x, z_K = x[:, past:], z_K[:, past:]
        u = student.inject(x, memory)
        some = self.some(z_K)
        with torch.no_grad():
            wanted = self.teacher.log_probabilities(some(z_K))
        z, history = self.teacher.initial(u).detach(), None
        errors, gaps = [], []
        for t in batch.times:
            g, now = student.step(z, t, u, history)
            errors.append(distance(g, z_K, student.cell).mean())  # Eq. 9, on its own states
            gaps.append(divergence(wanted, self.teacher.log_probabilities(some(g))))
            z, history = g.detach(), tuple(v.detach() for v in now)
        terms = {"distance": torch.stack(errors).mean(), "prediction": torch.stack(gaps).mean()}
        if student.start is not None:
            terms["start"] = distance(student.guess(u), z_K, student.cell).mean()
        return terms

    def some(self, z: Tensor) -> Callable[[Tensor], Tensor]:
        """Picks the states whose predictions are compared: all, or so many of a text's tokens, at
        random. A softmax over ten thousands of words costs more than f."""
        if self.teacher.sample_dims == 1:
            return lambda z: z
        rows = torch.randperm(z.shape[0] * z.shape[1])[:TOKENS]
        rows = rows.pin_memory().to(z.device, non_blocking=True) if z.is_cuda else rows
        return lambda z: z.flatten(0, 1)[rows][None]

    @torch.no_grad()
    def walk(self, u: Tensor, times: list[float]) -> Tensor:
        """Where the student's own run of Alg. 1 arrives."""
        z, history = self.teacher.initial(u), None
        for t in times:
            z, history = self.student.step(z, t, u, history)
        return z


class Distillation(nn.Module):
    """The recipe `paper`: unweighted loss terms at states of the teacher's trajectory (Alg. 2).

    teacher: frozen, gives u and the head. ema: the running average of the student.
    """

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
    """The DEQ's own training loss: a few layers of f with gradient, after some without.

    Far from z_0 the layers are a phantom gradient at the equilibrium (Geng et al., 2021; a single
    one is Jacobian-free, Fung et al., 2022); at z_0 they are an unrolled network. Either way it is
    ordinary autograd, the same under DDP, its memory independent of the steps before.
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
