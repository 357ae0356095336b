r"""Train a DEQ teacher, distil it into a C-DEQ student (Alg. 2), evaluate both.

    python train.py --task digits                       all stages, on this machine
    python train.py --task digits --recipe paper         the paper's recipe, beside the default one
    python train.py --task digits --rollout 0 --name no-rollout          an ablation, beside both
    torchrun --nproc_per_node=8 train.py --task digits   the same on 8 processes, one per GPU

Paper: Sec. 3.4, Alg. 2, App. A.3. A run lives in one folder (--out): teacher.pt, trajectories/,
student.pt, log.jsonl, report.json, report.md, report.png. The same command continues where it was
stopped: every random number is a function of (seed, stage, step), so the weights come out the same.

Recipes are presets of flags. `paper`: Alg. 2 to the letter. `rollout`, the default: k = 0 is
trained, and often; the local target is the later prediction; and a term is added for states that
the student reaches by itself.
"""

import argparse
import dataclasses
import json
import math
import operator
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import compare
import infer
import trajectories
from checkpoint import UsageError, fingerprint, load, plain_errors, provenance, save
from fpode import TimeMap, contraction, propose_rho
from losses import Distillation, TeacherLoss, total
from models import Equilibrium
from student import update_ema
from tasks import Task, positions
from tasks.images import TASKS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


TEACHER, STUDENT, BOTH, RUN = "teacher", "student", "both", "run"


def opt(default, help: str, allowed: str = "", group: str = RUN):
    """A Config field. allowed: "a | b", or bounds such as ">= 1 and < 5". group: the checkpoints
    that the value is part of; RUN: it may change when a run continues."""
    return dataclasses.field(
        default=default, metadata=dict(help=help, allowed=allowed, group=group)
    )


