r"""Speed and memory on a GPU: MDEQ for ImageNet, the transformer of WikiText-103, a large graph.

    python -m evidence.gpu                     on a machine with CUDA -> results/speed-cuda.json
    python -m evidence.gpu --dry --results DIR     tiny sizes on a CPU -> DIR/speed-dry.json

A part is written as soon as it is measured. One that is there already, from the same commit and
device, is not measured again: a stopped command goes on where it was. Networks have random weights
and run in bf16 under autocast, as in training. Of a text, a sample is a word; updates see windows
of a memory and a segment, answers a segment without memory.
"""

import copy
import json
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace as Sizes

import torch
from torch import Tensor, nn
from torch.profiler import profile

from anderson import anderson, picard
from checkpoint import UsageError, atomic, plain_errors, provenance, versions
from config import DTYPES, command_line
from evidence import speed
from evidence.timing import interleaved, peak_memory
from fpode import TimeMap
from infer import cdeq
from losses import OwnRun, OwnRunBatch, TeacherBatch, TeacherLoss
from models import Equilibrium
from models.ignn import IGNN, Graph
from student import Student
from trajectories import sample

DECAY, RUN = 0.8, 3  # the schedule's base; steps of a student's own run in training
# Layers without and with gradient in a mean update of the tasks' teachers; steps of their solves.
DEPTH, K = {"image": (9, 4), "text": (12, 3)}, {"image": 26, "text": 38}
# What a profile shows where the host waits for the device.
WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "cudaStreamSynchronize"}
WAITS |= {"cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"}

# Batches by the GB of the GPU that they are for; of the graph, nodes, edges (both directions are
# one), width; torch.compile's backend.
FULL = Sizes(
    presets={"image": "imagenet-small", "text": "transformer-103"},
    batches={"image": {24: 64, 80: 256}, "text": {24: 14, 80: 56}},
    words=267_735, segment=150, graph=(2_449_029, 61_859_140, 64),
    overhead=((32, 188_160), (1, 21_700_000)), nfes=(1, 2, 8, 26), repeats=10, compiler="inductor",
)  # fmt: skip
DRY = Sizes(
    presets={"image": "digits", "text": "transformer-tiny"},
    batches={"image": {24: 2, 80: 3}, "text": {24: 1, 80: 2}},
    words=300, segment=6, graph=(200, 1000, 8),
    overhead=((4, 1000),), nfes=(1, 2), repeats=1, compiler="eager",
)  # fmt: skip


def half(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16)


def example(kind: str, batch: int, device, sizes: Sizes) -> tuple[Equilibrium, Tensor]:
    """An untrained network and inputs of an update, on the device."""
    net, x, _ = speed.example(sizes.presets[kind], 1, sizes.words)
    if kind == "image":
        x = torch.randn(batch, *x.shape[1:], device=device)
    else:
        x = torch.randint(sizes.words, (batch, 2 * sizes.segment), device=device)
    return net.to(device).requires_grad_(False), x


def jobs_of(kind: str, net: Equilibrium, x: Tensor, sizes: Sizes, compiled: bool) -> dict:
    """By name: an update of the teacher, an answer of eight steps; if not compiled, an update of
    the student and the solve of a batch's trajectories, too."""
    pupil = copy.deepcopy(net).train().requires_grad_(True)
    student = Student(net, TimeMap(0.19, 20), anderson=False, own_injection=True, start=True)
    student.to(x.device)
    for part in (net, student, pupil) if compiled else ():
        part.cell.compile(backend=sizes.compiler)
    y = x if kind == "text" else torch.zeros(len(x), dtype=torch.long, device=x.device)
    past = sizes.segment if kind == "text" else 0
    with torch.no_grad(), half(x.device):
        z_K = net.initial(net.inject(x)).float() + 1
    own = OwnRunBatch(x, z_K, student.times.schedule(RUN, DECAY), past)
    answer = lambda: ways(net, student, student.inject(x[:, past:]))["cdeq"](8)  # noqa: E731
    jobs = {
        "teacher_update": update(TeacherLoss(pupil), TeacherBatch(x, y, *DEPTH[kind])),
        "answer": half(x.device)(answer),
    }
    return jobs if compiled else jobs | {  # compiling takes its time
        "student_update": update(OwnRun(net, student), own),
        "solve": half(x.device)(lambda: sample(net, x, K[kind], ends=True)),
    }  # fmt: skip


