r"""Train a DEQ teacher, distil it into a C-DEQ student (Alg. 2), evaluate both.

    python train.py --task digits                       all stages, on this machine
    python train.py --task digits --recipe paper         the paper's recipe, beside the default one
    python train.py --task digits --kl 0 --name no-prediction            an ablation, beside both
    torchrun --nproc_per_node=8 train.py --task digits   the same on 8 processes, one per GPU

Paper: Sec. 3.4, Alg. 2, App. A.3. A run lives in one folder (--out): teacher.pt, trajectories/,
student.pt, log.jsonl, report.json, report.md, report.png. The same command continues where it was
stopped: every random number is a function of (seed, stage, step), so the weights come out the same.
Settings and recipes are described in config.py.
"""

import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import compare
import infer
import runs
import tables
import trajectories
from checkpoint import UsageError, fingerprint, load, plain_errors, provenance, save
from config import (
    BOTH,
    DTYPES,
    EXPLICIT,
    LEARNED_SOLVERS,
    STUDENT,
    TEACHER,
    Config,
    environment,
    parse,
)
from fpode import contraction, propose_rho
from losses import Distillation, LearnedSolverLoss, OwnRun, TeacherLoss, total
from models import Equilibrium
from models.explicit import Vision
from student import Student, update_ema
from tasks import Task, positions

MU = 0.98  # of the running average phi^-
EARLY = 0.25  # Eq. 14: the first share of steps, which have the task loss
OWN_MEMORY = 0.5  # share of the updates in which a text's memory is the student's own
GUESS_LR = 8e-3  # peak rate of what guesses z* from u: a student's start, a learned solver
LEARNED_RUN = 8  # steps of a learned solver's run that are trained
JACOBIAN_SHARE = 0.3  # of the updates, which have the Jacobian regularisation


