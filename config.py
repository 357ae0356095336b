"""Every setting of a run: one frozen dataclass, its ranges, its flags, the two recipes.

A field is a flag of train.py of the same name. `allowed` is checked and printed by the same text;
`group` says which checkpoints the value is part of. Flags win over the recipe, the recipe over the
task's defaults, these over the ones written here.

The recipe says what the student is trained on. `paper`: the teacher's trajectory, Alg. 2 to the
letter. `own-run`, the default: the states of its own run of Alg. 1, toward the equilibrium and the
teacher's prediction there.
"""

import argparse
import dataclasses
import inspect
import math
import operator
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint import UsageError
from tasks import Task, graphs, images, text

TASKS = images.TASKS | graphs.TASKS | text.TASKS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


TEACHER, STUDENT, EXPLICIT, BOTH, RUN = "teacher", "student", "explicit", "both", "run"
LEARNED_SOLVERS = ("hyperdeq", "ignn-solver")
STAGES = ("all", "teacher", "student", "evaluate", "direct", "explicit", *LEARNED_SOLVERS)


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
    image_size: int = opt(0, "of photographs, pixels; 0: the task's", ">= 0 and <= 4096", BOTH)
    segment: int = opt(
        0, "positions of a text that are solved together; 0: the task's", ">= 0", BOTH
    )
    memory: int = opt(0, "positions before them that they see; 0: the task's", ">= 0", BOTH)
    dtype: str = opt("fp32", "of networks; solves, times, losses stay fp32", "fp32 | bf16", BOTH)
    batch: int = opt(128, "global batch size, all ranks together", ">= 1", BOTH)
    accumulate: int = opt(1, "parts that a batch is computed in, one after another", ">= 1", BOTH)
    clip: float = opt(1.0, "gradient norm", "> 0", BOTH)
    # The network; 0: the preset's
    width: int = opt(0, "channels of a graph's state", ">= 0", BOTH)
    hidden: int = opt(0, "of its encoder and head", ">= 0", BOTH)
    kappa: float = opt(0.95, "bound of its contraction rate", "> 0 and < 1", BOTH)
    dropout: float = opt(0.5, "in its encoder and head", ">= 0 and < 1", BOTH)
    # Anderson acceleration of the teacher (Alg. 3)
    m: int = opt(6, "states in the window", ">= 1 and <= 100", BOTH)
    # The teacher
    teacher_steps: int = opt(700, "updates", ">= 1", TEACHER)
    optimizer: str = opt("adamw", "sgd with Nesterov momentum .9", "adamw | sgd", TEACHER)
    teacher_lr: float = opt(3e-3, "peak learning rate, cosine to 0", "> 0", TEACHER)
    teacher_decay: float = opt(0.1, "its weight decay", ">= 0", TEACHER)
    augment: bool = opt(True, "random views of the inputs", "", BOTH)
    layers: int = opt(4, "of f, with gradient", ">= 1 and <= 16", TEACHER)
    before: int = opt(8, "most steps of f before them, without; 0 to so many", ">= 0", TEACHER)
    growing: float = opt(0.0, "first share of updates, on 1, 2, .. layers", ">= 0 and < 1", TEACHER)
    jac_weight: float = opt(0.0, "of the Jacobian regularisation; 0: off", ">= 0", TEACHER)
    # Trajectories (Alg. 4)
    K: int = opt(20, "solver steps of a trajectory", ">= 2 and <= 1000", STUDENT)
    # The student and its losses (Alg. 2)
    recipe: str = opt("own-run", "preset of the flags below", "own-run | paper", STUDENT)
    name: str = opt("", "of the student's file, for ablations; empty: the recipe's", "", STUDENT)
    student_steps: int = opt(600, "updates", ">= 1", STUDENT)
    student_lr: float = opt(3e-3, "peak learning rate of Adam, cosine to 0", "> 0", STUDENT)
    kl: float = opt(
        0.5, "share of its predictions in the loss, against its states", ">= 0 and <= 1", STUDENT
    )
    lam1: float = opt(0.8, "recipe paper: global against local", ">= 0 and <= 1", STUDENT)
    lam2: float = opt(0.05, "recipe paper: task loss", ">= 0", STUDENT)
    own_injection: bool = opt(True, "the student trains its own injection", "", STUDENT)
    start: bool = opt(True, "a learned guess in place of z_0", "", STUDENT)
    aa: bool = opt(False, "the Anderson step of Eq. 7", "", STUDENT)
    rollout_max: int = opt(4, "most steps of its own run", ">= 1", STUDENT)
    # Explicit reference networks
    explicit_steps: int = opt(200, "updates", ">= 1", EXPLICIT)
    explicit_lr: float = opt(1e-2, "peak learning rate of AdamW, cosine to 0", "> 0", EXPLICIT)
    explicit_decay: float = opt(0.0, "its weight decay", ">= 0", EXPLICIT)
    pretrained: bool = opt(False, "torchvision's weights instead of training", "", EXPLICIT)
    # Data and storage
    workers: int = opt(min(8, os.cpu_count() or 1), "that read pictures", ">= 0 and <= 256")
    unreadable: str = opt("refuse", "what to do with damaged pictures", "refuse | skip")
    store: str = opt("auto", "of trajectories", "auto | memory | disk | rolling")
    cache_gb: float = opt(4.0, "memory for trajectories, GB per process", "> 0")
    disk_gb: float = opt(50.0, "disk for trajectories, GB", ">= 0")
    cache_dtype: str = opt("fp32", "of stored states", "fp32 | bf16", STUDENT)
    chunk: int = opt(128, "samples solved together, and per shard", ">= 1")
    reuse: int = opt(8, "uses of a trajectory in the rolling store", ">= 1")
    # This start of the command
    stage: str = opt("all", "what to do", " | ".join(STAGES))
    direct: int = opt(1, "evaluations of the network of --stage direct", ">= 1")
    explicit: str = opt("", "network of --stage explicit; empty: the task's first")
    teacher: str = opt("", "a teacher's file to take over: ours, or locuslab/deq's")
    data: str = opt("data", "folder of the data sets, or a user's own file")
    out: str = opt("", "run folder; empty: runs/TASK")
    device: str = opt("auto", "of all processes", "auto | cpu | cuda")
    compile: bool = opt(False, "torch.compile the cells")
    save_every: int = opt(50, "updates between checkpoints", ">= 1")
    log_every: int = opt(20, "updates between log lines", ">= 1")


