r"""Speed as ratios, side by side in one run, with the floor of each hot path beside it.

    python -m evidence.speed               -> results/speed.json, results/speed-graphs.png
    python -m evidence.speed --only text   -> results/speed-text.json

What is measured: a step of Anderson acceleration against torchdeq's and against the passes over
memory that it makes; the states that its window holds; a step of the student against a bare
evaluation of f, on digits and on MDEQ for ImageNet, and that f against a matrix product; IGNN's f
on random graphs of 10^4 to 10^7 edges, and on ogbn-arxiv where that is at hand, against the bare
sparse and the bare dense product; the memory of answers by NFE, of texts for Table 5; and that of a
run on ogbn-arxiv.
"""

import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

import runs
from anderson import Counter, anderson
from checkpoint import atomic, plain_errors, provenance, versions
from config import TASKS, command_line
from evidence.compare import train
from evidence.figures import canvas_of, save
from evidence.methods import methods
from evidence.rivals import Rivals
from evidence.timing import cost, interleaved, peak_memory
from fpode import TimeMap
from infer import cdeq
from models import Equilibrium
from student import Student

CPU = torch.device("cpu")


def solver_overhead(shape: tuple[int, int], K: int = 12, repeats: int = 5, device=CPU) -> dict:
    """Seconds per step without f of our Anderson and torchdeq's, m = 6, side by side."""
    from torchdeq.solver.anderson import anderson_solver

    buffers = [
        torch.randn(shape, device=device) for _ in range(3)
    ]  # an f that costs nothing: ready-made answers
    calls = Counter(lambda z: buffers[calls.nfe % 3])
    z0 = torch.zeros(shape, device=device)
    jobs = {
        "ours": lambda: anderson(calls, z0, K, m=6, last=True),
        "torchdeq": lambda: anderson_solver(calls, z0, max_iter=K, m=6, tol=0.0, return_final=True),
    }
    spent = interleaved(jobs, repeats, z0.device)
    per_step = {key: statistics.median(times) / K for key, times in spent.items()}
    assert calls.nfe == 2 * K * (repeats + 1)
    return {
        "shape": list(shape),
        "seconds_per_step": per_step,
        "ratio": per_step["ours"] / per_step["torchdeq"],
        "passes_floor_seconds": 19
        * copy_seconds(shape, device)
        / 2,  # 2m + 7 passes; a copy makes two
    }


def copy_seconds(shape: tuple[int, int], device=CPU, repeats: int = 5) -> float:
    """Seconds to copy one state: one read and one write of it."""
    a, b = torch.randn(shape, device=device), torch.empty(shape, device=device)
    return statistics.median(interleaved({"": lambda: b.copy_(a)}, repeats, a.device)[""])


def window_memory(m: int = 6, n: int = 8_000_000) -> float:
    """Peak memory of a solve beyond z_0 and f's own, in states. Linux, in a fresh process."""
    z0, out = torch.ones(1, n), torch.ones(1, n)  # written, so that their pages are there
    anderson(lambda z: z * 0.5, torch.zeros(1, 8), 3)  # libraries load outside the measurement
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    anderson(lambda z: torch.mul(z, 0.5, out=out), z0, 3 * m, m=m, last=True)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (4 * n)


def untrained(net: Equilibrium) -> Student:
    """A student as it starts; its speed is that of a trained one."""
    return Student(net, TimeMap(rho=0.19, K=20)).eval().to(next(net.parameters()))


