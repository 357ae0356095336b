"""Run folders: a training process and the files that it writes, and how networks are read back.

train.py writes a run folder; infer.py and evidence/ read it. Its files hold tensors and plain
values, no code: each network is rebuilt from the settings that are saved beside its weights.
"""

import dataclasses
import gc
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from checkpoint import UsageError, load, load_weights, provenance, same_data, same_teacher, save
from config import Config, environment, open_task, pick_device
from fpode import TimeMap
from models import Equilibrium
from models.batch_norm import synchronise
from models.published import adopt
from student import Student
from tasks import Task, positions


@dataclass(frozen=True)
class Job:
    """One start of a training command: its settings, its data, its place among the processes."""

    config: Config
    task: Task
    data: str  # the fingerprint of the task's samples
    rank: int
    world: int
    device: torch.device

    @property
    def folder(self) -> Path:
        return Path(self.config.out)

    @property
    def micro_batch(self) -> int:
        """Samples that all processes compute together: a batch, or its share by --accumulate."""
        return self.config.batch // self.config.accumulate

    @property
    def share(self) -> slice:
        """This process's samples of a micro-batch."""
        each = self.micro_batch // self.world
        return slice(self.rank * each, (self.rank + 1) * each)


def begin(config: Config, task: Task) -> Job:
    """Makes the run's folder and joins the other processes; UsageError if either fails."""
    rank, world = environment("RANK", 0), environment("WORLD_SIZE", 1)
    if config.batch % (world * config.accumulate):
        raise UsageError(
            f"--batch {config.batch} is not divisible by {world} processes x --accumulate "
            f"{config.accumulate}"
        )
    device = torch.device(pick_device(config.device))
    if device.type == "cuda":
        device = torch.device("cuda", environment("LOCAL_RANK", 0))
        torch.cuda.set_device(device)
    job = Job(config, task, task.fingerprint(), rank, world, device)
    try:
        job.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {job.folder}: cannot write there ({error.strerror})") from error
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    versions = dict(torch=torch.__version__, data=job.data)
    log(job, start=dataclasses.asdict(config), **provenance(), **versions)
    if remark := task.remark():
        say(job, remark)
    return job


def leave() -> None:
    """Ends the process group when every rank is done with it."""
    if dist.is_initialized():
        gc.collect()  # DDP modules are cycles, and each holds the group with its threads
        dist.barrier()
        dist.destroy_process_group()


def barrier(job: Job) -> None:
    if job.world > 1:
        dist.barrier()


def log(job: Job, **line) -> None:
    """Appends a line to log.jsonl, on rank 0. A line that a full disk cut short is ended first."""
    if job.rank == 0:
        with open(job.folder / "log.jsonl", "a+b") as file:
            torn = file.tell() and file.seek(-1, os.SEEK_END) and file.read() != b"\n"
            text = json.dumps({"time": round(time.time(), 3), **line}) + "\n"
            file.write(b"\n" * bool(torn) + text.encode())


def say(job: Job, text: str) -> None:
    """Prints a line, on rank 0, without disturbing progress bars."""
    if job.rank == 0:
        tqdm.write(text)


def report_update(job: Job, stage, bar: tqdm, step: int, values: dict[str, Tensor]) -> None:
    """Writes the numbers of an update to the log and the terminal."""
    line = {name: value.item() for name, value in values.items()}
    log(job, stage=stage.kind, student=job.config.name, step=step, **line)
    text = ", ".join(f"{name} {value:.4g}" for name, value in line.items())
    if bar.disable:
        say(job, f"{stage.kind} {step}/{stage.steps}: {text}")
    else:
        bar.set_postfix_str(text)


def samples(job: Job, micros: range) -> Iterator[tuple[Tensor, Tensor]]:
    """x and y of this process's share of each micro-batch, on the device, augmented if wanted."""
    config, split = job.config, job.task.train

    def keys() -> Iterator[tuple[Tensor, Tensor | None]]:
        for micro in micros:
            first = micro * job.micro_batch
            rows, _ = positions(len(split), first, job.micro_batch, config.seed)
            seeds = config.seed * 10**9 + first + torch.arange(job.micro_batch)
            yield rows[job.share], seeds[job.share] if config.augment else None

    for x, y in split.stream(keys(), config.workers):
        yield moved(job, x), moved(job, y)


def moved(job: Job, v: Tensor) -> Tensor:
    """v on the device; it goes to a GPU from pinned memory, so that the host need not wait."""
    gpu = job.device.type == "cuda"
    return (
        v.contiguous().pin_memory().to(job.device, non_blocking=True) if gpu else v.to(job.device)
    )


def generator(job: Job, kind: str, micro: int) -> torch.Generator:
    """The random numbers of a micro-batch, the same on every process: each draws for all and takes
    its share. Also seeds torch itself, for dropout."""
    number = ("teacher", "student", "explicit").index(kind)
    seed = (3 * job.config.seed + number) * 10**9 + micro
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def state_shape(job: Job, net: Equilibrium) -> torch.Size:
    """The shape of one sample's state. Leaves net in evaluation mode: BatchNorm needs more than one
    sample to train on."""
    net.eval()
    x, _ = job.task.train.batch(torch.arange(1))
    return net.initial(net.inject(x.to(job.device))).shape[1:]


