r"""The losses: of a student along and off the teacher's trajectory, and of a teacher.

Paper: Sec. 3.4, App. B.4.

    L_global = E d(g(z_k, t_k, x), z_K)                                                        (9)
    L_local  = E d(g(z_k, t_k, x), stopgrad g_ema(z_j, t_j, x))                               (10)
    L_task   = E CE(head(h(z_k, t_k, x)), y), k among the first steps                         (14)
    L        = lam1 L_global + (1 - lam1) L_local + lam2 L_task [+ L_rollout]                 (11)

d is the squared error relative to the reference's own mean square, per sample and branch: scales
differ between branches, and one of them would otherwise be most of the loss.

Departs from the paper, each by its own flag: j = k + 1, the *better* prediction, where (10) has
j = k - 1, as consistency models pull the farther point toward the nearer one. L_rollout is (9) on
states that the student itself reached, which is where multi-step inference asks it.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from anderson import anderson
from models import Equilibrium
from student import History, Student


def distance(a: Tensor, b: Tensor, cell: nn.Module, kind: str = "mse") -> Tensor:
    """d(a, b) of states (B, ...), relative to b, mean over branches: (B,) fp32.

    kind "huber" is the pseudo-Huber norm, linear where the relative error is above one tenth.
    """
    total = 0.0
    for p, q in zip(cell.features(a), cell.features(b), strict=True):
        p, q = p.flatten(1).float(), q.flatten(1).float()
        error = (p - q).square().mean(1) / (q.square().mean(1) + 1e-12)
        if kind == "huber":
            error = 0.2 * ((error + 0.01).sqrt() - 0.1)
        total = total + error
    return total / len(cell.channels)


def total(terms: dict[str, Tensor], lam1: float, lam2: float, rollout: float) -> Tensor:
    """The weighted sum of whichever of the terms are there."""
    weights = {"global": lam1, "local": 1 - lam1, "task": lam2, "rollout": rollout}
    return sum(weights[name] * term for name, term in terms.items())  # Eq. 11


class Distillation(nn.Module):
    """The student's unweighted loss terms on a batch of trajectory states (Alg. 2, l. 4-6).

    teacher: frozen, gives u and the head. ema: the running average of the student. The options
    are those of train.Config with the same names.
    """

    def __init__(self, teacher: Equilibrium, student: Student, ema: Student, kind: str = "mse"):
        super().__init__()
        self.teacher, self.student, self.ema, self.kind = teacher, student, ema, kind

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        k: Tensor,
        j: Tensor,
        states: tuple[Tensor, ...],
        early: Tensor | None,
        rollout: list[float] | None,
    ) -> dict[str, Tensor]:
        """x, y (B, ...); k and j (B,), the step and its local target's; states (z_{k-1}, z_k,
        z_{j-1}, z_j, z_K), each (B, ...); early (B,): weights of the task loss, or None;
        rollout: times t_0 .. t_J of the student's own run, or None."""
        student, times = self.student, self.student.times
        z_before, z_k, z_j_before, z_j, z_K = states
        before, j_before = (k - 1).clamp(min=0), (j - 1).clamp(min=0)
        with torch.no_grad():
            u = self.teacher.inject(x)
            target = self.ema.g(z_j, z_j_before, times.t(j), times.t(j_before), u)
        history = student.history(z_before, times.t(before), u) if student.anderson else None
        g, (h, _) = student.step(z_k, times.t(k), u, history)
        terms = {
            "global": distance(g, z_K, student.cell, self.kind).mean(),  # Eq. 9; Alg. 2, l. 4
            "local": distance(g, target, student.cell, self.kind).mean(),  # Eq. 10; Alg. 2, l. 6
        }
        if early is not None:
            terms["task"] = (early * self.teacher.nll(h, y)).mean()  # Eq. 14
        if rollout is not None:
            z, history = run(student, self.teacher.initial(u), u, rollout[:-1])
            g, _ = student.step(z, rollout[-1], u, history)
            terms["rollout"] = distance(g, z_K, student.cell, self.kind).mean()
        return terms


@torch.no_grad()
def run(student: Student, z: Tensor, u: Tensor, times: list[float]) -> tuple[Tensor, History]:
    """Alg. 1 over the given times, without gradient: where the student stands, and its history."""
    history = None
    for t in times:
        z, history = student.step(z, t, u, history)
    return z, history


class TeacherLoss(nn.Module):
    """The DEQ's own training loss: equilibrium by Anderson, gradient by a few unrolled steps.

    steps: solver evaluations without gradient. phantom, tau: differentiable steps
    z <- tau f(z) + (1 - tau) z after them (Geng et al., 2021; one is Jacobian-free, Fung et al.,
    2022): ordinary autograd, the same under DDP, its memory independent of `steps`.
    """

    def __init__(self, net: Equilibrium, steps: int, phantom: int, tau: float, **solver):
        super().__init__()
        self.net, self.steps, self.phantom, self.tau, self.solver = net, steps, phantom, tau, solver

    def forward(self, x: Tensor, y: Tensor, probe: Tensor | None) -> dict[str, Tensor]:
        """probe (B, state...): direction of the Jacobian estimate, or None for no estimate."""
        net = self.net
        u = net.inject(x)
        z = anderson(
            lambda z: net.f(z, u),
            net.initial(u),
            self.steps,
            last=True,
            sample_dims=net.sample_dims,
            **self.solver,
        )
        terms = {}
        with parametrize.cached():
            if probe is not None:  # |v^T J|^2 / n estimates |J|_F^2 / n (Bai et al., 2021b)
                z_in = z.requires_grad_(True)
                f_z = net.cell.join(net.cell.forward(z_in, u))  # not compiled: differentiated twice
                (vjp,) = torch.autograd.grad(f_z, z_in, probe, create_graph=True)
                terms["jacobian"] = vjp.square().mean()
                z = z.detach()
            for _ in range(self.phantom):
                z = torch.lerp(z, net.f(z, u), self.tau)
        return {"task": net.nll(z, y).mean(), **terms}