class Trainer:
    """One run: its configuration, its place among the ranks, its folder, and the one loop."""

    def __init__(self, config: Config, task: Task):
        self.config, self.task, self.folder = config, task, Path(config.out)
        self.rank, self.world = environment("RANK", 0), environment("WORLD_SIZE", 1)
        if config.batch % (self.world * config.accumulate):
            raise UsageError(
                f"--batch {config.batch} is not divisible by {self.world} processes x --accumulate "
                f"{config.accumulate}"
            )
        self.device = torch.device(runs.pick_device(config.device))
        if self.device.type == "cuda":
            self.device = torch.device("cuda", environment("LOCAL_RANK", 0))
            torch.cuda.set_device(self.device)
        self.part = config.batch // config.accumulate  # samples of all ranks computed together
        self.mine = slice(*(self.part // self.world * r for r in (self.rank, self.rank + 1)))
        if not self.rank:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.log_file = open(self.folder / "log.jsonl", "a")  # noqa: SIM115
            except OSError as error:
                raise UsageError(
                    f"--out {self.folder}: cannot write there ({error.strerror})"
                ) from error
        self.data = task.fingerprint()
        versions = dict(torch=torch.__version__, data=self.data)
        self.log(start=dataclasses.asdict(config), **provenance(), **versions)

    def log(self, **line) -> None:
        if not self.rank:
            self.log_file.write(json.dumps({"time": round(time.time(), 3), **line}) + "\n")
            self.log_file.flush()

    def say(self, text: str) -> None:
        if not self.rank:
            tqdm.write(text)

    def generator(self, stage: int, step: int) -> torch.Generator:
        """The randomness of one part, the same on every rank: draws are global, then sliced."""
        torch.manual_seed((3 * self.config.seed + stage) * 10**9 + step)  # dropout, if there is any
        return torch.Generator().manual_seed((3 * self.config.seed + stage) * 10**9 + step)

    def bind(self, path: Path, checkpoint: dict, *groups: str) -> None:
        """UsageError where a checkpoint was made with other values in these groups, or from other
        data."""
        runs.same_data(path, checkpoint, self.data)
        saved = checkpoint["config"]
        for field in dataclasses.fields(Config):
            old, new = saved.get(field.name, field.default), getattr(self.config, field.name)
            if field.metadata["group"] in groups and old != new:
                raise UsageError(
                    f"{path} was made with --{field.name} {old}, not {new}; "
                    "choose another --out (for a student, another --name), or delete it"
                )

    def fit(
        self, stage, path, module, online, weigh, draw, steps, optimizer, after, ema=None, **extra
    ):
        """The loop (Alg. 2 for the student): draw, loss, gradient, step; log; save; resume.

        draw(parts) yields the arguments of module for each of these parts of batches, in order;
        module gives a dict of loss terms and weigh(terms) their sum; `online` is the network that
        is trained and saved, `after` what follows each update, `extra` what its checkpoint holds
        besides.
        """
        config, A = self.config, self.config.accumulate
        parts = {"model": online, "optimizer": optimizer, **({} if ema is None else {"ema": ema})}
        peaks = [group["lr"] for group in optimizer.param_groups]
        start = self.restore(stage, path, parts, extra)
        if self.world > 1:
            if self.device.type == "cuda":
                nn.SyncBatchNorm.convert_sync_batchnorm(module)
            module = DistributedDataParallel(module)
        advice = f"{path} keeps the last good state (if any); a lower learning rate may help"

        batches = draw(range(start * A, steps * A))
        quiet = None if not self.rank else True  # None: a bar on a terminal only
        bar = tqdm(range(start, steps), stage, steps, initial=start, disable=quiet, unit="update")
        for step in bar:
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * schedule(step, steps)
            optimizer.zero_grad(set_to_none=True)
            values: dict[str, float] = {}
            for i in range(A):
                with ExitStack() as stack:
                    if self.world > 1 and i + 1 < A:  # gradients are averaged once an update
                        stack.enter_context(module.no_sync())
                    terms = self.terms(module, next(batches), stage, step, advice)
                    (weigh(terms) / A).backward()  # Alg. 2, l. 7
                for name, term in terms.items():
                    values[f"{name} loss"] = values.get(f"{name} loss", 0.0) + term.item() / A
            norm = nn.utils.clip_grad_norm_(online.parameters(), config.clip).item()
            for name, value in {**values, "gradient's norm": norm}.items():
                if not math.isfinite(value):
                    raise UsageError(f"{stage}: the {name} is {value} at step {step}; {advice}")
            optimizer.step()  # Alg. 2, l. 8
            after()
            if step % config.log_every == 0 or step + 1 == steps:
                bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()})
                self.log(stage=stage, student=config.name, step=step, **values, gradient=norm)
                if bar.disable:
                    text = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
                    self.say(f"{stage} {step}/{steps}: {text}")
            if (step + 1) % config.save_every == 0 or step + 1 == steps:
                self.keep(stage, path, parts, extra, step + 1)

    def terms(self, module: nn.Module, batch: tuple, stage: str, step: int, advice: str) -> dict:
        """The loss terms of one part of a batch, in the run's dtype."""
        try:
            half = self.config.dtype == "bf16"
            with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
                return module(*batch)
        except FloatingPointError as error:  # the solver's word for a network that diverged
            raise UsageError(f"{stage}: {error}, at step {step}; {advice}") from error

    def keep(self, stage: str, path: Path, parts: dict, extra: dict, step: int) -> None:
        """Writes a stage's checkpoint after so many updates."""
        if not self.rank:
            states = {name: part.state_dict() for name, part in parts.items()}
            settings = dict(step=step, config=dataclasses.asdict(self.config), data=self.data)
            save(path, stage, **settings, **states, **extra)

    def restore(self, stage: str, path: Path, parts: dict, extra: dict) -> int:
        """Loads a stage's checkpoint, if there is one, and returns its number of updates."""
        if not path.exists():
            return 0
        saved = load(path, stage)
        self.bind(path, saved, {"direct": TEACHER}.get(stage, stage), BOTH)
        for key, value in extra.items():  # what the student depends on: its clock, its teacher
            if saved[key] != value:
                raise UsageError(f"{path} has {key} {saved[key]}, not {value}; delete it")
        for name, part in parts.items():
            runs.fill(part, saved[name], path)
        return saved["step"]


