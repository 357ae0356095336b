r"""Train a DEQ teacher, distil it into a C-DEQ student (Alg. 2), evaluate both.

    python train.py --task digits                       all stages, on this machine
    python train.py --task digits --recipe paper         also the student of the paper's recipe
    python train.py --task digits --kl 0 --name no-prediction            also an ablation
    torchrun --nproc_per_node=8 train.py --task imagenet --data DIR      one process per GPU

Paper: Sec. 3.4, Alg. 2, App. A.3. A run lives in one folder (--out): teacher.pt, trajectories/,
student.pt, log.jsonl, report.json, report.md, report.png. If it is stopped, the same command
continues it and gives the same weights: every random number is a function of (seed, stage, step).

From top to bottom: the stages; the one loop that trains every network; the batches of a teacher and
of a student. Settings and recipes are described in config.py.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import losses
import runs
import trajectories
from checkpoint import UsageError, fingerprint, plain_errors, same_teacher
from config import Config, parse
from fpode import contraction, propose_rho
from models import Equilibrium
from runs import Job
from student import Student, update_ema
from tasks import positions

MU = 0.98  # decay of the running average phi^-
OWN_MEMORY = 0.5  # share of updates in which a text's memory comes from the student's own run
NO_MEMORY = 0.2  # share of updates without memory, as at the start of a text
START_LR = 8e-3  # peak learning rate of the student's start
JACOBIAN_SHARE = 0.3  # share of updates with Jacobian regularisation
LINES = 50  # of log.jsonl for each stage, about


def main(argv: list[str]) -> None:
    config, task = parse(argv, __doc__)
    job = runs.begin(config, task)
    teacher = train_teacher(job)
    from evidence.measure import pick_decay, report  # measuring is no part of the method

    if config.stage in ("all", "student"):
        train_student(job, teacher)
        pick_decay(job)
    if config.stage in ("all", "evaluate"):
        report(runs.reopened(job))
    runs.leave()


@dataclass(frozen=True)
class Stage:
    """A network and all that the loop needs to train it."""

    kind: str  # of checkpoint
    path: Path
    net: nn.Module  # what is trained and saved
    loss: nn.Module  # of a batch: unweighted terms by name; holds net
    weights: dict[str, float]  # of the terms
    batches: Callable[[range], Iterator]  # of micro-batches, by their numbers
    optimizer: torch.optim.Optimizer
    steps: int
    ema: nn.Module | None = None
    extra: dict = field(default_factory=dict)  # what the checkpoint holds besides

    def states(self) -> dict:
        """Everything that an update changes."""
        parts = {"model": self.net, "optimizer": self.optimizer}
        return parts if self.ema is None else parts | {"ema": self.ema}


def fit(job: Job, stage: Stage) -> None:
    """The training loop, for a student Alg. 2: batch, loss, gradient, step; log; save; resume."""
    config, A, net, optimizer = job.config, job.config.accumulate, stage.net, stage.optimizer
    peaks = [group["lr"] for group in optimizer.param_groups]
    first, every, unseen = runs.restore(job, stage), max(1, stage.steps // LINES), []
    module = runs.distributed(job, stage.loss)
    batches = stage.batches(range(first * A, stage.steps * A))
    shown = dict(initial=first, unit="update", disable=job.rank > 0 or None)  # None: on a terminal
    bar = tqdm(range(first, stage.steps), stage.kind, stage.steps, **shown)
    for step in bar:
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * schedule(step, stage.steps)
        optimizer.zero_grad(set_to_none=True)
        values: dict[str, Tensor] = {}
        for i in range(A):
            waits = job.world > 1 and i + 1 < A  # gradients are averaged once per update
            with module.no_sync() if waits else nullcontext():
                terms = evaluated(job, stage, module, next(batches), step)
                loss = sum(stage.weights[name] * term for name, term in terms.items())  # Eq. 11
                (loss / A).backward()  # Alg. 2, l. 7
            for name, term in terms.items():
                values[f"{name} loss"] = values.get(f"{name} loss", 0.0) + term.detach() / A
        values["gradient's norm"] = nn.utils.clip_grad_norm_(net.parameters(), config.clip)
        optimizer.step()  # Alg. 2, l. 8
        if stage.ema is not None:
            update_ema(stage.ema, net, MU)  # Alg. 2, l. 9
        elif isinstance(net, Equilibrium):
            net.project()
        unseen.append((step, values))
        logs = step % every == 0 or step + 1 == stage.steps
        saves = (step + 1) % config.save_every == 0 or step + 1 == stage.steps
        if logs or saves:  # the other updates do not wait for the device
            check(stage, unseen)
            unseen.clear()
        if logs:
            runs.report_update(job, stage, bar, step, values)
        if saves:
            states = {name: part.state_dict() for name, part in stage.states().items()}
            contents = dict(step=step + 1, **states, **stage.extra)
            runs.write_checkpoint(job, stage.path, stage.kind, **contents)
    runs.barrier(job)


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear over the first twentieth, then cosine to 0."""
    warm = max(1, steps // 20)
    return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / steps)))