@dataclass(frozen=True)
class Config:
    """Everything a run depends on; every field is a flag, saved in each checkpoint."""

    task: str = opt("digits", "data set", " | ".join(TASKS), BOTH)
    preset: str = opt("", "network size; empty: the task's first", "", BOTH)
    seed: int = opt(0, "of weights, data order and every draw", ">= 0", BOTH)
    dtype: str = opt("fp32", "of networks; solves, times, losses stay fp32", "fp32 | bf16", BOTH)
    batch: int = opt(128, "global batch size, all ranks together", ">= 1", BOTH)
    clip: float = opt(1.0, "gradient norm", "> 0", BOTH)
    # Anderson acceleration of the teacher (Alg. 3)
    m: int = opt(6, "states in the window", ">= 1", BOTH)
    beta: float = opt(1.0, "mixing", "> 0 and <= 1", BOTH)
    ridge: float = opt(1e-6, "relative to the mean squared residual", ">= 0", BOTH)
    # The teacher
    teacher_steps: int = opt(700, "updates", ">= 1", TEACHER)
    teacher_lr: float = opt(3e-3, "peak learning rate of AdamW, cosine to 0", "> 0", TEACHER)
    teacher_decay: float = opt(0.1, "its weight decay", ">= 0", TEACHER)
    augment: bool = opt(True, "random views of the inputs", "", TEACHER)
    solver_steps: int = opt(12, "evaluations of the training solve", ">= 1", TEACHER)
    phantom: int = opt(1, "differentiable steps after it", ">= 1 and <= 5", TEACHER)
    tau: float = opt(1.0, "their damping", "> 0 and <= 1", TEACHER)
    jac_weight: float = opt(0.2, "of the Jacobian regularisation; 0: off", ">= 0", TEACHER)
    jac_prob: float = opt(0.3, "share of the updates that have it", ">= 0 and <= 1", TEACHER)
    # Trajectories (Alg. 4, Eqs. 6 and 13)
    K: int = opt(20, "solver steps of a trajectory", ">= 2", STUDENT)
    z0: str = opt("zeros", "initial state", "zeros | normal", STUDENT)
    p_aug: float = opt(0.1, "probability of z_k <- z_K", ">= 0 and <= 1", STUDENT)
    k_min: int = opt(1, "first step that may be replaced", ">= 1", STUDENT)
    k_tail: int = opt(3, "steps before K that are kept", ">= 0", STUDENT)
    rho: float = opt(0.0, "rate of the clock; 0: measured", ">= 0", STUDENT)
    eps: float = opt(0.002, "first time", ">= 0", STUDENT)
    T: float = opt(5.0, "last time", "> 0", STUDENT)
    # The student and its losses (Alg. 2)
    recipe: str = opt("rollout", "preset of the flags below", "rollout | paper", STUDENT)
    name: str = opt("", "of the student's file, for ablations; empty: the recipe's", "", STUDENT)
    student_steps: int = opt(600, "updates", ">= 1", STUDENT)
    student_lr: float = opt(2e-3, "peak learning rate of Adam, cosine to 0", "> 0", STUDENT)
    mu: float = opt(0.98, "EMA rate", ">= 0 and < 1", STUDENT)
    lam1: float = opt(0.8, "global against local", ">= 0 and <= 1", STUDENT)
    lam2: float = opt(0.05, "task loss", ">= 0", STUDENT)
    early: float = opt(0.25, "first share of steps, with task loss", "> 0 and <= 1", STUDENT)
    gamma: float = opt(1.0, "exponent of c_skip", ">= 1", STUDENT)
    distance: str = opt("mse", "d of Eqs. 9 and 10", "mse | huber", STUDENT)
    aa: bool = opt(True, "the Anderson step of Eq. 7", "", STUDENT)
    alpha_grad: bool = opt(False, "gradient through its weights", "", STUDENT)
    k0: float = opt(0.25, "P(k = 0); 0: k from 1 .. K as in Alg. 2", ">= 0 and < 1", STUDENT)
    local: str = opt("later", "target of Eq. 10, k - 1 or k + 1", "earlier | later", STUDENT)
    rollout: float = opt(1.0, "weight of the loss on own states", ">= 0", STUDENT)
    rollout_max: int = opt(8, "most steps of its own run", ">= 1", STUDENT)
    # Storage
    store: str = opt("auto", "of trajectories", "auto | memory | disk | rolling")
    cache_gb: float = opt(4.0, "memory for trajectories, GB per process", "> 0")
    disk_gb: float = opt(50.0, "disk for trajectories, GB", ">= 0")
    cache_dtype: str = opt("fp32", "of stored states", "fp32 | bf16", STUDENT)
    chunk: int = opt(128, "samples solved together, and per shard", ">= 1")
    reuse: int = opt(8, "uses of a trajectory in the rolling store", ">= 1")
    # This start of the command
    stage: str = opt("all", "what to do", "all | teacher | student | evaluate")
    data: str = opt("data", "folder of the data sets")
    out: str = opt("", "run folder; empty: runs/TASK")
    device: str = opt("auto", "of all processes", "auto | cpu | cuda")
    compile: bool = opt(False, "torch.compile the cells")
    save_every: int = opt(50, "updates between checkpoints", ">= 1")
    log_every: int = opt(20, "updates between log lines", ">= 1")


RECIPES = {
    "rollout": {},
    "paper": dict(k0=0.0, local="earlier", rollout=0.0, name="paper"),
}
COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


def check(config: Config) -> None:
    """UsageError for the first value that is out of its range, with the range."""
    for field in dataclasses.fields(Config):
        value, allowed = getattr(config, field.name), field.metadata["allowed"]
        if "|" in allowed or field.name == "task":
            ok = value in allowed.split(" | ")
        else:
            bounds = re.findall(r"([<>]=?) ([\d.]+)", allowed)
            ok = all(COMPARE[sign](value, float(bound)) for sign, bound in bounds)
            ok = ok and (not isinstance(value, float) or math.isfinite(value))
        if not ok:
            raise UsageError(f"--{field.name} {value}: allowed is {allowed or 'a finite number'}")
    if config.k_min > config.K - config.k_tail and config.p_aug > 0:
        raise UsageError(
            f"--k_min {config.k_min} --k_tail {config.k_tail}: no step of K = {config.K} is between"
        )
    if not re.fullmatch(r"[\w.-]*", config.name):
        raise UsageError(f"--name {config.name!r}: allowed are letters, digits, '.', '_' and '-'")
    try:
        TimeMap(config.rho or 1e-3, config.K, config.eps, config.T)
    except ValueError as error:
        raise UsageError(
            f"--rho {config.rho} --eps {config.eps} --T {config.T}: {error}"
        ) from error