def train_explicit(run: Trainer) -> None:
    """A reference network of finite depth, on the same inputs, by the same loop."""
    config, task = run.config, run.task
    if task.explicit is None:
        raise UsageError(f"--stage explicit: {task.name} has no explicit networks")
    torch.manual_seed(config.seed)
    net = task.explicit(dataclasses.asdict(config)).to(run.device).train()
    if config.pretrained and not isinstance(net, Vision):
        raise UsageError(f"--pretrained: torchvision has no {config.explicit}, for {task.name}")
    path = run.folder / f"explicit-{config.explicit}.pt"
    if finished(path, "explicit", config.explicit_steps):
        run.bind(path, load(path, "explicit"), EXPLICIT)
        return
    if config.pretrained:
        run.keep("explicit", path, {"model": net}, {}, config.explicit_steps)
        run.say(f"{path}: {config.explicit} with torchvision's weights, not trained here")
        return

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"task": net.nll(x, y).mean()}

    def draw(parts: range) -> Iterator[tuple]:
        for part, (x, y) in zip(parts, views(run, parts), strict=True):
            run.generator(2, part)
            yield x.to(run.device), y.to(run.device)

    steps, lr, decay = config.explicit_steps, config.explicit_lr, config.explicit_decay
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=decay)
    total_of = lambda terms: terms["task"]  # noqa: E731
    run.fit("explicit", path, Loss(), net, total_of, draw, steps, optimizer, lambda: None)


