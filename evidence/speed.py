r"""Speed and memory of the hot paths, next to the least that they can cost, on a CPU or a GPU.

    python -m evidence.speed                   -> results/speed.json, results/speed-graphs.png
    python -m evidence.speed --device cuda     -> results/speed-cuda.json

Each part is written as soon as it is measured. It is measured again only at another commit, on
another device or with other software. Networks have random weights; on a GPU those of images and
texts run in bf16 under autocast. A sample of a text is a word, and an answer has no memory.
"""

import copy
import importlib.util
import itertools
import json
import os
import re
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace as Sizes

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from anderson import anderson, picard
from checkpoint import UsageError, atomic, plain_errors, provenance, versions
from config import DTYPES, TASKS, Config, command_line, require
from evidence.figures import scaling_figure
from evidence.reading import reading
from evidence.timing import interleaved, peak_memory
from fpode import TimeMap
from infer import cdeq
from losses import OwnRun, OwnRunBatch, TeacherBatch, TeacherLoss
from models import Equilibrium, mdeq, transformer
from models.ignn import IGNN, Graph
from student import Student
from trajectories import sample

# Evaluations without and with gradient in a teacher's mean update; steps of the solver.
TRAINING = {mdeq.MDEQ: (9, 4, 26), transformer.DEQTransformer: (12, 3, 38), IGNN: (4, 4, 20)}
TIMES, DECAY, RUN = TimeMap(0.19, 20), 0.8, 3  # RUN: steps of a student's own run in training
METHODS = ("cdeq", "anderson", "picard", "f")
# What a profile shows where the host waits for the device.
WAITS = "aten::(_local_scalar_dense|nonzero)|cuda(Stream|Device|Event)Synchronize|cudaMemcpy"

# networks: by part a preset, a batch (of a graph edges and nodes) and a compiler; product: side of
# a matrix; states: of solvers alone, as those of an MDEQ and of a graph.
CPU = Sizes(
    device=torch.device("cpu"), dtype=torch.float32, words=33_278, segment=150, product=2048,
    networks={"digits": ("digits", 128, ""), "imagenet": ("imagenet-small", 4, ""),
              "text": ("transformer-small", 8, ""), "arxiv": ("ogbn-arxiv", 1, "")},
    states=((32, 188_160), (1, 21_700_000)), scaling=(10**4, 10**5, 10**6, 10**7),
    nfes=(1, 2, 8, 20, 40), repeats=100, pictures=1000,
)  # fmt: skip
IMAGE, TEXT, PRODUCTS = "imagenet-small", "transformer-103", (61_859_140, 2_449_029)
CUDA = Sizes(**vars(CPU) | dict(
    device=torch.device("cuda", 0), dtype=torch.bfloat16, words=267_735, product=8192,
    networks={"image_24_gb": (IMAGE, 64, ""), "image_80_gb": (IMAGE, 256, ""),
              "text_24_gb": (TEXT, 14, ""), "text_80_gb": (TEXT, 56, ""),
              "graph_fp32": ("fp32", PRODUCTS, ""), "graph_bf16": ("bf16", PRODUCTS, ""),
              "image_compiled": (IMAGE, 64, "inductor"), "text_compiled": (TEXT, 14, "inductor")},
    nfes=(1, 2, 8, 26), repeats=10,
))  # fmt: skip
TINY = {IMAGE: ("digits", 2), TEXT: ("transformer-tiny", 2)}
DRY = Sizes(**vars(CPU) | dict(
    dtype=torch.bfloat16, words=300, segment=6, product=64,
    networks={part: (*TINY.get(preset, (preset, (1000, 200))), compiler and "eager")
              for part, (preset, _, compiler) in CUDA.networks.items()},
    states=((4, 1000),), scaling=(1000, 2000), nfes=(1, 2), repeats=1, pictures=20,
))  # fmt: skip