def parse(argv: list[str]) -> tuple[Config, Task]:
    """Flags over the recipe over the task's defaults over Config's own."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = infer.refuse
    for field in dataclasses.fields(Config):
        allowed = field.metadata["allowed"]
        text = f"{field.metadata['help']} ({allowed + '; ' if allowed else ''}{field.default!r})"
        kind = (
            dict(action=argparse.BooleanOptionalAction)
            if field.type is bool
            else dict(type=field.type, metavar=field.type.__name__.upper())
        )
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, help=text, **kind)
    given = vars(parser.parse_args(argv))
    name, recipe = (given.get(key, getattr(Config, key)) for key in ("task", "recipe"))
    check(Config(task=name, recipe=recipe))
    task = TASKS[name](Path(given.get("data", Config.data)))
    chosen = {"preset": task.presets[0], "out": f"runs/{name}", **task.defaults, **RECIPES[recipe]}
    config = Config(**chosen | {key: value for key, value in given.items() if value != ""})
    check(config)
    if config.preset not in task.presets:
        raise UsageError(f"--preset {config.preset}: allowed is {' | '.join(task.presets)}")
    return config, task


class Trainer:
    """One run: its configuration, its place among the ranks, its folder, and the one loop."""

    def __init__(self, config: Config, task: Task):
        self.config, self.task, self.folder = config, task, Path(config.out)
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if config.batch % self.world:
            raise UsageError(f"--batch {config.batch} is not divisible by {self.world} processes")
        self.device = torch.device(infer.pick_device(config.device))
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        self.mine = slice(*(config.batch // self.world * r for r in (self.rank, self.rank + 1)))
        if not self.rank:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self.log_file = open(self.folder / "log.jsonl", "a")  # noqa: SIM115
            except OSError as error:
                raise UsageError(
                    f"--out {self.folder}: cannot write there ({error.strerror})"
                ) from error
        self.log(start=dataclasses.asdict(config), **provenance(), torch=torch.__version__)

    def log(self, **line) -> None:
        if not self.rank:
            self.log_file.write(json.dumps({"time": round(time.time(), 3), **line}) + "\n")
            self.log_file.flush()

    def say(self, text: str) -> None:
        if not self.rank:
            tqdm.write(text)

    def generator(self, stage: int, step: int) -> torch.Generator:
        """The randomness of one update, the same on every rank: draws are global, then sliced."""
        torch.manual_seed((2 * self.config.seed + stage) * 10**9 + step)  # dropout, if there is any
        return torch.Generator().manual_seed((2 * self.config.seed + stage) * 10**9 + step)

    def bind(self, path: Path, saved: dict, *groups: str) -> None:
        """UsageError where a checkpoint was made with other values in these groups."""
        for field in dataclasses.fields(Config):
            old, new = saved.get(field.name), getattr(self.config, field.name)
            if field.metadata["group"] in groups and old != new:
                raise UsageError(
                    f"{path} was made with --{field.name} {old}, not {new}; "
                    "choose another --out (for a student, another --name), or delete it"
                )

    def fit(
        self, stage, path, module, online, weigh, draw, steps, lr, decay=0.0, ema=None, **extra
    ):
        """The loop (Alg. 2 for the student): draw, loss, gradient, step, EMA; log; save; resume.

        module(*draw(step)) gives a dict of loss terms and weigh(terms) their sum; `online` is the
        network that is trained and saved, `extra` what its checkpoint holds besides.
        """
        config = self.config
        online.requires_grad_(True)
        optimizer = torch.optim.AdamW(online.parameters(), lr=lr, weight_decay=decay)
        start = 0
        if path.exists():
            saved = load(path, stage)
            self.bind(path, saved["config"], stage, BOTH)
            for key in extra:  # what the student depends on besides: its clock and its teacher
                if saved[key] != extra[key]:
                    raise UsageError(f"{path} has {key} {saved[key]}, not {extra[key]}; delete it")
            online.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            if ema is not None:
                ema.load_state_dict(saved["ema"])
            start = saved["step"]
        model = DistributedDataParallel(module) if self.world > 1 else module

        def keep(step: int) -> None:
            if not self.rank:
                averages = {} if ema is None else {"ema": ema.state_dict()}
                contents = dict(model=online.state_dict(), optimizer=optimizer.state_dict())
                settings = dataclasses.asdict(config)
                save(path, stage, step=step, config=settings, **contents, **averages, **extra)

        quiet = None if not self.rank else True  # None: a bar on a terminal only
        bar = tqdm(range(start, steps), stage, steps, initial=start, disable=quiet, unit="update")
        for step in bar:
            batch = draw(step)
            for group in optimizer.param_groups:
                group["lr"] = lr * schedule(step, steps)
            kept = f"{path} keeps the last good state (if any); a lower learning rate may help"
            try:
                half = config.dtype == "bf16"
                with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
                    terms = model(*batch)
            except FloatingPointError as error:  # the solver's word for a network that diverged
                raise UsageError(f"{stage}: {error}, at step {step}; {kept}") from error
            optimizer.zero_grad(set_to_none=True)
            weigh(terms).backward()  # Alg. 2, l. 7
            values = {f"{name} loss": term.item() for name, term in terms.items()}
            norm = nn.utils.clip_grad_norm_(online.parameters(), config.clip)
            for name, value in {**values, "gradient's norm": norm.item()}.items():
                if not math.isfinite(value):
                    raise UsageError(f"{stage}: the {name} is {value} at step {step}; {kept}")
            optimizer.step()  # Alg. 2, l. 8
            if ema is not None:
                update_ema(ema, online, config.mu)  # Alg. 2, l. 9
            if step % config.log_every == 0 or step + 1 == steps:
                bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()})
                self.log(
                    stage=stage, student=config.name, step=step, **values, gradient=norm.item()
                )
                if bar.disable:
                    text = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
                    self.say(f"{stage} {step}/{steps}: {text}")
            if (step + 1) % config.save_every == 0 and step + 1 < steps:
                keep(step + 1)
        keep(steps)


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear over the first twentieth, then cosine to 0."""
    warm = max(1, steps // 20)
    return min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / steps)))