def views(run: Trainer, parts: range) -> Iterator[tuple[Tensor, Tensor]]:
    """x and y of this rank's share of these parts of the training stream, augmented if wanted."""
    config, split = run.config, run.task.train

    def keys() -> Iterator[tuple[Tensor, Tensor | None]]:
        for part in parts:
            first = part * run.part
            rows, _ = positions(len(split), first, run.part, config.seed)
            seeds = config.seed * 10**9 + first + torch.arange(run.part)
            yield rows[run.mine], seeds[run.mine] if config.augment else None

    return split.stream(keys(), config.workers)


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear over the first twentieth, then cosine to 0."""
    warm = max(1, steps // 20)
    return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / steps)))


def train_teacher(run: Trainer) -> Equilibrium:
    """The DEQ itself; returns the finished teacher, frozen."""
    config, task, path = run.config, run.task, run.folder / "teacher.pt"
    torch.manual_seed(config.seed)
    net = task.network(dataclasses.asdict(config)).to(run.device)
    if config.teacher:
        adopt(run, net, path)
    if not finished(path, "teacher", config.teacher_steps):
        fit_network(run, "teacher", path, net, config.teacher_steps)
        barrier(run)
    saved = load(path, "teacher")
    run.bind(path, saved, TEACHER, BOTH)
    net = task.network(dataclasses.asdict(config))
    net.load_state_dict(saved["model"])
    if config.compile:
        net.cell.compile()
    return net.to(run.device).eval().requires_grad_(False)


def train_direct(run: Trainer) -> None:
    """The rival: the teacher's network cut off after --direct evaluations from z_0 and trained end
    to end on the labels, for as many updates as teacher and student have together."""
    config, path = run.config, run.folder / f"direct-{run.config.direct}.pt"
    updates = config.teacher_steps + config.student_steps
    if path.exists():
        saved = load(path, "direct")
        run.bind(path, saved, TEACHER, BOTH)
        if saved["updates"] != updates:
            raise UsageError(
                f"{path} is trained for {saved['updates']} updates, not {updates} (--teacher_steps "
                "and --student_steps together); delete it"
            )
        if saved["step"] == updates:
            return
    torch.manual_seed(config.seed)
    net = run.task.network(dataclasses.asdict(config)).to(run.device)
    fit_network(run, "direct", path, net, updates, updates=updates)
    barrier(run)


def fit_network(run: Trainer, stage: str, path: Path, net: Equilibrium, steps: int, **extra):
    """Trains a teacher, or a network that is cut off: they differ in their layers alone."""
    config, state = run.config, state_shape(run, net)
    if config.compile:
        net.cell.compile()
    module = TeacherLoss(net)

    def weigh(terms: dict[str, Tensor]) -> Tensor:
        return terms["task"] + config.jac_weight * terms.get("jacobian", 0.0)

    draw = functools.partial(teacher_parts, run, stage, state)
    optimizer = teacher_optimizer(config, net)
    run.fit(stage, path, module, net.train(), weigh, draw, steps, optimizer, net.project, **extra)


def depth(config: Config, step: int) -> tuple[int, int]:
    """Steps before the gradient, and layers with it, in the teacher's update `step`.

    There are 0 to --before steps, drawn anew each time: the layers learn to go on from z_0 as well
    as from the equilibrium, and from anywhere between. In the first --growing updates there is no
    step, and of layers 1, then 2, then 4, up to --layers, in equal shares: one layer learns fastest
    what all depths share.
    """
    first, doublings = config.growing * config.teacher_steps, math.ceil(math.log2(config.layers))
    if step >= first:
        generator = torch.Generator().manual_seed(config.seed * 10**9 + step)
        return int(torch.randint(config.before + 1, (), generator=generator)), config.layers
    return 0, min(config.layers, 2 ** int(step / first * (doublings + 1)))


def teacher_parts(run: Trainer, stage: str, state: torch.Size, parts: range) -> Iterator[tuple]:
    """The arguments of TeacherLoss for each of these parts; state: the shape of a sample's."""
    config = run.config
    for part, (x, y) in zip(parts, views(run, parts), strict=True):
        generator, probe = run.generator(0, part), None
        steps, layers = depth(config, part // config.accumulate)
        if stage == "direct":
            steps, layers = 0, config.direct
        chance = torch.rand((), generator=generator)
        if steps and config.jac_weight > 0 and chance < JACOBIAN_SHARE:
            probe = torch.randn(run.part, *state, generator=generator)[run.mine].to(run.device)
        yield x.to(run.device), y.to(run.device), steps, layers, probe


def adopt(run: Trainer, net: Equilibrium, path: Path) -> None:
    """Writes the run's teacher.pt from --teacher, a file of ours or of locuslab/deq; an earlier
    start may have done so."""
    file, there = Path(run.config.teacher), path.exists()
    barrier(run)  # no rank looks after another has written
    if there:
        if load(path, "teacher").get("source") != str(file):
            raise UsageError(
                f"--teacher {file}: {run.folder} has another teacher; choose another --out"
            )
        return
    state = runs.teacher_weights(file)
    ours = net.state_dict()
    missing, foreign = sorted(ours.keys() - state.keys()), sorted(state.keys() - ours.keys())
    for names, what in ((missing, "lacks"), (foreign, "has besides")):
        if names:
            raise UsageError(
                f"--teacher {file} is no {run.config.preset}: it {what} {len(names)} tensors, "
                f"first {names[0]}; allowed are checkpoints of the same --preset"
            )
    for name, value in state.items():
        if value.shape != ours[name].shape:
            raise UsageError(
                f"--teacher {file} is no {run.config.preset}: {name} is {[*value.shape]} there, "
                f"{[*ours[name].shape]} here"
            )
        if not value.isfinite().all():
            raise UsageError(f"--teacher {file}: {name} has numbers that are not finite")
    net.load_state_dict(state)
    for name, value in net.state_dict().items():
        if not torch.equal(value, state[name].to(value)):
            raise UsageError(
                f"--teacher {file} is no {run.config.preset}: {name} is one tensor with another "
                "here, and differs from it there (was it trained with --not_tied?)"
            )
    run.keep("teacher", path, {"model": net}, {"source": str(file)}, run.config.teacher_steps)
    barrier(run)


def teacher_optimizer(config: Config, net: Equilibrium) -> torch.optim.Optimizer:
    options = dict(lr=config.teacher_lr, weight_decay=config.teacher_decay)
    if config.optimizer == "sgd":
        return torch.optim.SGD(net.parameters(), momentum=0.9, nesterov=True, **options)
    return torch.optim.AdamW(net.parameters(), **options)


@torch.no_grad()
def state_shape(run: Trainer, net: Equilibrium) -> torch.Size:
    """Shape of one sample's state. net is put in evaluation mode: one sample has no statistics."""
    net.eval()
    x, _ = run.task.train.batch(torch.arange(1))
    return net.initial(net.inject(x.to(run.device))).shape[1:]


def make_store(run: Trainer, teacher: Equilibrium, ends: bool) -> trajectories.Memory:
    """The train split's trajectories, or their ends alone, in the store that fits the budgets."""
    config, split = run.config, run.task.train
    dtype, states = DTYPES[config.cache_dtype], 1 if ends else config.K + 1
    size, limits = state_shape(run, teacher).numel(), (config.cache_gb, config.disk_gb)
    kind, message = trajectories.plan(len(split), states, size, dtype, *limits)
    if config.store != "auto":
        kind, message = config.store, f"{message}; chosen by hand: {config.store}"
    run.say(message)

    def solve(x: Tensor) -> Tensor:
        x = x.to(run.device)
        with torch.autocast(run.device.type, torch.bfloat16, enabled=config.dtype == "bf16"):
            return trajectories.sample(teacher, x, config.K, ends, m=config.m)

    common = (solve, split, run.part, config.seed)
    options = dict(chunk=config.chunk, dtype=dtype)
    if kind == "memory":
        return trajectories.Memory(*common, **options)
    if kind == "disk":
        header = {"teacher": fingerprint(teacher), "K": config.K, "m": config.m, "split": "train"}
        folder = run.folder / ("equilibria" if ends else "trajectories")
        return trajectories.Disk(*common, folder=folder, header=header, **options)
    slots = int(config.cache_gb * 1e9 / (states * size * dtype.itemsize))
    # No more than one of each sample, and to fill it at most a fifth of all solves.
    solves = config.student_steps * config.batch // config.reuse
    slots = min(slots, max(config.reuse, min(len(split), solves // 4) // run.world))
    options |= dict(reuse=config.reuse, augment=config.augment, workers=config.workers)
    return trajectories.Rolling(*common, slots=slots, **options)


def train_learned(run: Trainer, teacher: Equilibrium) -> None:
    """A learned solver of the same teacher, on the same ends of trajectories as the student and for
    as many updates."""
    config, kind, steps = run.config, run.config.stage, run.config.student_steps
    path = run.folder / f"{kind}.pt"
    if finished(path, kind, steps):
        run.bind(path, runs.load_of(path, kind, teacher), BOTH)
        return
    torch.manual_seed(config.seed)
    solver = runs.build_learned(teacher, kind, config.m).to(run.device)
    store = make_store(run, teacher, ends=True)

    def draw(parts: range) -> Iterator[tuple]:
        for part in parts:
            x, _, rows = store.batch(part)
            z_K = store.ends(rows).to(run.device, torch.float32)
            yield x.to(run.device), z_K, part // config.accumulate

    optimizer = torch.optim.AdamW(solver.parameters(), lr=GUESS_LR, weight_decay=0.005)
    module, sum_of = LearnedSolverLoss(solver, LEARNED_RUN), lambda terms: sum(terms.values())
    extra = dict(teacher=fingerprint(teacher), updates=steps)
    run.fit(kind, path, module, solver, sum_of, draw, steps, optimizer, lambda: None, **extra)
    barrier(run)


def train_student(run: Trainer, teacher: Equilibrium) -> None:
    """A student by either recipe; `pick_decay` finishes it."""
    config, path = run.config, runs.student_path(run.folder, run.config.name)
    if finished(path, "student", config.student_steps):
        run.bind(path, runs.load_of(path, "student", teacher), STUDENT, BOTH)
        return
    paper, begin = config.recipe == "paper", time.perf_counter()
    store = make_store(run, teacher, ends=not paper)
    student, ema, rho = fresh_student(run, teacher, store)
    if config.compile:  # copies of a compiled cell are not compiled
        student.cell.compile()
        ema.cell.compile()
    if paper:
        module, draw = Distillation(teacher, student, ema), trajectory_parts
    else:
        module, draw = OwnRun(teacher, student), own_parts
    draw = functools.partial(draw, run, store, student, teacher.memory)

    def weigh(terms: dict[str, Tensor]) -> Tensor:
        return total(terms, config.lam1, config.lam2, config.kl)

    start, rest = [], []
    for name, p in student.named_parameters():
        (start if name.startswith("start.") else rest).append(p)
    groups = [dict(params=rest, lr=config.student_lr), dict(params=start, lr=GUESS_LR)]
    steps, optimizer = config.student_steps, torch.optim.AdamW(groups, weight_decay=0.0)
    extra = dict(rho=rho, teacher=fingerprint(teacher))

    def average() -> None:
        update_ema(ema, student, MU)  # Alg. 2, l. 9

    run.fit("student", path, module, student, weigh, draw, steps, optimizer, average, ema, **extra)
    if isinstance(store, trajectories.Rolling):
        share = store.seconds / (time.perf_counter() - begin)
        run.say(f"the teacher's solves took {share:.0%} of the time")
        run.log(solve_share=share)
    barrier(run)


def fresh_student(run: Trainer, teacher: Equilibrium, store) -> tuple[Student, Student, float]:
    """The student, its running average and its clock's rate, before the first update."""
    config = run.config
    x = store.batch(0)[0].to(run.device)
    rate = contraction(trajectories.sample(teacher, x, config.K, m=config.m), teacher.sample_dims)
    rho = propose_rho(rate, config.K)
    run.say(f"teacher contracts by {rate:.3f} per step; clock rate rho = {rho:.3f}")
    run.log(contraction=rate, rho=rho)
    settings = dataclasses.asdict(config)
    torch.manual_seed(config.seed)  # of the start's weights, whatever was drawn before
    student = runs.build_student(teacher, settings, rho).to(run.device)  # Alg. 2, l. 1
    ema = runs.build_student(teacher, settings, rho).to(run.device).requires_grad_(False)
    ema.load_state_dict(student.state_dict())
    return student, ema, rho


def own_parts(run: Trainer, store, student: Student, memory: int, parts: range) -> Iterator[tuple]:
    """The arguments of OwnRun for each of these parts; memory: the teacher's."""
    for part in parts:
        generator = run.generator(1, part)
        x, _, rows = store.batch(part)
        z_K = store.ends(rows).to(run.device, torch.float32)
        times = draw_run(run, student, generator)
        past, chance = draw_past(memory, generator)
        yield x.to(run.device), z_K, times, past, chance < OWN_MEMORY


def trajectory_parts(
    run: Trainer, store, student: Student, memory: int, parts: range
) -> Iterator[tuple]:
    """The arguments of Distillation for each of these parts; memory: the teacher's."""
    config, device = run.config, run.device
    for part in parts:
        generator = run.generator(1, part)
        k = torch.randint(1, config.K + 1, (run.part,), generator=generator)  # Alg. 2, l. 3
        draws = torch.rand(run.part, config.K + 1, generator=generator)
        ks = torch.stack([k - 2, k - 1, k, torch.full_like(k, config.K)], dim=1).clamp(min=0)
        ks = trajectories.augment(ks, draws)
        x, y, rows = store.batch(part)
        states = [z.to(device, torch.float32) for z in store.states(rows, ks[run.mine])]
        early = task_weights(config.K, k)[run.mine].to(device)
        past, _ = draw_past(memory, generator)
        yield x.to(device), y.to(device), k[run.mine].to(device), states, early, past


def draw_run(run: Trainer, student: Student, generator: torch.Generator) -> list[float]:
    """Times t_0 .. t_J of a run of the student's own, J and the schedule's base drawn; where the
    split is a single sample, a graph, every rank draws others."""
    runs, mine = (run.world, run.rank) if len(run.task.train) == 1 else (1, 0)
    J = torch.randint(1, run.config.rollout_max + 1, (runs,), generator=generator)[mine]
    pick = torch.randint(len(run.task.decays), (runs,), generator=generator)[mine]
    return student.times.schedule(int(J) + 1, run.task.decays[pick])


def draw_past(memory: int, generator: torch.Generator) -> tuple[int, float]:
    """How many positions of a window are history, all of it or, in a fifth of the updates as at the
    start of a stream, none; and a number in [0, 1) that decides whose states they have."""
    if not memory:
        return 0, 1.0
    past, chance = torch.rand(2, generator=generator).tolist()
    return (memory if past < 0.8 else 0), chance


def task_weights(K: int, k: Tensor) -> Tensor:
    """Of the task loss at steps k, uniform on 1 .. K: 0 where k is not early, else such that their
    mean over draws is 1."""
    last = math.ceil(EARLY * K)
    return (k <= last).float() * K / last


def pick_decay(run: Trainer) -> None:
    """Chooses the schedule's base on the validation split; the student is finished with it."""
    path = runs.student_path(run.folder, run.config.name)
    if finished(path, "student", run.config.student_steps):
        return
    opened = reopened(run, ())
    saved = load(path, "student")
    opened.config |= {"K": saved["config"]["K"]}
    student = runs.build_student(opened.teacher, saved["config"], saved["rho"])
    student.load_state_dict(saved["ema"])
    decay, scores = infer.choose_decay(opened, student.to(run.device).eval())
    run.say(f"schedule base {decay} (validation)")
    run.log(decay=decay, validation={str(key): value for key, value in scores.items()})
    if not run.rank:
        for key in ("kind", "versions"):
            saved.pop(key)
        save(path, "student", **saved, decay=decay)
    barrier(run)


def reopened(run: Trainer, names=None) -> runs.Run:
    """The run's networks from its folder, read with the settings of this start."""
    now = {key: getattr(run.config, key) for key in ("data", "unreadable", "workers")}
    return runs.open_run(run.folder, now, run.device.type, names)


def finished(path: Path, stage: str, steps: int) -> bool:
    """Whether a stage's checkpoint is there and complete."""
    if not path.exists():
        return False
    saved = load(path, stage)
    return saved["step"] >= steps and (stage != "student" or "decay" in saved)


def barrier(run: Trainer) -> None:
    if run.world > 1:
        dist.barrier()


def train_and_evaluate(run: Trainer) -> None:
    """Teacher, trajectories, student, report: what is missing of the stages asked for."""
    config, path = run.config, run.folder / "teacher.pt"
    needs = config.stage in ("student", "evaluate", *LEARNED_SOLVERS)
    if needs and not finished(path, "teacher", config.teacher_steps):
        raise UsageError(
            f"--stage {config.stage}: {run.folder} has no finished teacher; train it first"
        )
    teacher = train_teacher(run)
    if config.stage in ("all", "student"):
        train_student(run, teacher)
        pick_decay(run)
    if config.stage in LEARNED_SOLVERS:
        train_learned(run, teacher)
    if config.stage in ("all", "evaluate"):
        result = compare.report(reopened(run))
        if not run.rank:
            print(tables.write(compare.merge([result]), run.folder / "report"))


def main(argv: list[str]) -> None:
    config, task = parse(argv, __doc__)
    run = Trainer(config, task)
    if run.world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if run.device.type == "cuda" else "gloo")
    if told := task.said():
        run.say(told)
    if config.stage == "explicit":
        train_explicit(run)
    elif config.stage == "direct":
        train_direct(run)
    else:
        train_and_evaluate(run)
    if run.world > 1:
        runs.leave()


if __name__ == "__main__":
    with plain_errors():
        main(sys.argv[1:])