RECIPES = {
    "own-run": {},
    "paper": dict(aa=True, start=False, student_lr=2e-3, name="paper"),
}
MOST = {bool: 1, int: 2**31 - 1, float: 1e38}
COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


def require(flag: str, value, allowed: str, choice: bool = False) -> None:
    """UsageError where a flag's value is not as `allowed` says: "a | b", or bounds. Numbers are
    finite, and whole ones below 2^31."""
    if choice or "|" in allowed:
        ok = value in allowed.split(" | ")
    else:
        bounds = re.findall(r"([<>]=?) ([\d.]+)", allowed)
        ok = isinstance(value, str) or (math.isfinite(value) and not value > MOST[type(value)])
        ok = ok and all(COMPARE[sign](value, float(bound)) for sign, bound in bounds)
    if not ok:
        raise UsageError(f"{flag} {value}: allowed is {allowed or 'a finite number'}")


def check(config: Config) -> None:
    """UsageError for the first value that is out of its range, with the range."""
    for field in dataclasses.fields(Config):
        value, allowed = getattr(config, field.name), field.metadata["allowed"]
        if field.name == "task":  # a user's own may have come since
            allowed = " | ".join(TASKS)
        require(f"--{field.name}", value, allowed, choice=field.name == "task")
    if not re.fullmatch(r"[\w.-]*", config.name):
        raise UsageError(f"--name {config.name!r}: allowed are letters, digits, '.', '_' and '-'")


def parse(argv: list[str], description: str = "") -> tuple[Config, Task]:
    """The settings that a command line asks for, and their task; UsageError for bad ones."""
    parser = command_line(description)
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
    check(Config(**given))
    task = open_task(given | {"task": name})
    chosen = {
        "preset": task.presets[0],
        "out": f"runs/{name}",
        "explicit": next(iter(task.references), ""),
    }
    if len(task.train) == 1:  # a graph: one for each process and update
        chosen["batch"] = environment("WORLD_SIZE", 1)
    chosen |= task.defaults | RECIPES[recipe]
    config = Config(**chosen | {key: value for key, value in given.items() if value != ""})
    check(config)
    for key in ("width", "hidden", "kappa", "dropout"):
        if key in given and key not in task.options:
            raise UsageError(f"--{key}: the networks of {name} have no such setting")
    for key in ("explicit", "pretrained"):
        if key in given and config.stage != "explicit":
            raise UsageError(f"--{key}: it is a setting of --stage explicit")
    if "direct" in given and config.stage != "direct":
        raise UsageError("--direct: it is a setting of --stage direct")
    if config.preset not in task.presets:
        raise UsageError(f"--preset {config.preset}: allowed is {' | '.join(task.presets)}")
    return config, task


def environment(name: str, default: int) -> int:
    """A number that torchrun sets; UsageError where it is none."""
    value = os.environ.get(name, str(default))
    if not value.isdecimal() or int(value) < default:
        raise UsageError(f"{name}={value}: torchrun sets it to a number >= {default}")
    return int(value)


def open_task(settings: dict) -> Task:
    """The task that settings ask for, with its data where they say."""
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
    """A parser that knows no abbreviations and whose errors are a UsageError: one line each."""
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