def train_teacher(run: Trainer) -> Equilibrium:
    """The DEQ itself; returns the finished teacher, frozen."""
    config, task, path = run.config, run.task, run.folder / "teacher.pt"
    torch.manual_seed(config.seed)
    net = task.network(config.preset).to(run.device)
    if not finished(path, "teacher", config.teacher_steps):
        if config.compile:
            net.cell.compile()
        solver = dict(m=config.m, beta=config.beta, ridge=config.ridge)
        module = TeacherLoss(net, config.solver_steps, config.phantom, config.tau, **solver)
        state = state_shape(run, net)

        def draw(step: int) -> tuple:
            generator = run.generator(0, step)
            first = step * config.batch
            rows, _ = positions(len(task.train), first, config.batch, config.seed)
            seeds = config.seed * 10**9 + first + torch.arange(config.batch)
            views = task.train.batch(rows[run.mine], seeds[run.mine] if config.augment else None)
            x, y = (v.to(run.device) for v in views)
            probe = None
            if config.jac_weight > 0 and torch.rand((), generator=generator) < config.jac_prob:
                probe = torch.randn(config.batch, *state, generator=generator)[run.mine]
            return x, y, probe if probe is None else probe.to(run.device)

        def weigh(terms: dict[str, Tensor]) -> Tensor:
            return terms["task"] + config.jac_weight * terms.get("jacobian", 0.0)

        steps, lr, decay = config.teacher_steps, config.teacher_lr, config.teacher_decay
        run.fit("teacher", path, module, net.train(), weigh, draw, steps, lr, decay)
        barrier(run)
    saved = load(path, "teacher")
    run.bind(path, saved["config"], TEACHER, BOTH)
    net = task.network(config.preset)
    net.load_state_dict(saved["model"])
    return net.to(run.device).eval().requires_grad_(False)