def update(loss: nn.Module, batch) -> Callable[[], None]:
    """An update, by Adam, of what a loss module trains."""
    optimizer = torch.optim.AdamW((p for p in loss.parameters() if p.requires_grad), lr=1e-6)

    def job() -> None:
        with half(batch.x.device):
            terms = loss(batch)
        sum(terms.values()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return job


def network(kind: str, gb: int, device: torch.device, sizes: Sizes, compiled=False) -> dict:
    """A batch for a GPU of so many GB: seconds, samples per second and peak bytes of the jobs; if
    not compiled, of answers with every J, too."""
    found: dict = {"preset": sizes.presets[kind], "batch": sizes.batches[kind][gb]}
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[1] < 0.9e9 * gb:
        return found | {"not_measured": f"for a GPU of {gb} GB"}
    torch.compiler.reset()  # each part has the room for compiled variants to itself
    net, x = example(kind, found["batch"], device, sizes)
    short = x[:, : sizes.segment] if kind == "text" else x
    samples, few = (v.numel() if kind == "text" else len(v) for v in (x, short))
    for name, job in jobs_of(kind, net, x, sizes, compiled).items():
        try:
            spent = interleaved({"": job}, sizes.repeats, device, warmup=2, patience=10)[""]
            found[name] = {
                "seconds": statistics.median(spent),
                "samples_per_second": (few if name == "answer" else samples)
                / statistics.median(spent),
                "peak_bytes": peak_memory(job, device),
            }
        except torch.OutOfMemoryError:
            found[name] = "out of memory"
    return found if compiled else found | answers(net, short, few, sizes)


@torch.no_grad()
def answers(net: Equilibrium, x: Tensor, samples: int, sizes: Sizes) -> dict:
    """J steps of a student against J evaluations of f, with the former's peak bytes; and what f's
    attention is made of."""
    with half(x.device):
        rows = speed.student_overhead(net, x, sizes.repeats, sizes.nfes)
        u = net.inject(x)
        step = ways(net, speed.untrained(net), u)["cdeq"]
        for row in rows:
            row["samples_per_second"] = samples / row["seconds"]["cdeq"]
            row["peak_bytes"] = peak_memory(lambda J=row["J"]: step(J), x.device)
        seen = profiled(lambda: net.f(net.initial(u), u))
    return {
        "answers": rows,
        "attention": sorted(n for n in seen if "attention" in n or "fmha" in n),
    }


def ways(net: Equilibrium, student: Student, u) -> dict[str, Callable[[int], Tensor]]:
    """Solvers and a student by name: K -> z_K."""
    z0, f, options = net.initial(u), lambda z: net.f(z, u), dict(sample_dims=net.sample_dims)
    return {
        "anderson": lambda K: anderson(f, z0, K, last=True, **options),
        "picard": lambda K: picard(f, z0, K, last=True, **options),
        "cdeq": lambda K: cdeq(student, z0, u, K, DECAY, last=True),
    }


def profiled(job: Callable) -> dict[str, int]:
    """How often each operation, CUDA call and kernel occurs in a job, by name."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler's own messages
    job()
    with profile() as seen:
        job()
    return {event.key: event.count for event in seen.key_averages()}


@torch.no_grad()
def host_waits(device: torch.device, sizes: Sizes) -> dict[str, float]:
    """Waits of the host per step: what a solve of 12 steps has beyond one of 4, divided by 8. On a
    CPU, torch checks the pivots of each small system: Anderson's two."""
    found = {}
    for kind in ("image", "text"):
        net, x = example(kind, 2, device, sizes)
        with half(device):
            for name, way in ways(net, speed.untrained(net), net.inject(x)).items():
                counts = [profiled(lambda K=K, way=way: way(K)) for K in (4, 12)]
                short, long = (sum(seen.get(key, 0) for key in WAITS) for seen in counts)
                found[f"{name}, {kind}"] = (long - short) / 8
    return found


@torch.no_grad()
def graph(dtype: torch.dtype, device: torch.device, sizes: Sizes) -> dict:
    """A random graph whose degrees follow a power law: f against the bare products, and the peak
    bytes of solves by NFE; the reason where torch has no such product."""
    nodes, edges, width = sizes.graph
    # Squares of uniform numbers: the i-th node has a degree proportional to i^(-1/2).
    made = Graph((torch.rand(2, edges).square() * (nodes - 1)).long(), nodes, dtype=dtype)
    try:
        found = speed.graph_step(made, width, 5, device, dtype)
    except (RuntimeError, NotImplementedError) as error:  # too large a graph, too: it says so
        return {"not_supported": str(error).splitlines()[0]}
    net = IGNN(made, features=8, classes=8, width=width).to(device, dtype).eval()
    u = torch.randn(1, nodes, width, device=device, dtype=dtype)
    for name, way in ways(net, speed.untrained(net), u).items():
        peaks = {K: peak_memory(lambda K=K, way=way: way(K), device) for K in sizes.nfes}
        found[f"peak_bytes, {name}"] = peaks
    return found


# What is measured, in this order.
PARTS: dict[str, Callable] = {
    "host_waits_per_step": host_waits,
    "solver_overhead": lambda device, sizes: speed.solver_overheads(sizes.overhead, device=device),
}
PARTS |= {f"{kind}_{gb}_gb": partial(network, kind, gb) for gb in (24, 80) for kind in DEPTH}
PARTS |= {f"graph_{name}": partial(graph, dtype) for name, dtype in DTYPES.items()}
PARTS |= {f"{kind}_24_gb_compiled": partial(network, kind, 24, compiled=True) for kind in DEPTH}


def machine(device: torch.device) -> dict:
    """What a part depends on: the device, its driver, the software, the commit."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    file, commit = Path("/proc/driver/nvidia/version"), provenance()["commit"]
    driver = file.read_text().splitlines()[0] if file.exists() else "unknown"
    return {"device": name, "driver": driver, "versions": versions(), "commit": commit}


def main(argv: list[str]) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where to write")
    args = parser.parse_args(argv)
    if not args.dry and not torch.cuda.is_available():
        raise UsageError("no CUDA device is there; --dry tries every part on the CPU")
    device, sizes = (torch.device("cpu"), DRY) if args.dry else (torch.device("cuda", 0), FULL)
    path = args.results / f"speed-{'dry' if args.dry else 'cuda'}.json"
    here, result = machine(device), json.loads(path.read_text()) if path.exists() else {}
    for name, measure in PARTS.items():
        if here.items() <= result.get(name, {}).items():
            continue
        print(name, file=sys.stderr)
        torch.manual_seed(0)
        result |= {**provenance(), **here, name: {**here, "found": measure(device, sizes)}}
        with atomic(path) as file:
            file.write((json.dumps(result, indent=1) + "\n").encode())
    print(path.read_text())


if __name__ == "__main__":
    with plain_errors():
        main(sys.argv[1:])
