"""Every setting of a run: one frozen dataclass, its ranges, its flags, the two recipes.

A field is a flag of train.py of the same name. `allowed` is checked and printed by the same text.
Flags override the recipe, the recipe overrides the task's defaults, and these override the ones
written here.

The recipe says what the student is trained on. `paper`: the teacher's trajectory, Alg. 2 to the
letter. `own-run`, the default: the states of its own run of Alg. 1, toward the equilibrium and the
teacher's prediction there.
"""

import argparse
import ctypes
import dataclasses
import inspect
import math
import operator
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from checkpoint import UsageError
from tasks import Task, chains, graphs, images, permutations, text

TASKS = images.TASKS | graphs.TASKS | chains.TASKS | text.TASKS | permutations.TASKS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STAGES = ("all", "teacher", "student", "evaluate")


class Group(NamedTuple):
    """A section of --help. part_of: the checkpoints that its settings are part of, a teacher's, a
    student's, both or none; if none, a setting may change when a run continues."""

    title: str
    part_of: tuple[str, ...] = ()


TASK = Group("task", ("teacher", "student"))
START = Group("this start of the command")
STUDENT = Group("student", ("student",))
TEACHER = Group("teacher", ("teacher",))
NETWORK = Group("network and solver", ("teacher", "student"))
STORE = Group("store of trajectories")