@torch.no_grad()
def student_overhead(net: Equilibrium, x: Tensor, repeats: int, nfes=(1, 2, 8)) -> list[dict]:
    """J-step inference against J bare evaluations of f: the ratio of their seconds."""
    student = untrained(net)
    u = net.inject(x)
    z0 = net.initial(u)

    @parametrize.cached()  # as the student, which has its weights folded
    def bare(J: int) -> Tensor:
        z = z0
        for _ in range(J):
            z = net.f(z, u)
        return z

    rows = []
    for J in nfes:
        jobs = {"cdeq": lambda J=J: cdeq(student, z0, u, J, 0.8, True), "f": lambda J=J: bare(J)}
        warmup = 1 + min(100, repeats // 8) // J
        spent = interleaved(jobs, max(5, repeats // J), z0.device, warmup=warmup)
        ratio = statistics.median(a / b for a, b in zip(*spent.values(), strict=True))
        medians = {key: statistics.median(times) for key, times in spent.items()}
        rows.append({"J": J, "batch": len(x), "seconds": medians, "ratio": ratio})
    return rows


def digits_step() -> list[dict]:
    """`student_overhead` on the default task."""
    task = TASKS["digits"](Path("data"))
    net = task.network({"preset": task.presets[0]}).eval()
    return student_overhead(net, task.train.batch(torch.arange(128))[0], 800)


def example(preset: str, batch: int, words: int = 33_278) -> tuple[Equilibrium, Tensor, int]:
    """An untrained network with an input, images of its preset's size or 150 words of a vocabulary
    as large as WikiText-2's; and FLOPs of one f on that input."""
    from models import mdeq, transformer

    torch.manual_seed(0)
    if preset in mdeq.PRESETS:
        sizes = mdeq.PRESETS[preset]
        net, x = mdeq.MDEQ(**sizes), torch.randn(batch, *sizes["image"])
    else:
        net = transformer.DEQTransformer(words, **transformer.PRESETS[preset])
        x = torch.randint(words, (batch, 150))
    u = net.eval().inject(x)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net.f(net.initial(u), u)
    return net, x, counter.get_total_flops()


@torch.no_grad()
def preset_step(preset: str, batch: int, nfes: tuple[int, ...], repeats: int = 16) -> dict:
    """`student_overhead`; FLOPs a second of f as a share of a matrix product's; and the most bytes
    that one answer of the student and of Anderson takes by NFE, network and input included."""
    net, x, flops = example(preset, batch)
    rows = student_overhead(net, x, repeats)
    A = torch.randn(2048, 2048)
    product = statistics.median(interleaved({"": lambda: A @ A}, 9, A.device)[""])
    code = "from evidence import speed; print(speed.answer_peak({!r}, {}, {}, {!r}))"
    return {
        "preset": preset,
        "student_step": rows,
        "matmul_share": flops / rows[0]["seconds"]["f"] / (2 * 2048**3 / product),
        "answer_peak_bytes": {
            method: {nfe: float(fresh(code.format(preset, batch, nfe, method))) for nfe in nfes}
            for method in ("cdeq", "anderson")
        },
    }


@torch.no_grad()
def answer_peak(preset: str, batch: int, nfe: int, method: str) -> int:
    """Peak memory in bytes of a process that answers once, from the input to logits or, for a
    text, to the likelihoods of its words."""
    net, x, _ = example(preset, batch)
    student, text = untrained(net), net.sample_dims > 1

    def job() -> None:
        u = net.inject(x)
        if method == "cdeq":
            z = cdeq(student, net.initial(u), u, nfe, 0.8, True)
        else:
            f = lambda z: net.f(z, u)  # noqa: E731
            z = anderson(f, net.initial(u), nfe, sample_dims=net.sample_dims, last=True)
        net.nll(z, x) if text else net.head(z)

    job()
    return peak_memory(job, x.device)


def fresh(code: str) -> str:
    """What this code prints in a process of its own."""
    here = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=here)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


@torch.no_grad()
def graph_step(graph, d: int, repeats: int = 5, device=CPU, dtype=torch.float32) -> dict:
    """Seconds of IGNN's f at width d, its floor (the bare sparse and the bare dense product, each
    alone) and Anderson's share of a step."""
    from models.ignn import GraphCell

    cell, (A, _) = GraphCell(graph, d, 0.95).to(device, dtype), graph.matrices(device)
    z, u = torch.randn(2, 1, graph.N, d, device=device, dtype=dtype)
    W = cell.W.detach()
    jobs = {
        "f": lambda: cell(z, u),
        "sparse": lambda: A @ z[0],
        "dense": lambda: z[0] @ W,
        "anderson": lambda: anderson(lambda z: z, z, 12, last=True),
    }
    spent = interleaved(jobs, repeats, z.device)
    seconds = {key: statistics.median(times) for key, times in spent.items()}
    seconds["anderson"] /= 12
    floor = seconds["sparse"] + seconds["dense"]
    return {
        "nodes": graph.N,
        "edges": graph.edges,
        "width": d,
        "seconds": seconds,
        "ratio": seconds["f"] / floor,
        "anderson": seconds["anderson"] / seconds["f"],
    }


def graph_scaling(edges=(10**4, 10**5, 10**6, 10**7), d: int = 64) -> list[dict]:
    """`graph_step` on random graphs with ten neighbours a node."""
    from models.ignn import Graph

    return [graph_step(Graph(torch.randint(E // 10, (2, E // 2)), E // 10), d) for E in edges]


def arxiv(data: Path, d: int = 128) -> dict | None:
    """On ogbn-arxiv at width d: `graph_step`; the most bytes that train.py takes (two updates of
    the teacher, six of the student, trajectories in bf16, the choice of the schedule); and those of
    one answer by NFE. None without the data."""
    if not (data / "ogbn_arxiv").exists():
        print(f"{data} has no ogbn_arxiv: not measured", file=sys.stderr)
        return None
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--task", "ogbn-arxiv", "--data", str(data), "--out", folder, "--width", str(d)]
        flags += ["--teacher_steps", "2", "--student_steps", "6", "--cache_dtype", "bf16"]
        for stage in ("teacher", "student"):
            train("train", *flags, "--stage", stage)
        run = runs.open_run(Path(folder), device="cpu")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    none = Rivals({}, {}, {})
    table, nfes = methods(run, none), (1, 2, 20)
    spent = cost(run, none, table, {(name, nfe) for name in table for nfe in nfes}, 1)
    answer = {name: {nfe: spent[name, nfe][1] for nfe in nfes} for name in table}
    step = graph_step(run.teacher.cell.graph, d)
    return {**step, "training_peak_bytes": peak, "answer_peak_bytes": answer}


def scaling_figure(rows: list[dict], path: Path) -> None:
    canvas, (axis,) = canvas_of(1)
    edges = [row["edges"] for row in rows]
    axis.loglog(edges, [row["seconds"]["f"] for row in rows], marker="o", label="one evaluation")
    first = rows[-1]["seconds"]["f"] / edges[-1]
    axis.loglog(edges, [first * E for E in edges], linestyle=":", color="gray", label="linear")
    axis.set(xlabel="edges (both directions, self-loops)", ylabel="seconds", title="IGNN, f")
    axis.legend()
    save(canvas, path)


def solver_overheads(shapes=((32, 188_160), (1, 21_700_000)), **where) -> list[dict] | None:
    """`solver_overhead` on the states of an MDEQ and of a graph; None without torchdeq."""
    if importlib.util.find_spec("torchdeq") is None:
        print('torchdeq is missing (pip install ".[peers]"): not compared', file=sys.stderr)
        return None
    return [solver_overhead(shape, **where) for shape in shapes]


def window() -> dict:
    """`window_memory` in a process of its own."""
    code = "from evidence import speed; print(speed.window_memory())"
    return {"m": 6, "states": float(fresh(code))}


# What is measured, in this order; each a part of the JSON.
PARTS = {
    "window_memory_states": lambda data: window(),
    "student_step": lambda data: digits_step(),
    "imagenet": lambda data: preset_step("imagenet-small", 4, (1, 2, 26)),
    "text": lambda data: preset_step("transformer-small", 8, (1, 10, 20, 30, 40)),
    "graph_scaling": lambda data: graph_scaling(),
    "arxiv": arxiv,
    "solver_overhead": lambda data: solver_overheads(),
}


def main(argv: list[str]) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the data sets")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where to write")
    parser.add_argument("--only", choices=PARTS, help="one part, into speed-PART.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(2)
    result = {**provenance(), "versions": versions(), "threads": 2, "dtype": "fp32"}
    result |= {name: PARTS[name](args.data) for name in ([args.only] if args.only else PARTS)}
    name = f"speed-{args.only}.json" if args.only else "speed.json"
    with atomic(args.results / name) as file:
        file.write((json.dumps(result, indent=1) + "\n").encode())
    if "graph_scaling" in result:
        scaling_figure(result["graph_scaling"], args.results / "speed-graphs.png")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    with plain_errors():
        main(sys.argv[1:])