def evaluated(job: Job, stage: Stage, module: nn.Module, batch, step: int) -> dict[str, Tensor]:
    """The loss terms of one micro-batch, in the run's dtype."""
    try:
        half = job.config.dtype == "bf16"
        with torch.autocast(job.device.type, torch.bfloat16, enabled=half):
            return module(batch)
    except FloatingPointError as error:  # the solver's word for a network that diverged
        raise diverged(stage, str(error), step) from error


def check(stage: Stage, unseen: list[tuple[int, dict[str, Tensor]]]) -> None:
    """UsageError for the first update with a number that is not finite."""
    for step, values in unseen:
        for name, value in values.items():
            if not value.isfinite():
                raise diverged(stage, f"the {name} is {value.item()}", step)


def diverged(stage: Stage, what: str, step: int) -> UsageError:
    return UsageError(
        f"{stage.kind}: {what}, at step {step}; {stage.path} keeps the last good state (if any); "
        "a lower learning rate may help"
    )


def train_teacher(job: Job) -> Equilibrium:
    """The finished DEQ, frozen: trained here, or taken over from --teacher."""
    config, task, path = job.config, job.task, job.folder / "teacher.pt"
    if config.stage in ("student", "evaluate") and not runs.finished(path, "teacher", config):
        raise UsageError(f"--stage {config.stage}: {job.folder} has no finished teacher; train one")
    torch.manual_seed(config.seed)
    net = task.network(dataclasses.asdict(config)).to(job.device)
    if config.teacher:
        runs.take_over(job, net, path)
    if not runs.finished(path, "teacher", config):
        fit(job, teacher_stage(job, net, path))
    net = task.network(dataclasses.asdict(config))
    net.load_state_dict(runs.read_checkpoint(job, path, "teacher")["model"])
    if config.compile:
        net.cell.compile()
    return net.to(job.device).eval().requires_grad_(False)


def teacher_stage(job: Job, net: Equilibrium, path: Path) -> Stage:
    """The stage of a network that is trained on the labels."""
    config, state = job.config, runs.state_shape(job, net)
    options = dict(lr=config.teacher_lr, weight_decay=config.teacher_decay)
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(net.parameters(), momentum=0.9, nesterov=True, **options)
    else:
        optimizer = torch.optim.AdamW(net.parameters(), **options)
    if config.compile:
        net.cell.compile()
    return Stage(
        kind="teacher",
        path=path,
        net=net.train(),
        loss=losses.TeacherLoss(net),
        weights={"task": 1.0, "jacobian": config.jac_weight},
        batches=partial(teacher_batches, job, state),
        optimizer=optimizer,
        steps=config.teacher_steps,
    )