def opt(group: Group, default, help: str, allowed: str = "") -> dataclasses.Field:
    """A setting. allowed: "a | b", or bounds such as ">= 1 and < 5"."""
    metadata = dict(group=group, help=help, allowed=allowed)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """All settings of a run; every field is a flag, and all are saved in each checkpoint."""

    task: str = opt(TASK, "digits", "The data set.", " | ".join(TASKS))
    preset: str = opt(TASK, "", "The network's kind and size; empty: the task's first.")
    seed: int = opt(TASK, 0, "Decides weights, data order and every other draw.", ">= 0")
    batch: int = opt(TASK, 128, "Samples per update, of all processes together.", ">= 1")
    accumulate: int = opt(TASK, 1, "Micro-batches of an update, to save memory.", ">= 1")
    augment: bool = opt(TASK, True, "Train on random views of the inputs.")
    dtype: str = opt(
        TASK,
        "fp32",
        "Number format of the networks; solvers, times and losses stay fp32.",
        "fp32 | bf16",
    )
    clip: float = opt(TASK, 1.0, "The gradient's norm is clipped to this.", "> 0")
    image_size: int = opt(
        TASK, 0, "Pixels of a photograph's side; 0: the task's.", ">= 0 and <= 4096"
    )
    segment: int = opt(TASK, 0, "Words of a text that are solved at once; 0: the task's.", ">= 0")
    memory: int = opt(TASK, 0, "Words before a segment that it sees; 0: the task's.", ">= 0")

    stage: str = opt(
        START, "all", "What to do; finished stages are not repeated.", " | ".join(STAGES)
    )
    data: str = opt(START, "data", "Folder of the data sets, or your own file or folder.")
    out: str = opt(START, "", "The run's folder; empty: runs/TASK.")
    teacher: str = opt(
        START, "", "A trained teacher to distil: a teacher.pt, or a file of locuslab/deq."
    )
    device: str = opt(START, "auto", "Device of all processes.", "auto | cpu | cuda")
    compile: bool = opt(START, False, "Compile f and h with torch.compile.")
    workers: int = opt(
        START, min(8, os.cpu_count() or 1), "Processes that read pictures.", ">= 0 and <= 256"
    )
    unreadable: str = opt(START, "refuse", "What to do with damaged pictures.", "refuse | skip")
    save_every: int = opt(START, 50, "Updates between checkpoints.", ">= 1")

    recipe: str = opt(STUDENT, "own-run", "What the student is trained on.", "own-run | paper")
    name: str = opt(STUDENT, "", "Names the student's file, for ablations; empty: the recipe's.")
    student_steps: int = opt(STUDENT, 600, "Number of updates of the student.", ">= 1")
    student_lr: float = opt(STUDENT, 3e-3, "Peak learning rate of Adam, cosine to 0.", "> 0")
    K: int = opt(STUDENT, 20, "Steps of the teacher's solver, from z_0 to z_K.", ">= 2 and <= 1000")
    kl: float = opt(
        STUDENT,
        0.5,
        "Share of the loss that compares predictions; the rest compares states.",
        ">= 0 and <= 1",
    )
    rollout_max: int = opt(
        STUDENT, 4, "Most steps after the first one in a training run of the student.", ">= 1"
    )
    own_injection: bool = opt(STUDENT, True, "The student trains its own injection.")
    start: bool = opt(STUDENT, True, "The student learns to guess z* in place of z_0.")
    aa: bool = opt(STUDENT, False, "The student makes the Anderson step of Eq. 7.")
    lam1: float = opt(
        STUDENT,
        0.8,
        "Recipe paper: share of the global loss; the rest is the local one.",
        ">= 0 and <= 1",
    )
    lam2: float = opt(STUDENT, 0.05, "Recipe paper: weight of the task loss.", ">= 0")
    cache_dtype: str = opt(STUDENT, "fp32", "Number format of stored states.", "fp32 | bf16")

    teacher_steps: int = opt(TEACHER, 700, "Number of updates of the teacher.", ">= 1")
    teacher_lr: float = opt(TEACHER, 3e-3, "Peak learning rate, cosine to 0.", "> 0")
    teacher_decay: float = opt(TEACHER, 0.1, "Weight decay.", ">= 0")
    optimizer: str = opt(TEACHER, "adamw", "sgd has Nesterov momentum 0.9.", "adamw | sgd")
    layers: int = opt(TEACHER, 4, "Evaluations of f with gradient, per update.", ">= 1 and <= 16")
    before: int = opt(TEACHER, 8, "Most evaluations before these, without gradient.", ">= 0")
    growing: float = opt(
        TEACHER, 0.0, "First share of updates: 1, 2, 4, .. layers alone.", ">= 0 and < 1"
    )
    jac_weight: float = opt(TEACHER, 0.0, "Weight of the Jacobian regularisation; 0: off.", ">= 0")

    width: int = opt(NETWORK, 0, "Channels of a graph's state; 0: the preset's.", ">= 0")
    hidden: int = opt(NETWORK, 0, "Width of a graph's encoder; 0: the preset's.", ">= 0")
    kappa: float = opt(NETWORK, 0.95, "Bound of a graph's contraction rate.", "> 0 and < 1")
    dropout: float = opt(NETWORK, 0.5, "Dropout in a graph's encoder and head.", ">= 0 and < 1")
    m: int = opt(NETWORK, 6, "States in Anderson's window (Alg. 3).", ">= 1 and <= 100")

    store: str = opt(STORE, "auto", "Where states are kept.", "auto | memory | disk | rolling")
    cache_gb: float = opt(STORE, 4.0, "Memory for states, GB per process.", "> 0")
    disk_gb: float = opt(STORE, 50.0, "Disk for states, GB.", ">= 0")
    chunk: int = opt(STORE, 128, "Samples that are solved at once; also per file on disk.", ">= 1")


RECIPES = {
    "own-run": {},
    "paper": dict(aa=True, start=False, student_lr=2e-3, name="paper"),
}
MOST = {bool: 1, int: 2**31 - 1, float: 1e38}
COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


def require(flag: str, value, allowed: str, choice: bool = False) -> None:
    """UsageError if a flag's value is not as `allowed` says: "a | b", or bounds. Numbers must be
    finite, whole ones below 2^31."""
    if choice or "|" in allowed:
        ok = value in allowed.split(" | ")
    else:
        bounds = re.findall(r"([<>]=?) ([\d.]+)", allowed)
        ok = isinstance(value, str) or (math.isfinite(value) and not value > MOST[type(value)])
        ok = ok and all(COMPARE[sign](value, float(bound)) for sign, bound in bounds)
    if not ok:
        raise UsageError(f"{flag} {value}: allowed is {allowed or 'a finite number'}")