def medians(jobs: dict, where: Sizes) -> dict[str, float]:
    """Median seconds of each job, all taking turns for about ten seconds."""
    spent = interleaved(jobs, where.repeats, where.device, warmup=2, patience=10)
    return {name: statistics.median(times) for name, times in spent.items()}


def example(preset: str, batch, where: Sizes) -> tuple[Equilibrium, Tensor, Tensor]:
    """An untrained network; inputs and labels of an update."""
    dtype = DTYPES.get(preset, torch.float32)  # of a graph
    if preset in mdeq.PRESETS:
        net: Equilibrium = mdeq.MDEQ(**mdeq.PRESETS[preset])
        x, y = torch.randn(batch, *mdeq.PRESETS[preset]["image"]), torch.zeros(batch).long()
    elif preset in transformer.PRESETS:
        net = transformer.DEQTransformer(where.words, **transformer.PRESETS[preset])
        x = y = torch.randint(where.words, (batch, 2 * where.segment))
    elif preset in TASKS:
        task = TASKS[preset](where.data)
        net, (x, y) = task.network(vars(Config(preset="ignn"))), task.train.batch(torch.arange(1))
    else:
        edges, N = batch
        # Squares of uniform numbers: the i-th node has a degree proportional to i^(-1/2).
        graph = Graph((torch.rand(2, edges).square() * (N - 1)).long(), N, dtype=dtype)
        x, y = torch.randn(1, N, 8, dtype=dtype), torch.zeros(1, N).long()
        net = IGNN(graph, features=8, classes=8, width=64)
    net = net.eval().requires_grad_(False).to(where.device, dtype)
    return net, x.to(where.device), y.to(where.device)


def untrained(net: Equilibrium, **options) -> Student:
    """A student before any update; a trained one is equally fast."""
    return Student(net, TIMES, **options).eval().to(next(net.parameters()))


@torch.no_grad()
def solve(method: str, net: Equilibrium, student: Student, u, J: int) -> Tensor:
    """The state after J steps of the student, of a solver, or of f alone."""
    z, f, options = net.initial(u), lambda z: net.f(z, u), dict(sample_dims=net.sample_dims)
    if method == "cdeq":
        return cdeq(student, z, u, J, DECAY, last=True)
    if method != "f":
        return {"anderson": anderson, "picard": picard}[method](f, z, J, last=True, **options)
    for _ in range(J):
        z = f(z)
    return z


@nn.utils.parametrize.cached()  # as the student, which has its weights folded
def answers(net: Equilibrium, x: Tensor, where: Sizes) -> list[dict]:
    """For each J: seconds and peak bytes of every method, from the injected input to the state, and
    the ratio of J steps of the student to J evaluations of f."""
    student, u, rows = untrained(net), net.inject(x), []
    samples = net.initial(u).shape[: net.sample_dims].numel()
    for J in where.nfes:
        jobs = {name: partial(solve, name, net, student, u, J) for name in METHODS}
        seconds = medians(jobs, where)
        peaks = {name: peak_memory(job, where.device) for name, job in jobs.items()}
        rows.append({"J": J, "seconds": seconds, "ratio": seconds["cdeq"] / seconds["f"]})
        rows[-1] |= {"samples_per_second": samples / seconds["cdeq"], "peak_bytes": peaks}
    return rows


def floor(net: Equilibrium, x: Tensor, where: Sizes) -> dict:
    """Seconds of f and the least that it can take: its FLOPs at the rate of a matrix product or, on
    a graph, one sparse and one dense product. Also the names of its attention kernels."""
    u = net.inject(x)
    z = torch.rand_like(net.initial(u))
    if isinstance(net, IGNN):
        (A, _), W = net.cell.graph.matrices(x.device), net.cell.W
        jobs, share = {"sparse": lambda: A @ z[0], "dense": lambda: z[0] @ W}, 1.0
    else:
        with FlopCounterMode(display=False) as counter:
            net.f(z, u)
        A = torch.randn(where.product, where.product, dtype=where.dtype, device=x.device)
        jobs, share = {"matmul": lambda: A @ A}, counter.get_total_flops() / 2 / len(A) ** 3
    seconds = medians({"f": lambda: net.f(z, u)} | jobs, where)
    least = share * sum(seconds[name] for name in jobs)
    seen = [name for name in profiled(lambda: net.f(z, u)) if re.search("attention|fmha", name)]
    return {"seconds": seconds, "floor": least, "ratio": seconds["f"] / least, "attention": seen}