@torch.no_grad()
def state_shape(run: Trainer, net: Equilibrium) -> torch.Size:
    """Shape of one sample's state."""
    x, _ = run.task.train.batch(torch.arange(1))
    return net.initial(net.inject(x.to(run.device))).shape[1:]


def make_store(run: Trainer, teacher: Equilibrium) -> trajectories.Memory:
    """The train split's trajectories, in the store that fits the budgets."""
    config, split = run.config, run.task.train
    solver = dict(m=config.m, beta=config.beta, ridge=config.ridge)
    dtype = DTYPES[config.cache_dtype]
    state = teacher.initial(teacher.inject(split.batch(torch.arange(1))[0].to(run.device))).shape[
        1:
    ]
    limits = config.cache_gb, config.disk_gb
    kind, message = trajectories.plan(len(split), state, config.K, dtype, *limits)
    if config.store != "auto":
        kind, message = config.store, f"{message}; chosen by hand: {config.store}"
    run.say(message)

    def solve(x: Tensor, rows: Tensor) -> Tensor:
        x = x.to(run.device)
        with torch.autocast(run.device.type, torch.bfloat16, enabled=config.dtype == "bf16"):
            return trajectories.sample(teacher, x, rows, config.K, config.z0, **solver)

    common = (solve, split, config.batch, config.seed)
    options = dict(chunk=config.chunk, dtype=dtype)
    if kind == "memory":
        return trajectories.Memory(*common, **options)
    if kind == "disk":
        binding = {
            "teacher": fingerprint(teacher),
            "K": config.K,
            "z0": config.z0,
            "split": "train",
        }
        folder = run.folder / "trajectories"
        return trajectories.Disk(*common, folder=folder, header=binding | solver, **options)
    slots = int(config.cache_gb * 1e9 / ((config.K + 1) * state.numel() * dtype.itemsize))
    return trajectories.Rolling(*common, slots=slots, reuse=config.reuse, **options)


def draw_steps(config: Config, generator: torch.Generator) -> Tensor:
    """k of each sample (batch,): uniform on 1 .. K (Alg. 2, l. 3), or with k = 0 oversampled."""
    if config.k0 == 0:
        return torch.randint(1, config.K + 1, (config.batch,), generator=generator)
    k = torch.randint(1, config.K, (config.batch,), generator=generator)
    return torch.where(torch.rand(config.batch, generator=generator) < config.k0, 0, k)