def write_checkpoint(job: Job, path: Path, kind: str, **contents) -> None:
    """Writes a checkpoint, on rank 0, with the run's settings and the fingerprint of its data."""
    if job.rank == 0:
        save(path, kind, config=dataclasses.asdict(job.config), data=job.data, **contents)


def read_checkpoint(job: Job, path: Path, kind: str) -> dict | None:
    """The checkpoint of an earlier start, or None; UsageError if it was made with other settings
    that matter to its kind, or from other data. A rival depends on the teacher's settings."""
    if not path.exists():
        return None
    saved = load(path, kind)
    same_data(path, saved, job.data)
    for field in dataclasses.fields(Config):
        old, new = (saved["config"].get(field.name, field.default), getattr(job.config, field.name))
        of = "student" if kind == "student" else "teacher"
        if of in field.metadata["group"].part_of and old != new:
            raise UsageError(
                f"{path} was made with --{field.name} {old}, not {new}; "
                "choose another --out (for a student, another --name), or delete it"
            )
    return saved


def restore(job: Job, stage) -> int:
    """Loads the checkpoint of a stage of train.py, if there is one; returns the updates made."""
    saved = read_checkpoint(job, stage.path, stage.kind)
    if saved is None:
        return 0
    for key, value in stage.extra.items():  # such as a student's clock and teacher
        if saved[key] != value:
            raise UsageError(f"{stage.path} has {key} {saved[key]}, not {value}; delete it")
    for name, part in stage.states().items():
        load_weights(part, saved[name], stage.path)
    return saved["step"]


def take_over(job: Job, net: Equilibrium, path: Path) -> None:
    """Writes the run's teacher.pt from --teacher, unless an earlier start has done so."""
    file, there = job.config.teacher, path.exists()
    barrier(job)  # every rank has looked before one of them writes
    if not there:
        adopt(net, Path(file), job.config.preset)
        write_checkpoint(
            job, path, "teacher", step=job.config.teacher_steps, model=net.state_dict(), source=file
        )
    elif load(path, "teacher").get("source") != file:
        raise UsageError(
            f"--teacher {file}: {job.folder} has another teacher; choose another --out"
        )
    barrier(job)


def distributed(job: Job, loss: nn.Module) -> nn.Module:
    """The loss module, under DDP if there are several processes; gradients have the run's dtype."""
    if job.world == 1:
        return loss
    synchronise(loss, job.device)
    module = DistributedDataParallel(loss)
    if job.config.dtype == "bf16":
        module.register_comm_hook(None, bf16_compress_hook)
    return module


def student_path(folder: Path, name: str) -> Path:
    return folder / (f"student-{name}.pt" if name else "student.pt")


def build_student(teacher: Equilibrium, config: dict, rho: float) -> Student:
    """A fresh student with the clock and the options of a training configuration."""
    options = dict(anderson=config["aa"], own_injection=config["own_injection"])
    return Student(teacher, TimeMap(rho, config["K"]), start=config["start"], **options)


@dataclass
class Run:
    """The networks of a run folder, ready for inference: the teacher, and finished students."""

    folder: Path
    task: Task
    config: dict
    teacher: Equilibrium
    students: dict[str, tuple[Student, float]]  # name -> (EMA student, decay)
    device: torch.device

    def solver(self) -> dict:
        return {"m": self.config["m"]}


def open_run(folder: Path, now: dict | None = None, device: str = "auto", names=None) -> Run:
    """Loads a run folder. names: students to load, by default all finished ones; now: settings that
    replace those of the training, such as where the data set is now."""
    place = torch.device(pick_device(device))
    saved = load(folder / "teacher.pt", "teacher")
    config = saved["config"] | (now or {})
    if saved["step"] < config["teacher_steps"]:
        raise UsageError(
            f"{folder}: the teacher has {saved['step']} of {config['teacher_steps']} updates; "
            "train.py continues it"
        )
    task = open_task(config)
    same_data(folder / "teacher.pt", saved, task.fingerprint())
    teacher = task.network(config)
    load_weights(teacher, saved["model"], folder / "teacher.pt")
    teacher.to(place).eval().requires_grad_(False)
    if names is None:
        found = sorted(folder.glob("student*.pt"))
        names = [path.stem.removeprefix("student").removeprefix("-") for path in found]
    students = {}
    for name in names:
        path = student_path(folder, name)
        saved = load(path, "student")
        same_teacher(path, saved, teacher)
        if "decay" in saved:
            student = build_student(teacher, saved["config"], saved["rho"])
            student.load_state_dict(saved["ema"])
            students[name] = (student.to(place).eval().requires_grad_(False), saved["decay"])
            config = config | {"K": saved["config"]["K"]}
    return Run(folder, task, config, teacher, students, place)


def reopened(job: Job, names=None) -> Run:
    """The networks of this run, read back from its folder."""
    now = {key: getattr(job.config, key) for key in ("data", "unreadable", "workers")}
    return open_run(job.folder, now, job.device.type, names)


def finished(path: Path, kind: str, config: Config) -> bool:
    """Whether the checkpoint of a teacher or a student exists and is complete."""
    if not path.exists():
        return False
    saved = load(path, kind)
    if kind == "teacher":
        return saved["step"] >= config.teacher_steps
    return "decay" in saved
