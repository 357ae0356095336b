"""The rivals: other networks and solvers for the same task, trained by the loop of train.py.

    python -m evidence.rivals direct-2 --task digits           f cut off after two evaluations
    python -m evidence.rivals hyperdeq --task digits           a learned solver of the run's teacher
    python -m evidence.rivals ignn-solver --task cora          the same, on a graph
    python -m evidence.rivals explicit-gcn --task cora         a network of finite depth
    python -m evidence.rivals explicit-alexnet-pretrained --task imagenet     torchvision's weights

Flags are those of train.py. Each rival is saved in the run's folder under its name.

direct-J is the teacher's network cut off after J evaluations from z_0 and trained end to end on the
labels, with as many updates as teacher and student have together: what one would do without
equilibria. A learned solver has as many updates as the student and the same ends of trajectories;
an explicit network has as many as the teacher.
"""

import dataclasses
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import runs
import train
from checkpoint import UsageError, fingerprint, load, load_weights, plain_errors, same_teacher
from config import parse
from losses import TeacherBatch, distance
from models import Equilibrium
from models.learned_solver import LearnedSolver
from runs import Job, Run, read_checkpoint, samples
from trajectories import make_store

LEARNED = ("hyperdeq", "ignn-solver")
LEARNED_LR = 8e-3  # peak rate of a learned solver
LEARNED_RUN = 8  # steps of its run that are trained


@dataclass
class Rivals:
    """The finished rivals of a run folder: direct networks by J, the others by name."""

    direct: dict[int, Equilibrium]
    learned: dict[str, LearnedSolver]
    explicit: dict[str, nn.Module]


def open_rivals(run: Run) -> Rivals:
    """All finished rivals in the folder of a run."""
    found = Rivals({}, {}, {})
    for path in sorted(run.folder.glob("direct-*.pt")):
        saved = load(path, "direct")
        if saved["step"] == saved["updates"]:
            net = run.task.network(saved["config"])
            load_weights(net, saved["model"], path)
            found.direct[int(path.stem.removeprefix("direct-"))] = net
    for path in sorted(run.folder.glob("explicit-*.pt")):
        saved, name = load(path, "explicit"), path.stem.removeprefix("explicit-")
        if saved["step"] >= saved["config"]["teacher_steps"]:
            net = run.task.explicit(name.removesuffix("-pretrained"), saved["config"])
            net.load_state_dict(saved["model"])
            found.explicit[name] = net
    for kind in LEARNED:
        path = run.folder / f"{kind}.pt"
        if path.exists():
            saved = load(path, kind)
            same_teacher(path, saved, run.teacher)
            if saved["step"] == saved["updates"]:
                solver = learned_solver(run.teacher, kind, saved["config"]["m"])
                solver.load_state_dict(saved["model"])
                found.learned[kind] = solver
    found.direct = dict(sorted(found.direct.items()))
    for net in (*found.direct.values(), *found.learned.values(), *found.explicit.values()):
        net.to(run.device).eval().requires_grad_(False)
    return found


def train_direct(job: Job, J: int) -> None:
    path, config = job.folder / f"direct-{J}.pt", job.config
    torch.manual_seed(config.seed)
    net = job.task.network(dataclasses.asdict(config)).to(job.device)
    updates = config.teacher_steps + config.student_steps
    stage = train.teacher_stage(job, net, path)
    more = dict(kind="direct", steps=updates, extra={"updates": updates})
    train.fit(job, dataclasses.replace(stage, batches=partial(direct_batches, job, J), **more))


def direct_batches(job: Job, J: int, micros: range) -> Iterator[TeacherBatch]:
    for micro, (x, y) in zip(micros, samples(job, micros), strict=True):
        runs.generator(job, "teacher", micro)
        yield TeacherBatch(x, y, 0, J)


def train_explicit(job: Job, name: str) -> None:
    config, task, path = job.config, job.task, job.folder / f"explicit-{name}.pt"
    if task.explicit is None:
        raise UsageError(f"explicit-{name}: {task.name} has no explicit networks")
    torch.manual_seed(config.seed)
    net = task.explicit(name, dataclasses.asdict(config)).to(job.device).train()
    if name.endswith("-pretrained"):
        runs.write_checkpoint(
            job, path, "explicit", step=config.teacher_steps, model=net.state_dict()
        )
        runs.say(job, f"{path}: published weights, not trained here")
        return
    options = dict(lr=config.teacher_lr, weight_decay=config.teacher_decay)
    stage = train.Stage(
        kind="explicit",
        path=path,
        net=net,
        loss=ExplicitLoss(net),
        weights={"task": 1.0},
        batches=partial(explicit_batches, job),
        optimizer=torch.optim.AdamW(net.parameters(), **options),
        steps=config.teacher_steps,
    )
    train.fit(job, stage)


