r"""The losses: of a student along and off the teacher's trajectory, and of a teacher.

Paper: Sec. 3.4, App. B.4.

    L_global = E d(g(z_k, t_k, x), z_K)                                                        (9)
    L_local  = E d(g(z_k, t_k, x), stopgrad g_ema(z_j, t_j, x))                               (10)
    L_task   = E CE(head(h(z_k, t_k, x)), y), k among the first steps                         (14)
    L        = lam1 L_global + (1 - lam1) L_local + lam2 L_task                               (11)

d is the squared error relative to the reference's own mean square, per sample and branch: scales
differ between branches, and one of them would otherwise be most of the loss.

Departs from the paper: these four are the recipe `paper`. The default one trains the student where
it is asked, at every state of its own run of Alg. 1 from t_0 on, and nowhere else: L_rollout is (9)
there, and L_prediction the divergence KL(p || q) of its prediction q from the head's prediction p
at z_K. The latter knows which errors of a state matter, and needs no labels. L_start is
d(start(u), z_K), HyperDEQ's: f contracts, so that little of (9) comes back through it to a start.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from models import Equilibrium
from models.learned_solver import LearnedSolver
from student import Student


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


def total(
    terms: dict[str, Tensor], lam1: float, lam2: float, trajectory: float, rollout: float, kl: float
) -> Tensor:
    """The weighted sum of whichever of the terms are there."""
    weights = {"global": lam1, "local": 1 - lam1, "task": lam2}  # Eq. 11
    weights = {name: trajectory * weight for name, weight in weights.items()}
    weights |= {"rollout": rollout, "prediction": kl, "start": 1.0}
    return sum(weights[name] * term for name, term in terms.items())


class Distillation(nn.Module):
    """The student's unweighted loss terms on a batch of trajectory states (Alg. 2, l. 4-6).

    teacher: frozen, gives u and the head. ema: the running average of the student. The options
    are those of config.Config with the same names; kind: `distance`.
    """

    def __init__(
        self, teacher: Equilibrium, student: Student, ema: Student, kind: str = "mse", kl=1.0
    ):
        super().__init__()
        self.teacher, self.student, self.ema = teacher, student, ema
        self.kind, self.kl = kind, kl

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        k: Tensor,
        j: Tensor,
        states: tuple[Tensor, ...],
        early: Tensor | None,
        rollout: list[float] | None,
        past: int = 0,
        own_memory: bool = False,
    ) -> dict[str, Tensor]:
        """x, y (B, ...); k and j (B,), the step and its local target's; states (z_{k-1}, z_k,
        z_{j-1}, z_j, z_K), each (B, ...), or (z_K,) for no loss on the teacher's states; early
        (B,): weights of the task loss, or None; rollout: times t_0 .. t_J of the student's own
        run, or None; past: positions (dimension 1) that are the others' history, with the teacher's
        equilibrium or, with own_memory, with what the student's own run makes of it."""
        memory, terms = None, {}
        if past:
            u, z = self.student.inject(x[:, :past]), states[-1][:, :past]
            memory = self.teacher.remember(u, self.walk(u, rollout) if own_memory else z)
            x, y, states = x[:, past:], y[:, past:], [z[:, past:] for z in states]
        u = self.student.inject(x, memory)
        if len(states) > 1:
            u_ema = self.ema.inject(x, memory) if self.student.own_injection else u
            terms |= self.on_trajectory(y, u, u_ema, k, j, states, early)
        if rollout is not None:
            terms |= self.own_states(u, rollout, states[-1])
        if self.student.start is not None:
            guess = self.student.guess(u)
            terms["start"] = distance(guess, states[-1], self.student.cell, self.kind).mean()
        return terms

    @torch.no_grad()
    def walk(self, u: Tensor, times: list[float]) -> Tensor:
        """Where the student's own run of Alg. 1 arrives."""
        z, history = self.teacher.initial(u), None
        for t in times:
            z, history = self.student.step(z, t, u, history)
        return z

    def on_trajectory(self, y, u, u_ema, k, j, states, early) -> dict[str, Tensor]:
        """Eqs. 9, 10 and 14 at the teacher's states; arguments as in `forward`."""
        student, times = self.student, self.student.times
        z_before, z_k, z_j_before, z_j, z_K = states
        before, j_before = (k - 1).clamp(min=0), (j - 1).clamp(min=0)
        with torch.no_grad():
            target = self.ema.g(z_j, z_j_before, times.t(j), times.t(j_before), u_ema)
        history = student.history(z_before, times.t(before), u) if student.anderson else None
        g, (h, _) = student.step(z_k, times.t(k), u, history)
        terms = {
            "global": distance(g, z_K, student.cell, self.kind).mean(),  # Eq. 9; Alg. 2, l. 4
            "local": distance(g, target, student.cell, self.kind).mean(),  # Eq. 10; Alg. 2, l. 6
        }
        if early is not None:
            terms["task"] = (early * self.teacher.nll(h, y)).mean()  # Eq. 14
        return terms

    def own_states(self, u: Tensor, times: list[float], z_K: Tensor) -> dict[str, Tensor]:
        """Eq. 9 where the student's own run of Alg. 1 stands, the mean over its states, and how far
        its predictions there are from the teacher's. No gradient goes from one step into the last.
        """
        errors, gaps = [], []
        if self.kl:
            with torch.no_grad():
                wanted = self.teacher.log_probabilities(z_K)
        z, history = self.teacher.initial(u).detach(), None
        for t in times:
            g, now = self.student.step(z, t, u, history)
            errors.append(distance(g, z_K, self.student.cell, self.kind).mean())
            if self.kl:
                gaps.append(divergence(wanted, self.teacher.log_probabilities(g)))
            z, history = g.detach(), tuple(v.detach() for v in now)
        terms = {"rollout": torch.stack(errors).mean()}
        return terms | ({"prediction": torch.stack(gaps).mean()} if self.kl else {})


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q), nats, the mean over predictions: log_p, log_q (..., classes)."""
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


class LearnedSolverLoss(nn.Module):
    """What trains a LearnedSolver (Bai et al., 2022): no labels, f frozen.

    steps: of its own run, each pulled to z_K, the k-th with a weight in proportion to k; no
    gradient goes through f or from one step into the last.
    """

    def __init__(self, solver: LearnedSolver, steps: int):
        super().__init__()
        self.solver, self.steps = solver, steps

    def forward(self, x: Tensor, z_K: Tensor, step: int) -> dict[str, Tensor]:
        """x, z_K (B, ...); step: of the training, for the vanishing weight of `residual`."""
        net, cell, solver = self.solver.teacher[0], self.solver.teacher[0].cell, self.solver
        with torch.no_grad():
            u = net.inject(x)
        z = solver.initial(u)
        terms = {"start": 5 * distance(z, z_K, cell).mean()}
        advance, path, mixed = solver.stepper(lambda z: net.f(z, u)), 0.0, 0.0
        for k in range(1, self.steps + 1):
            z, _, gap = advance(z.detach())
            weight = 2 * k / (self.steps * (self.steps + 1))
            path = path + weight * (distance(z, z_K, cell) + 1e-12).sqrt().mean()
            mixed = mixed + gap.abs().mean() / self.steps
        return terms | {"path": 0.1 * path, "residual": 1e-4 * max(1 - step / 1000, 0.005) * mixed}


class TeacherLoss(nn.Module):
    """The DEQ's own training loss: a few layers of f with gradient, after some without.

    Far from z_0 the layers are a phantom gradient at the equilibrium (Geng et al., 2021; a single
    one is Jacobian-free, Fung et al., 2022); at z_0 they are an unrolled network. Either way it is
    ordinary autograd, the same under DDP, its memory independent of the steps before.
    """

    def __init__(self, net: Equilibrium):
        super().__init__()
        self.net = net

    def forward(
        self, x: Tensor, y: Tensor, steps: int, layers: int, probe: Tensor | None = None
    ) -> dict[str, Tensor]:
        """steps: of Picard's iteration, from z_0; layers: of f after them; probe (B, state...):
        direction of the Jacobian estimate, or None for no estimate."""
        net = self.net
        net.redraw()
        u = net.inject(x)
        z, terms = net.initial(u), {}
        with torch.no_grad(), parametrize.cached():  # weights without gradient, not kept for below
            for _ in range(steps):
                z = net.f(z, u)
        with parametrize.cached():
            if probe is not None:  # |v^T J|^2 / n estimates |J|_F^2 / n (Bai et al., 2021b)
                z_in = z.requires_grad_(True)
                f_z = net.cell.join(net.cell.forward(z_in, u))  # not compiled: differentiated twice
                (vjp,) = torch.autograd.grad(f_z, z_in, probe, create_graph=True)
                terms["jacobian"] = vjp.square().mean()
                z = z.detach()
            for _ in range(layers):
                z = net.f(z, u)
        return {"task": net.nll(z, y).mean(), **terms}
