r"""The table of docs/scale.md, bytes and seconds on 1, 8 and 64 GPUs: python -m evidence.scale

All numbers are estimates: FLOPs and bytes are counted, the rates of a GPU are assumed, ratios were
measured on a CPU (results/speed*.json). Nothing was measured on a GPU.
"""

import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace as Values

import torch

from config import Config
from losses import TOKENS
from models.__main__ import SEGMENT, sizes
from tasks import images, text
from train import NO_MEMORY, OWN_MEMORY
from trajectories import REUSE

# Assumed of an A100 of 80 GB: FLOPs a second in bf16 and fp32; bytes a second of its memory, of an
# all-reduce among a node's eight, and of the network of a node.
R, R32, D, L, W, NODE = 0.4 * 312e12, 0.4 * 19.5e12, 2e12, 230e9, 50e9, 8
# The tasks' settings; samples to train and to test on; bytes of an input; parts of a sample (a
# text's is two segments, of which f's FLOPs and states are counted for one).
TASKS = {
    "imagenet-small": images.IMAGENET_SETTINGS
    | dict(n=1_271_167, tested=50_000, x=4 * 3 * 224**2, parts=1),
    "transformer-103": text.WT103_SETTINGS | dict(n=344_090, tested=819, x=8 * 300, parts=2),
}
RESULTS = Path(__file__).parents[1] / "results"
# The reading of pictures was measured alone, before speed.json had it.
SPEED = {"reading": json.loads((RESULTS / "speed-reading.json").read_text())}
SPEED |= json.loads((RESULTS / "speed.json").read_text())


@functools.cache
def task(preset: str) -> Values:
    """A task's settings, and its network's numbers: counted only, nothing is computed."""
    with torch.device("meta"):
        return Values(**vars(Config()) | TASKS[preset] | sizes(preset))


def depth(w: Values) -> tuple[float, float]:
    """Mean evaluations of f in an update of the teacher, without and with gradient."""
    growth = [min(w.layers, 2**i) for i in range(math.ceil(math.log2(w.layers)) + 1)]
    layers = w.growing * sum(growth) / len(growth) + (1 - w.growing) * w.layers
    return (1 - w.growing) * w.before / 2, layers


def own_run(w: Values) -> tuple[float, float]:
    """Mean steps of a student's own run, and their cost in evaluations of f, three for one with
    gradient. In most updates half of a text is memory, whose run has no gradient or is left out."""
    J, past = (1 + w.rollout_max) / 2 + 1, (1 - NO_MEMORY) / 2 if w.parts > 1 else 0
    return J, J * (3 * (1 - past) + OWN_MEMORY * past)


def slots(w: Values, gpus: int, state: int) -> int:
    """States of so many bytes in a process's rolling store."""
    most = max(REUSE, min(w.n, w.student_steps * w.batch // REUSE // 4) // gpus)
    return min(int(w.cache_gb * 1e9 / state), most)


def solved(steps: int, local: int, slots: int) -> int:
    """Trajectories that a process solves for so many updates of `local` samples."""
    chunk = slots // REUSE
    return chunk * (REUSE + -(-steps * local // (chunk * REUSE)) - 1)


def all_reduce(size: float, gpus: int) -> float:
    """Seconds to average so many bytes: a ring within each node, then one of the nodes."""
    g = min(gpus, NODE)
    return 2 * size * ((g - 1) / g / L + (1 - g / gpus) / W)


def evaluations(K: int, own_memory: bool, nfes=(1, 2, 4, 8, 20), methods: int = 4) -> int:
    """Of f for an input of a split: the equilibrium, the methods' states, the states' residuals."""
    return 2 * K + methods * ((sum(nfes) if own_memory else max(nfes)) + len(nfes))


def rows(preset: str, N: int) -> list[tuple[str, str, float]]:
    """The rows of docs/scale.md for a task on N GPUs: (quantity, formula, value)."""
    w, step, solver = (
        task(preset),
        SPEED["imagenet"]["student_step"][-1],
        SPEED["solver_overhead"][0],
    )
    c = max(1, step["ratio"])
    o = solver["seconds_per_step"]["ours"] / solver["passes_floor_seconds"]
    (before, layers), (J, run), a, F = depth(w), own_run(w), max(w.batch, N) / N, w.flops * w.parts
    s, H, q = w.state * w.parts, w.head * w.parts, a if w.parts == 1 else TOKENS / SEGMENT / w.parts
    S, solve = slots(w, N, 2 * s), w.K * (F / R + 76 * s * o / D)
    t = a * (F * (before + 3 * layers) + 3 * H) / R
    t_s = (a * F * run * c + q * H * (1 + 3 * J)) / R
    v = solved(w.student_steps, int(a), S) / w.student_steps * solve
    A, E = all_reduce(2 * w.parameters, N), evaluations(w.K, w.parts > 1)
    return [
        ("weights, gradients, Adam's, GB", "16 p", 16 * w.parameters / 1e9),
        ("all z_K of the task, GB", "2 s n", 2 * s * w.n / 1e9),
        ("all its trajectories, TB", "2 s n (K + 1)", 2 * s * w.n * (w.K + 1) / 1e12),
        ("z_K in a process's store, GB", "2 s S", 2 * s * S / 1e9),
        ("inputs beside them, GB", "x S", w.x * S / 1e9),
        ("samples of an update", "a = B / N", a),
        ("teacher's update, ms", "t = a (F (before + 3 layers) + 3 H) / R", 1e3 * t),
        ("all-reduce, ms", "A = 4 p ((g - 1) / (g L) + (1 - g / N) / W)", 1e3 * A),
        ("its share of the update, %", "A / (t + A)", 100 * A / (t + A)),
        ("teacher, hours", "updates (t + A)", w.teacher_steps * (t + A) / 3600),
        ("inputs read a second", "i = a / (t + A)", a / (t + A)),
        ("workers, if pictures", "i / r", a / (t + A) / SPEED["reading"]["per_second"]),
        ("student's own run, ms", "t_s = (a F run c + q H (1 + 3 J)) / R", 1e3 * t_s),
        ("solves for it, ms", "v = solved / updates K (F / R + 76 s o / D)", 1e3 * v),
        ("a refill of the store, seconds", "S / 8 K (F / R + 76 s o / D)", S // REUSE * solve),
        ("all-reduce's share, %", "A / (t_s + v + A)", 100 * A / (t_s + v + A)),
        ("student, hours", "updates (t_s + v + A)", w.student_steps * (t_s + v + A) / 3600),
        ("evaluation, hours", "tested E F / (R32 N)", w.tested * E * F / R32 / N / 3600),
    ]


def table() -> str:
    """All rows, for both tasks and all numbers of GPUs, as Markdown."""
    columns = [rows(preset, N) for preset in TASKS for N in (1, 8, 64)]
    lines = [
        "| each GPU | formula | ImageNet: 1 | 8 | 64 | WikiText-103: 1 | 8 | 64 |",
        "|---" * 8 + "|",
    ]
    for cells in zip(*columns, strict=True):
        values = (f"{c[2]:,.0f}" if c[2] >= 100 else f"{c[2]:.2g}" for c in cells)
        lines.append(f"| {cells[0][0]} | `{cells[0][1]}` | {' | '.join(values)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