class ExplicitLoss(nn.Module):
    """Cross-entropy on the labels."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"task": self.net.nll(*batch).mean()}


def explicit_batches(job: Job, micros: range) -> Iterator[tuple[Tensor, Tensor]]:
    for micro, batch in zip(micros, samples(job, micros), strict=True):
        runs.generator(job, "explicit", micro)
        yield batch


def learned_solver(teacher: Equilibrium, kind: str, m: int) -> LearnedSolver:
    """A fresh learned solver; UsageError if the teacher does not suit it."""
    try:
        return LearnedSolver(teacher, m, graph_net=kind == "ignn-solver")
    except ValueError as error:
        raise UsageError(f"{kind}: {error}") from error


def train_learned(job: Job, kind: str) -> None:
    config, path = job.config, job.folder / f"{kind}.pt"
    if not runs.finished(job.folder / "teacher.pt", "teacher", config):
        raise UsageError(f"{kind}: {job.folder} has no finished teacher; train it first")
    teacher, saved = train.train_teacher(job), read_checkpoint(job, path, kind)
    if saved and saved["step"] >= config.student_steps:
        same_teacher(path, saved, teacher)
        return
    torch.manual_seed(config.seed)
    solver = learned_solver(teacher, kind, config.m).to(job.device)
    store = make_store(job, teacher, ends=True)
    stage = train.Stage(
        kind=kind,
        path=path,
        net=solver,
        loss=LearnedSolverLoss(solver, LEARNED_RUN),
        weights=dict.fromkeys(("start", "path", "residual"), 1.0),
        batches=partial(ends_batches, job, store),
        optimizer=torch.optim.AdamW(solver.parameters(), lr=LEARNED_LR, weight_decay=0.005),
        steps=config.student_steps,
        extra=dict(teacher=fingerprint(teacher), updates=config.student_steps),
    )
    train.fit(job, stage)


@dataclass(frozen=True)
class EndsBatch:
    """x, z_K (B, ...); step: of the training, for the vanishing weight of `residual`."""

    x: Tensor
    z_K: Tensor
    step: int


class LearnedSolverLoss(nn.Module):
    """The losses of a LearnedSolver (Bai et al., 2022), without labels and with f frozen.

    Each of `steps` steps of its own run is pulled to z_K, the k-th with a weight in proportion to
    k. No gradient flows through f or from one step into the step before.
    """

    def __init__(self, solver: LearnedSolver, steps: int):
        super().__init__()
        self.solver, self.steps = solver, steps

    def forward(self, batch: EndsBatch) -> dict[str, Tensor]:
        net, cell, solver = self.solver.teacher[0], self.solver.teacher[0].cell, self.solver
        with torch.no_grad():
            u = net.inject(batch.x)
        z, z_K = solver.initial(u), batch.z_K
        terms = {"start": 5 * distance(z, z_K, cell).mean()}
        advance, path, mixed = solver.stepper(lambda z: net.f(z, u)), 0.0, 0.0
        for k in range(1, self.steps + 1):
            z, _, gap = advance(z.detach())
            weight = 2 * k / (self.steps * (self.steps + 1))
            path = path + weight * (distance(z, z_K, cell) + 1e-12).sqrt().mean()
            mixed = mixed + gap.abs().mean() / self.steps
        return terms | {
            "path": 0.1 * path,
            "residual": 1e-4 * max(1 - batch.step / 1000, 0.005) * mixed,
        }


def ends_batches(job: Job, store, micros: range) -> Iterator[EndsBatch]:
    for micro in micros:
        x, _, rows = store.batch(micro)
        z_K = store.ends(rows).to(job.device, torch.float32)
        yield EndsBatch(x.to(job.device), z_K, micro // job.config.accumulate)


def main(argv: list[str]) -> None:
    name = argv[0] if argv and not argv[0].startswith("-") else ""
    if {"-h", "--help"} & {*argv}:
        parse(["--help"], __doc__)
    direct = re.fullmatch(r"direct-([1-9]\d{0,2})", name)
    explicit = re.fullmatch(r"explicit-([\w-]+)", name)
    if not (direct or explicit or name in LEARNED):
        allowed = " | ".join(("direct-J", *LEARNED, "explicit-NAME"))
        raise UsageError(f"the first argument, {name!r}, names the rival: allowed is {allowed}")
    config, task = parse(argv[1:], __doc__, rival=bool(explicit))
    job = runs.begin(config, task)
    if direct:
        train_direct(job, int(direct[1]))
    elif explicit:
        train_explicit(job, explicit[1])
    else:
        train_learned(job, name)
    runs.leave()


if __name__ == "__main__":
    with plain_errors():
        main(sys.argv[1:])
