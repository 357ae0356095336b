"""A run folder: what lies in it, how its networks are built and opened again.

train.py writes one, infer.py and compare.py answer from it. Its files hold tensors and plain
values, no code: each network is built anew from the settings that are saved beside its weights.
"""

import ctypes
import gc
import io
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from checkpoint import UsageError, contents_of, fingerprint, load, ours
from config import LEARNED_SOLVERS, open_task
from fpode import TimeMap
from models import Equilibrium, mdeq, transformer
from models.learned_solver import LearnedSolver
from student import Student
from tasks import Task


@dataclass
class Run:
    """A run folder's networks, ready to answer: the teacher, and each finished student, explicit
    network and learned solver by name and direct network by its evaluations."""

    folder: Path
    task: Task
    config: dict
    teacher: Equilibrium
    students: dict[str, tuple[Student, float]]  # name -> (EMA student, decay)
    explicit: dict[str, nn.Module]
    learned: dict[str, LearnedSolver]
    direct: dict[int, Equilibrium]
    device: torch.device

    def solver(self) -> dict:
        return {"m": self.config["m"]}


def student_path(folder: Path, name: str) -> Path:
    return folder / (f"student-{name}.pt" if name else "student.pt")


def fill(part, state: dict, path: Path) -> None:
    """part.load_state_dict(state); UsageError where the sizes are those of other data."""
    try:
        part.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{path} does not fit the data at hand (another vocabulary, other classes): {reason}"
        ) from error


def same_data(path: Path, checkpoint: dict, data: str) -> None:
    """UsageError where a checkpoint was trained on other data than those at hand."""
    if checkpoint.get("data", data) != data:
        raise UsageError(
            f"{path} was trained on other data than those at hand (fingerprint "
            f"{checkpoint['data']}, not {data}); name its own by --data, or choose another --out"
        )


def load_of(path: Path, kind: str, teacher: Equilibrium) -> dict:
    """The checkpoint of a student or learned solver; UsageError where it is another teacher's."""
    saved = load(path, kind)
    if saved["teacher"] != fingerprint(teacher):
        raise UsageError(
            f"{path} was distilled from another teacher than the one beside it; delete it"
        )
    return saved


def teacher_weights(path: Path) -> dict[str, Tensor]:
    """The weights in a teacher's file under our names: a checkpoint of ours, or a state dict of
    locuslab/deq, which may lie within a larger checkpoint; no pickled code is run."""
    advice = "allowed are a teacher.pt of train.py and a state dict of locuslab/deq"
    raw = contents_of(path, advice)
    if ours(raw):
        return load(path, "teacher")["model"]
    try:
        state = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a foreign file makes the reader raise
        reason = str(error).splitlines()[0]
        raise UsageError(f"{path} holds no plain tensors ({reason}); {advice}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UsageError(f"{path} is no dict of tensors; {advice}")
    return (transformer if any(".dec_attn." in name for name in state) else mdeq).published(state)


def build_student(teacher: Equilibrium, config: dict, rho: float) -> Student:
    """A fresh student with the clock and the options of a training configuration."""
    options = dict(anderson=config["aa"], own_injection=config["own_injection"])
    return Student(teacher, TimeMap(rho, config["K"]), start=config["start"], **options)


def build_learned(teacher: Equilibrium, kind: str, m: int) -> LearnedSolver:
    """A fresh learned solver; UsageError where the teacher is not of its kind."""
    try:
        return LearnedSolver(teacher, m, graph_net=kind == "ignn-solver")
    except ValueError as error:
        raise UsageError(f"--stage {kind}: {error}") from error


def open_run(folder: Path, now: dict | None = None, device: str = "auto", names=None) -> Run:
    """Loads a run folder; names: students to load, all finished ones by default; now: settings that
    win over those of the training, as where the data set is."""
    device = torch.device(pick_device(device))
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
    fill(teacher, saved["model"], folder / "teacher.pt")
    teacher.to(device).eval().requires_grad_(False)
    if names is None:
        found = sorted(folder.glob("student*.pt"))
        names = [path.stem.removeprefix("student").removeprefix("-") for path in found]
    students = {}
    for name in names:
        saved = load_of(student_path(folder, name), "student", teacher)
        if "decay" in saved:
            student = build_student(teacher, saved["config"], saved["rho"])
            student.load_state_dict(saved["ema"])
            students[name] = (student.to(device).eval().requires_grad_(False), saved["decay"])
            config = config | {"K": saved["config"]["K"]}
    return Run(
        *(folder, task, config, teacher, students),
        *(open_explicit(folder, task, device), open_learned(folder, teacher, device)),
        *(open_direct(folder, task, device), device),
    )


def open_direct(folder: Path, task: Task, device: torch.device) -> dict[int, Equilibrium]:
    """The finished direct networks of a run folder, by the evaluations that they make."""
    found = {}
    for path in folder.glob("direct-*.pt"):
        saved = load(path, "direct")
        if saved["step"] == saved["updates"]:
            net = task.network(saved["config"])
            fill(net, saved["model"], path)
            found[int(path.stem.removeprefix("direct-"))] = net.to(device).eval()
    return dict(sorted(found.items()))


def open_explicit(folder: Path, task: Task, device: torch.device) -> dict[str, nn.Module]:
    """The finished explicit networks of a run folder, by name."""
    explicit = {}
    for path in sorted(folder.glob("explicit-*.pt")):
        kind, saved = path.stem.removeprefix("explicit-"), load(path, "explicit")
        if saved["step"] >= saved["config"]["explicit_steps"]:
            net = task.explicit(saved["config"] | {"explicit": kind, "pretrained": False})
            net.load_state_dict(saved["model"])
            foreign = saved["config"].get("pretrained")
            name = f"{kind} (torchvision's weights)" if foreign else kind
            explicit[name] = net.to(device).eval()
    return explicit


def open_learned(
    folder: Path, teacher: Equilibrium, device: torch.device
) -> dict[str, LearnedSolver]:
    """The finished learned solvers of a run folder, by name."""
    solvers = {}
    for kind in LEARNED_SOLVERS:
        path = folder / f"{kind}.pt"
        if not path.exists():
            continue
        saved = load_of(path, kind, teacher)
        if saved["step"] == saved["updates"]:
            solver = build_learned(teacher, kind, saved["config"]["m"])
            solver.load_state_dict(saved["model"])
            solvers[kind] = solver.to(device).eval().requires_grad_(False)
    return solvers


LIBC = ctypes.CDLL(None)  # the process's own symbols: the C library among them


def pick_device(name: str) -> str:
    """The device that a --device flag means; on a CPU, also lets glibc keep freed memory.

    It would map each large tensor anew, a page fault per 4 KB: two fifths of the time of an update
    on a graph of 169,343 nodes.
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


def leave() -> None:
    """Ends the process group, all ranks together: none is torn down under another's last words."""
    gc.collect()  # DDP modules are cycles, and each holds the group with its threads
    dist.barrier()
    dist.destroy_process_group()