def host_waits(net: Equilibrium, x: Tensor, where: Sizes) -> dict[str, float]:
    """How often the host waits per step: the waits of 12 steps minus those of 4, divided by 8. On a
    CPU, torch checks the pivots of Anderson's linear system, and f of a graph whether z is 0."""
    student, u, found = untrained(net), net.inject(x), {}
    for name in METHODS:
        solves = (profiled(partial(solve, name, net, student, u, J)).items() for J in (4, 12))
        short, long = (sum(n for key, n in seen if re.fullmatch(WAITS, key)) for seen in solves)
        found[name] = (long - short) / 8
    return found


def profiled(job: Callable) -> dict[str, int]:
    """How often each operation, CUDA call and kernel occurs in a job, by name."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler's own messages
    job()
    with torch.profiler.profile() as seen:
        job()
    return {event.key: event.count for event in seen.key_averages()}


def network(preset: str, batch, compiler: str, where: Sizes) -> dict:
    """All measurements of a network: `floor`, `host_waits`, `answers`, and the `cost` of updates, a
    solve and an answer of eight steps; of a compiled one, a teacher's update and an answer."""
    net, x, y = example(preset, batch, where)
    bf16 = where.dtype == torch.bfloat16 and not isinstance(net, IGNN)
    half = torch.autocast(where.device.type, torch.bfloat16, enabled=bf16)
    past = where.segment if net.sample_dims > 1 else 0
    short, found = x[:, past:], {"preset": preset, "batch": batch}
    parts = {"floor": floor, "host_waits_per_step": host_waits, "student_step": answers}
    for name in () if compiler else parts:
        found[name] = attempt(half(partial(parts[name], net, short)), where)
    pupil = copy.deepcopy(net).train().requires_grad_(True)
    student = untrained(net, anderson=False, own_injection=True, start=True)
    (before, layers, K), dtype = TRAINING[type(net)], next(net.parameters()).dtype
    with torch.no_grad(), half:
        u, z_K = net.inject(short), net.initial(net.inject(x)).to(dtype) + 1
    many, few = (z.shape[: net.sample_dims].numel() for z in (z_K, net.initial(u)))
    teacher = TeacherBatch(x, y, before, layers)
    own = OwnRunBatch(x, z_K, TIMES.schedule(RUN, DECAY), past)
    jobs = {
        "teacher_update": (update(TeacherLoss(pupil), teacher, half), many),
        "answer": (half(partial(solve, "cdeq", net, student, u, 8)), few),
        "student_update": (update(OwnRun(net, student), own, half), many),
        "solve": (half(partial(sample, net, x, K, ends=True)), many),
    }
    if compiler:
        del jobs["student_update"], jobs["solve"]
        torch.compiler.reset()  # each network has the room for compiled variants to itself
        pupil.cell.compile(backend=compiler), student.cell.compile(backend=compiler)
    return found | {name: attempt(partial(cost, *job), where) for name, job in jobs.items()}