def check(config: Config) -> None:
    """UsageError for the first value that is out of range; says the range."""
    for field in dataclasses.fields(Config):
        value, allowed = getattr(config, field.name), field.metadata["allowed"]
        if field.name == "task":  # a user's own may have come since
            allowed = " | ".join(TASKS)
        require(f"--{field.name}", value, allowed, choice=field.name == "task")
    if not re.fullmatch(r"[\w.-]*", config.name):
        raise UsageError(f"--name {config.name!r}: allowed are letters, digits, '.', '_' and '-'")


def parse(argv: list[str], description: str = "", rival: bool = False) -> tuple[Config, Task]:
    """The settings and the task that a command line asks for; UsageError for bad ones. rival: an
    explicit network is trained, with the task's settings for those."""
    parser = command_line(description)
    groups: dict[Group, argparse._ArgumentGroup] = {}
    for field in dataclasses.fields(Config):
        group, help, allowed = (field.metadata[key] for key in ("group", "help", "allowed"))
        if group not in groups:
            groups[group] = parser.add_argument_group(group.title)
        text = f"{help} ({allowed + '; ' if allowed else ''}default {field.default!r})"
        kind = (
            dict(action=argparse.BooleanOptionalAction)
            if field.type is bool
            else dict(type=field.type, metavar=field.type.__name__.upper())
        )
        groups[group].add_argument(f"--{field.name}", default=argparse.SUPPRESS, help=text, **kind)
    given = vars(parser.parse_args(argv))
    name, recipe = (given.get(key, getattr(Config, key)) for key in ("task", "recipe"))
    check(Config(**given))
    task = open_task(given | {"task": name})
    chosen = {"preset": task.presets[0], "out": f"runs/{name}"}
    if len(task.train) == 1:  # a graph: one for each process and update
        chosen["batch"] = environment("WORLD_SIZE", 1)
    chosen |= task.defaults | (task.explicit_defaults if rival else {}) | RECIPES[recipe]
    config = Config(**chosen | {key: value for key, value in given.items() if value != ""})
    check(config)
    for key in ("width", "hidden", "kappa", "dropout"):
        if key in given and key not in task.options:
            raise UsageError(f"--{key}: the networks of {name} have no such setting")
    if config.preset not in task.presets:
        raise UsageError(f"--preset {config.preset}: allowed is {' | '.join(task.presets)}")
    return config, task


def environment(name: str, default: int) -> int:
    """A number that torchrun sets; UsageError if it is none."""
    value = os.environ.get(name, str(default))
    if not value.isdecimal() or int(value) < default:
        raise UsageError(f"{name}={value}: torchrun sets it to a number >= {default}")
    return int(value)


LIBC = ctypes.CDLL(None)  # the process's own symbols: the C library among them


def pick_device(name: str) -> str:
    """The device that a --device flag means; on a CPU, also lets glibc keep freed memory.

    By default glibc maps memory anew for each large tensor, with a page fault per 4 KB. On a graph
    of 169,343 nodes this took two fifths of an update's time.
    """
    if hasattr(LIBC, "mallopt"):
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        LIBC.mallopt(M_MMAP_MAX, 0)
        LIBC.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: allowed is auto | cpu | cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA device is there; allowed is auto | cpu")
    return name


def open_task(settings: dict) -> Task:
    """The task that the settings ask for, with its data read from where they say."""
    build, data = TASKS[settings["task"]], Path(settings.get("data", Config.data))
    known = inspect.signature(build).parameters
    options = {}
    for key in ("image_size", "unreadable", "segment", "memory"):
        value = settings.get(key, getattr(Config, key))
        if value == getattr(Config, key):
            continue
        if key in known:
            options[key] = value
        else:
            raise UsageError(f"--{key}: {settings['task']} has no such setting")
    return build(data, **options)


def command_line(description: str) -> argparse.ArgumentParser:
    """A parser that takes no abbreviations and raises UsageError: one line for each error."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = refuse
    return parser


def refuse(message: str):
    """argparse's error handler: the message alone, without the usage text."""
    raise UsageError(f"{message}; see --help")