def train_student(run: Trainer, teacher: Equilibrium) -> None:
    """Consistency distillation, Alg. 2."""
    config, path = run.config, infer.student_path(run.folder, run.config.name)
    if finished(path, "student", config.student_steps):
        run.bind(path, infer.load_student(path, teacher)["config"], STUDENT, BOTH)
        return
    store = make_store(run, teacher)
    rows = store.batch(0)[2]
    every = torch.arange(config.K + 1).expand(len(rows), -1)
    rate = contraction(torch.stack(store.states(rows, every)).float(), teacher.sample_dims)
    rho = config.rho or propose_rho(rate, config.K)
    run.say(f"teacher contracts by {rate:.3f} per step; clock rate rho = {rho:.3f}")
    run.log(contraction=rate, rho=rho)
    settings = dataclasses.asdict(config)
    student = infer.build_student(teacher, settings, rho).to(run.device)  # Alg. 2, l. 1
    ema = infer.build_student(teacher, settings, rho).to(run.device).requires_grad_(False)
    if config.compile:
        student.cell.compile()
    module = Distillation(teacher, student, ema, config.distance)
    last = math.ceil(config.early * config.K)
    chance = last / config.K
    if config.k0 > 0:
        chance = config.k0 + (1 - config.k0) * min(1.0, last / (config.K - 1))

    def draw(step: int) -> tuple:
        generator, device = run.generator(1, step), run.device
        k = draw_steps(config, generator)  # Alg. 2, l. 3
        j = (k + (1 if config.local == "later" else -1)).clamp(0, config.K)
        draws = torch.rand(config.batch, config.K + 1, generator=generator)
        ks = torch.stack([k - 1, k, j - 1, j, torch.full_like(k, config.K)], dim=1).clamp(min=0)
        ks = trajectories.augment(ks, draws, config.p_aug, config.k_min, config.k_tail)
        x, y, rows = store.batch(step)
        states = [z.to(device, torch.float32) for z in store.states(rows, ks[run.mine])]
        early = ((k <= last).float() / chance)[run.mine].to(device) if config.lam2 > 0 else None
        rollout = None
        if config.rollout > 0:
            J = int(torch.randint(1, config.rollout_max + 1, (), generator=generator))
            pick = int(torch.randint(len(infer.DECAYS), (), generator=generator))
            rollout = student.times.schedule(J + 1, infer.DECAYS[pick]).to(device)
        k, j = k[run.mine].to(device), j[run.mine].to(device)
        return x.to(device), y.to(device), k, j, states, early, rollout

    def weigh(terms: dict[str, Tensor]) -> Tensor:
        return total(terms, config.lam1, config.lam2, config.rollout)

    steps, lr = config.student_steps, config.student_lr
    extra = dict(rho=rho, teacher=fingerprint(teacher))
    run.fit("student", path, module, student, weigh, draw, steps, lr, ema=ema, **extra)
    barrier(run)
    pick_decay(run, path)


def pick_decay(run: Trainer, path: Path) -> None:
    """Chooses the schedule's base on the validation split; the student is finished with it."""
    opened = infer.open_run(run.folder, run.config.data, run.device.type, ())
    saved = load(path, "student")
    opened.config |= {"K": saved["config"]["K"]}
    student = infer.build_student(opened.teacher, saved["config"], saved["rho"])
    student.load_state_dict(saved["ema"])
    decay, scores = infer.choose_decay(opened, student.to(run.device).eval())
    run.say(f"schedule base {decay} (validation)")
    run.log(decay=decay, validation={str(key): value for key, value in scores.items()})
    if not run.rank:
        for key in ("kind", "versions"):
            saved.pop(key)
        save(path, "student", **saved, decay=decay)
    barrier(run)


def finished(path: Path, stage: str, steps: int) -> bool:
    """Whether a stage's checkpoint is there and complete."""
    if not path.exists():
        return False
    saved = load(path, stage)
    return saved["step"] >= steps and (stage == "teacher" or "decay" in saved)


def barrier(run: Trainer) -> None:
    if run.world > 1:
        dist.barrier()


def main(argv: list[str]) -> None:
    config, task = parse(argv)
    run = Trainer(config, task)
    if run.world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if run.device.type == "cuda" else "gloo")
    teacher_ready = finished(run.folder / "teacher.pt", "teacher", config.teacher_steps)
    if config.stage in ("student", "evaluate") and not teacher_ready:
        raise UsageError(
            f"--stage {config.stage}: {run.folder} has no finished teacher; train it first"
        )
    teacher = train_teacher(run)
    if config.stage in ("all", "student"):
        train_student(run, teacher)
    if config.stage in ("all", "evaluate"):
        opened = infer.open_run(run.folder, config.data, run.device.type)
        result = compare.report(opened)
        if not run.rank:
            print(compare.write(result, run.folder / "report"))
    if run.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    with plain_errors():
        main(sys.argv[1:])
