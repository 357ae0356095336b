"""All methods that approach the equilibrium of a teacher, with one signature and a counter."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from anderson import Counter, anderson, picard
from evidence.rivals import Rivals
from infer import Method, counted
from models import Equilibrium
from models.learned_solver import learned
from runs import Run
from student import Student


def methods(run: Run, rivals: Rivals) -> dict[str, Method]:
    """Every method of a run, by name.

    Where each token has its own Anderson weights, "anderson-shared" has one weight vector for a
    whole sequence, which lets later words leak into earlier predictions.
    """
    net, dims, window = run.teacher, {"sample_dims": run.teacher.sample_dims}, run.solver()
    solvers = {"picard": picard_of(net), "anderson": partial(anderson, **dims, **window)}
    if net.sample_dims > 1:
        solvers["anderson-shared"] = partial(anderson, **window)
    table = {name: solved_by(net, solver) for name, solver in solvers.items()}
    for name, solver in rivals.learned.items():
        method = partial(learned, solver=solver, **dims)
        table[name] = solved_by(net, method, solver.initial)
    for name, (student, decay) in run.students.items():
        table[label(name)] = counted(net, student, decay)
        if not name:
            table["cdeq+anderson"] = JumpThenSolve(run, student, decay)
    return table


def solved_by(net: Equilibrium, solver: Callable[..., Tensor], start=None) -> Method:
    """A solver of the teacher as a method. start(u): its z_0, if not the teacher's."""
    f = Counter(net.f)

    def solve(z0: Tensor, u: Tensor, nfe: int, last: bool = False) -> Tensor:
        return solver(lambda z: f(z, u), z0 if start is None else start(u), nfe, last=last)

    return Method(net, solve, net.inject, f)


class JumpThenSolve(Method):
    """The student's first answer in place of z_0, then the teacher's Anderson acceleration, which
    converges from there. Each has its own injection: u is a pair."""

    def __init__(self, run: Run, student: Student, decay: float):
        net, f = run.teacher, Counter(run.teacher.f)
        jump = counted(net, student, decay)
        solver = partial(anderson, sample_dims=net.sample_dims, **run.solver())

        def inject(x: Tensor, memory=None) -> tuple:
            before = memory or (None, None)
            return net.inject(x, before[0]), student.inject(x, before[1])

        def solve(z0: Tensor, u: tuple, nfe: int, last: bool = False) -> Tensor:
            before, z1 = jump.counter.nfe, jump.solve(z0, u[1], 1, last=True)
            f.nfe += jump.counter.nfe - before
            states = solver(lambda z: f(z, u[0]), z1, nfe - 1) if nfe > 1 else z1[None]
            return states[-1] if last else torch.cat([z0[None], states])

        super().__init__(net, solve, inject, f)

    def initial(self, u: tuple) -> Tensor:
        return self.net.initial(u[0])

    def remember(self, u: tuple, z: Tensor) -> tuple:
        return tuple(self.net.remember(part, z) for part in u)


def label(student: str) -> str:
    """A student's name in tables: cdeq is that of the default recipe."""
    return f"cdeq-{student}" if student else "cdeq"


def picard_of(net: Equilibrium) -> Callable[..., Tensor]:
    return partial(picard, sample_dims=net.sample_dims)