def update(loss: nn.Module, batch, half: torch.autocast) -> Callable[[], None]:
    """An update, by Adam, of what a loss module trains."""
    optimizer = torch.optim.AdamW((p for p in loss.parameters() if p.requires_grad), lr=1e-6)

    def job() -> None:
        sum(half(loss)(batch).values()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return job


def cost(job: Callable, count: int, where: Sizes) -> dict:
    seconds, peak = medians({"": job}, where)[""], peak_memory(job, where.device)
    return {"seconds": seconds, "samples_per_second": count / seconds, "peak_bytes": peak}


def attempt(measure: Callable, where: Sizes):
    """The measurement, or the reason why it failed: memory, a missing kernel, a diverged solve."""
    try:
        return measure(where)
    except (RuntimeError, FloatingPointError) as error:
        return {"not_measured": str(error).splitlines()[0]}


def solver_overhead(where: Sizes, shape: tuple[int, int], K: int = 12, m: int = 6) -> dict:
    """Seconds per step of our Anderson and, if installed, torchdeq's; the least possible, 2 m + 7
    passes over the state (a copy makes two); the states that ours holds beyond z_0 and f's."""
    z0, spare, *ready = torch.randn(5, *shape, device=where.device)
    states = itertools.cycle(ready)
    f = lambda z: next(states)  # noqa: E731 - costs nothing
    jobs = {"ours": partial(anderson, f, z0, K, m=m, last=True), "copy": partial(spare.copy_, z0)}
    if importlib.util.find_spec("torchdeq"):
        peer = importlib.import_module("torchdeq.solver.anderson").anderson_solver
        jobs["torchdeq"] = partial(peer, f, z0, max_iter=K, m=m, tol=0.0, return_final=True)
    spent = medians(jobs, where)
    found = {"shape": shape, "passes_floor_seconds": (2 * m + 7) * spent.pop("copy") / 2}
    found["seconds_per_step"] = {name: seconds / K for name, seconds in spent.items()}
    before, most = (peak_memory(job, where.device) for job in (lambda: None, jobs["ours"]))
    return found | {"window_states": before and (most - before) / z0.nbytes}


def graph_scaling(where: Sizes) -> list[dict]:
    """`floor` of random graphs with ten neighbours a node."""
    graphs = (example("fp32", (E // 2, E // 10), where) for E in where.scaling)
    rows = [{"edges": net.cell.graph.edges, **floor(net, x, where)} for net, x, _ in graphs]
    scaling_figure(rows, where.results / "speed-graphs.png")
    return rows


PARTS = {
    "solver_overhead": lambda where: [solver_overhead(where, shape) for shape in where.states],
    "graph_scaling": graph_scaling,
    "reading": lambda where: reading(where.pictures),
}


def main(argv: list[str]) -> None:
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure")
    add("--dry", action="store_true", help="all that a GPU has, at tiny sizes on the CPU")
    add("--only", metavar="PART", help="a part, by its name in the file")
    add("--data", type=Path, default=Path("data"), help="folder of the data sets")
    add("--results", type=Path, default=Path("results"), help="where to write")
    args = parser.parse_args(argv)
    name = "dry" if args.dry else args.device
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA device is there; --dry tries all on the CPU")
    where = Sizes(**vars(args) | vars(dict(cpu=CPU, cuda=CUDA, dry=DRY)[name]))
    parts = PARTS | {part: partial(network, *what) for part, what in where.networks.items()}
    if not (args.data / "ogbn_arxiv").exists():
        parts.pop("arxiv", None)
    if args.only is not None:
        require("--only", args.only, " | ".join(parts), choice=True)
    device = torch.cuda.get_device_name() if name == "cuda" else "cpu"
    here = provenance() | dict(device=device, threads=torch.get_num_threads(), versions=versions())
    path = args.results / ("speed.json" if name == "cpu" else f"speed-{name}.json")
    result = {"measured": {}} | (json.loads(path.read_text()) if path.exists() else provenance())
    for part in parts if args.only is None else [args.only]:
        if result["measured"].get(part, {}) | {"command": here["command"]} == here:
            continue
        print(part, file=sys.stderr)
        torch.manual_seed(0)
        result[part], result["measured"][part] = attempt(parts[part], where), here
        with atomic(path) as file:
            file.write((json.dumps(result, indent=1) + "\n").encode())
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    with plain_errors():
        main(sys.argv[1:])