def teacher_batches(job: Job, state: torch.Size, micros: range) -> Iterator[losses.TeacherBatch]:
    """The micro-batches of a teacher; state: the shape of one sample's state."""
    config = job.config
    for micro, (x, y) in zip(micros, runs.samples(job, micros), strict=True):
        random, probe = runs.generator(job, "teacher", micro), None
        steps, layers = depth(config, micro // config.accumulate)
        regularised = torch.rand((), generator=random) < JACOBIAN_SHARE
        if regularised and steps and config.jac_weight > 0:
            whole = torch.randn(job.micro_batch, *state, generator=random)
            probe = runs.moved(job, whole[job.share])
        yield losses.TeacherBatch(x, y, steps, layers, probe)


def depth(config: Config, step: int) -> tuple[int, int]:
    """Evaluations without gradient, and layers with it, in the teacher's update `step`.

    0 to --before evaluations are drawn anew for each update: the layers learn to go on from z_0,
    from the equilibrium, and from anywhere between. During the first share of updates, --growing,
    there are none and the network is unrolled, first with one layer, then with 2, 4, .. up to
    --layers, each for equally long. Such updates are cheap, and published DEQs begin this way.
    """
    first, doublings = config.growing * config.teacher_steps, math.ceil(math.log2(config.layers))
    if step >= first:
        random = torch.Generator().manual_seed(config.seed * 10**9 + step)
        return int(torch.randint(config.before + 1, (), generator=random)), config.layers
    return 0, min(config.layers, 2 ** int(step / first * (doublings + 1)))


def train_student(job: Job, teacher: Equilibrium) -> None:
    """Trains the student of either recipe; `pick_decay` then finishes it."""
    config, path = job.config, runs.student_path(job.folder, job.config.name)
    saved = runs.read_checkpoint(job, path, "student") or {}
    if "decay" in saved:
        same_teacher(path, saved, teacher)
        return
    paper, started = config.recipe == "paper", time.perf_counter()
    store = trajectories.make_store(job, teacher, ends=not paper)
    student, ema, rho = fresh_student(job, teacher, saved.get("rho"))
    if config.compile:  # copies of a compiled cell are not compiled
        student.cell.compile()
        ema.cell.compile()
    own, of_start = [], []
    for name, p in student.named_parameters():
        (of_start if name.startswith("start.") else own).append(p)
    groups = [dict(params=own, lr=config.student_lr), dict(params=of_start, lr=START_LR)]
    loss = losses.Distillation(teacher, student, ema) if paper else losses.OwnRun(teacher, student)
    stage = Stage(
        kind="student",
        path=path,
        net=student,
        loss=loss,
        weights=losses.weights(config.recipe, config.lam1, config.lam2, config.kl),
        batches=partial(trajectory_batches if paper else own_run_batches, job, store, student),
        optimizer=torch.optim.AdamW(groups, weight_decay=0.0),
        steps=config.student_steps,
        ema=ema,
        extra=dict(rho=rho, teacher=fingerprint(teacher)),
    )
    fit(job, stage)
    if isinstance(store, trajectories.Rolling):
        share = store.seconds / (time.perf_counter() - started)
        runs.say(job, f"the teacher's solves took {share:.0%} of the time")
        runs.log(job, solve_share=share)


def fresh_student(job: Job, teacher: Equilibrium, rho=None) -> tuple[Student, Student, float]:
    """A student before any update, its running average, and its clock's rate, rho or measured."""
    config, split = job.config, job.task.train
    rows, _ = positions(len(split), 0, min(job.micro_batch, len(split), 128), config.seed)
    x = split.batch(rows)[0].to(job.device)  # the same samples on every process
    rate = contraction(trajectories.sample(teacher, x, config.K, m=config.m), teacher.sample_dims)
    rho = rho or propose_rho(rate, config.K)
    runs.say(job, f"teacher contracts by {rate:.3f} per step; clock rate rho = {rho:.3f}")
    runs.log(job, contraction=rate, rho=rho)
    settings = dataclasses.asdict(config)
    torch.manual_seed(config.seed)  # for the weights of the start
    student, ema = (runs.build_student(teacher, settings, rho).to(job.device) for _ in range(2))
    ema.requires_grad_(False).load_state_dict(student.state_dict())  # Alg. 2, l. 1
    return student, ema, rho


def own_run_batches(
    job: Job, store, student: Student, micros: range
) -> Iterator[losses.OwnRunBatch]:
    """The micro-batches of the default recipe: ends of trajectories, and the times of a run."""
    for micro in micros:
        random = runs.generator(job, "student", micro)
        x, _, rows = store.batch(micro)
        z_K = runs.moved(job, store.ends(rows)).float()  # half the bytes travel, if they are bf16
        times = draw_run(job, student, random)
        past, chance = draw_past(student.memory, random)
        yield losses.OwnRunBatch(runs.moved(job, x), z_K, times, past, chance < OWN_MEMORY)


def draw_run(job: Job, student: Student, random: torch.Generator) -> list[float]:
    """Times t_0 .. t_J of a run of the student's own, with J and the schedule's base drawn. On a
    graph, which is a single sample, each process draws its own."""
    draws, own = (job.world, job.rank) if len(job.task.train) == 1 else (1, 0)
    J = torch.randint(1, job.config.rollout_max + 1, (draws,), generator=random)[own]
    pick = torch.randint(len(job.task.decays), (draws,), generator=random)[own]
    return student.times.schedule(int(J) + 1, job.task.decays[pick])


def trajectory_batches(
    job: Job, store, student: Student, micros: range
) -> Iterator[losses.TrajectoryBatch]:
    """The micro-batches of the recipe `paper`: states of trajectories up to a step k."""
    K = job.config.K
    for micro in micros:
        random = runs.generator(job, "student", micro)
        k = torch.randint(1, K + 1, (job.micro_batch,), generator=random)  # Alg. 2, l. 3
        draws = torch.rand(job.micro_batch, K + 1, generator=random)
        ks = torch.stack([k - 2, k - 1, k, torch.full_like(k, K)], dim=1).clamp(min=0)
        ks, k = trajectories.augment(ks, draws)[job.share], k[job.share]
        x, y, rows = store.batch(micro)
        states = tuple(runs.moved(job, z).float() for z in store.states(rows, ks))
        x, y, k, early = (runs.moved(job, v) for v in (x, y, k, losses.early(K, k)))
        past, _ = draw_past(student.memory, random)
        yield losses.TrajectoryBatch(x, y, k, states, early, past)


def draw_past(memory: int, random: torch.Generator) -> tuple[int, float]:
    """How many positions of a text's window are history, all of `memory` or none; and a number in
    [0, 1) that decides where their states come from."""
    if not memory:
        return 0, 1.0
    past, chance = torch.rand(2, generator=random).tolist()
    return (memory if past < 1 - NO_MEMORY else 0), chance


if __name__ == "__main__":
    with plain_errors():
        main(sys.argv[1:])
