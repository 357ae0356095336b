r"""Side by side: every method at equal NFE, over seeds, with time; ablations; speed.

    python compare.py --task digits --seeds 0 1 2          main table  -> results/digits.json
    python compare.py --task digits --seeds 0 1 2 --ablation  -> digits-ablation.json
    python compare.py --speed                              ratios      -> results/speed.json

Each run that is missing is trained first, by the train.py command that the JSON names. Beside every
JSON stand the same numbers as a Markdown table and a figure. Times are medians of methods that take
turns in one process, so that a busy machine slows them alike. What was not measured stays empty.
"""

import argparse
import json
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import infer
from anderson import Counter, anderson, picard
from checkpoint import UsageError, atomic, plain_errors, provenance, versions
from config import TASKS, refuse
from infer import Method, Run, cdeq

# Fig. 3, and each ingredient of the default recipe removed in turn.
ABLATIONS = {
    "no-k0": ["--k0", "0"],
    "no-rollout": ["--rollout", "0"],
    "local-earlier": ["--local", "earlier"],
    "no-local": ["--lam1", "1"],
    "no-task": ["--lam2", "0"],
    "no-augmentation": ["--p_aug", "0"],
    "no-anderson": ["--no-aa"],
    # Nothing removed, but a rolling store of 5 % of all trajectories.
    "rolling-store": ["--store", "rolling", "--cache_gb", "0.00708"],
}


def methods(run: Run) -> dict[str, Method]:
    """Every solver of a run behind one signature, each with the counter of its evaluations."""
    net, table = run.teacher, {}
    for name, solver, options in (("picard", picard, {}), ("anderson", anderson, run.solver())):
        f = Counter(net.f)

        def solve(z0, u, nfe, last=False, f=f, solver=solver, options=options):
            dims = net.sample_dims
            return solver(lambda z: f(z, u), z0, nfe, last=last, sample_dims=dims, **options)

        table[name] = Method(solve, net.inject, f)
    for name, (student, decay) in run.students.items():
        table[label(name)] = infer.counted(student, decay)
    return table


def label(student: str) -> str:
    """The method's name in tables: cdeq for the default recipe's student."""
    return f"cdeq-{student}" if student else "cdeq"


@torch.no_grad()
def cost(run: Run, table: dict, wanted: set[tuple], batch: int, repeats: int = 5) -> dict:
    """Median seconds from the injected input to the logits of one batch, and the process's peak
    memory in bytes while it runs, by (method, NFE), for those wanted and the explicit networks,
    whose NFE is None, as is that of "injection": the step before."""
    rows = torch.arange(min(batch, len(run.task.test)))
    x = run.task.test.batch(rows)[0].to(run.device)
    u = {name: method.inject(x) for name, method in table.items()}
    z0 = run.teacher.initial(u["anderson"])

    def go(name: str, nfe: int) -> Callable[[], object]:
        return lambda: run.teacher.head(table[name].solve(z0, u[name], nfe, last=True))

    jobs = {key: go(*key) for key in sorted(wanted)}
    jobs["injection", None] = lambda: run.teacher.inject(x)
    jobs |= {(name, None): lambda net=net: net(x) for name, net in run.explicit.items()}
    spent = interleaved(jobs, repeats, run.device)
    return {
        key: (statistics.median(spent[key]), peak_memory(jobs[key], run.device)) for key in jobs
    }


def peak_memory(job: Callable[[], object], device: torch.device) -> int | None:
    """Bytes at the highest point of a job: allocated on a GPU, resident on Linux, else unknown."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        job()
        return torch.cuda.max_memory_allocated(device)
    if hasattr(infer.LIBC, "malloc_trim"):
        infer.LIBC.malloc_trim(0)  # what earlier jobs left is not this one's
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the high-water mark
    except OSError:
        return None
    job()
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def interleaved(
    jobs: dict, repeats: int, device: torch.device, warmup: int = 1
) -> dict[object, list[float]]:
    """Seconds of each job, all jobs taking turns, every second round in reverse order."""
    spent: dict = {key: [] for key in jobs}
    for repeat in range(-warmup, repeats):
        for key in list(jobs)[:: -1 if repeat % 2 else 1]:
            synchronize(device)
            begin = time.perf_counter()
            jobs[key]()
            synchronize(device)
            if repeat >= 0:
                spent[key].append(time.perf_counter() - begin)
    return spent


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def equals(run: Run, table: dict, batch: int) -> dict[str, int | None]:
    """The fewest evaluations from which on each method's validation metric stays as good as the
    converged teacher's, less the task's margin; None where it never does within K."""
    task, K, sign = run.task, run.config["K"], 1 if run.task.higher_is_better else -1
    nfes = tuple(range(1, K + 1))
    curves = {name: infer.evaluate(run, table[name], task.valid, nfes, batch) for name in table}
    bar = sign * curves["anderson"][-1]["value"] - task.margin
    fewest = {}
    for name, rows in curves.items():
        short = [row["nfe"] for row in rows if sign * row["value"] < bar]
        first = max(short, default=0) + 1
        fewest[name] = first if first <= K else None
    return fewest


@torch.no_grad()
def report(run: Run, split: str = "test", batch: int = 128) -> dict:
    """Evaluates every method of a run; the form of report.json and of results/."""
    task, table, nfes, rank = run.task, methods(run), run.task.nfes, infer.ranks()[0]
    data = getattr(task, split)
    teacher = infer.evaluate(run, table["anderson"], data, (run.config["K"],), batch)[0]
    bar = tqdm(table, desc=f"evaluate ({split})", disable=None if rank == 0 else True)
    rows = [
        {"method": name, **row, "params": parameters(run, name)}
        for name in bar
        for row in infer.evaluate(run, table[name], data, nfes, batch)
    ]
    for name, net in run.explicit.items():
        x, y = (v.to(run.device) for v in data.batch(torch.arange(len(data))))
        value = task.score(net(x), y).mean().item()
        rows.append({"method": name, "nfe": None, "value": value, "nll": net.nll(x, y).item()})
        rows[-1]["params"] = sum(p.numel() for p in net.parameters())
    note, each = task.note, run.teacher.cell.cost
    if each != 1:
        note = f"{note or task.name}, one NFE costs {each} evaluations of the other networks,"
    fewest = equals(run, table, batch)
    wanted = {(name, nfe) for name in table for nfe in {*nfes, fewest[name] or 1}}
    spent = cost(run, table, wanted, batch)
    for row in rows:
        seconds, memory = spent[row["method"], row["nfe"]]
        row |= {"std": None, "n": 1, "seconds_per_batch": seconds, "peak_memory_bytes": memory}
    rows += [{"method": name, "nfe": None, "value": None, "n": 0} for name in task.unmeasured]
    equal = [
        {
            "method": name,
            "nfe": [nfe],
            "value": infer.evaluate(run, table[name], data, (nfe,), batch)[0]["value"],
            "seconds_per_batch": spent[name, nfe][0],
        }
        for name, nfe in fewest.items()
        if nfe
    ]
    return {
        "task": task.name,
        "note": note,
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "split": split,
        "seeds": [run.config["seed"]],
        **provenance(),
        "versions": versions(),
        "device": torch.cuda.get_device_name() if run.device.type == "cuda" else "cpu",
        "dtype": run.config["dtype"],
        "batch": min(batch, len(data)),
        "teacher": {**teacher, "params": parameters(run, "anderson")},
        "rows": rows,
        "margin": task.margin,
        "equal": equal,
        "injection_seconds": spent["injection", None][0],
        "decay": {label(name): [decay] for name, (_, decay) in run.students.items()},
    }


def parameters(run: Run, method: str) -> int:
    """Trainable numbers that a method needs: the teacher's, and the student's beside them."""
    networks = [run.teacher, *(s for name, (s, _) in run.students.items() if label(name) == method)]
    return sum(p.numel() for net in networks for p in net.parameters())


def merge(reports: list[dict]) -> dict:
    """One report over seeds: means of every number, the metric's std (n - 1) and n."""
    result = dict(reports[0], seeds=[seed for r in reports for seed in r["seeds"]], **provenance())
    result["runs"] = [{"command": r["command"], "commit": r["commit"]} for r in reports]
    measured = ("value", "nll", "residual", "distance", "seconds_per_batch", "peak_memory_bytes")

    def mean(rows: list[dict]) -> dict:
        known = [key for key in measured if rows[0].get(key) is not None]
        means = {key: statistics.fmean(r[key] for r in rows) for key in known}
        values = [r["value"] for r in rows if r["value"] is not None]
        spread = statistics.stdev(values) if len(values) > 1 else None
        return {**rows[0], **means, "std": spread, "n": len(values)}

    result["teacher"] = mean([r["teacher"] for r in reports])
    result["rows"] = [mean(list(rows)) for rows in zip(*(r["rows"] for r in reports), strict=True)]
    result["injection_seconds"] = statistics.fmean(r["injection_seconds"] for r in reports)
    equal: dict[str, list[dict]] = {}
    for row in (row for r in reports for row in r["equal"]):
        equal.setdefault(row["method"], []).append(row)
    result["equal"] = [  # only methods that get there with every seed
        {**mean(rows), "nfe": [nfe for row in rows for nfe in row["nfe"]]}
        for rows in equal.values()
        if len(rows) == len(reports)
    ]
    result["decay"] = {
        name: [base for r in reports for base in r["decay"][name]] for name in result["decay"]
    }
    return result


def markdown(result: dict, keys=("value", "distance", "residual", "seconds_per_batch")) -> str:
    """The report as tables: a row per method, a column per NFE."""
    implicit = [row for row in result["rows"] if row["nfe"]]
    explicit = [row for row in result["rows"] if not row["nfe"]]
    nfes = sorted({row["nfe"] for row in implicit})
    cells = {(row["method"], row["nfe"]): row for row in implicit}
    teacher = result["teacher"]
    titles = {
        "value": f"{result['metric']}, {result['split']} split",
        "distance": "distance to the equilibrium, |z - z*| / |z*|",
        "residual": "relative residual, |f(z) - z| / |z|",
        "seconds_per_batch": f"seconds per batch of {result['batch']}, {result['device']}",
    }
    seeds = ", ".join(map(str, result["seeds"]))
    lines = [
        f"# {result.get('note') or result['task']} by NFE",
        "",
        f"Teacher, converged (Anderson, NFE {teacher['nfe']}): {teacher['value']:.2f}"
        f"{spread(teacher)}, relative residual {teacher['residual']:.1e}. Seeds {seeds}.",
        f"`{result['command']}` at commit {result['commit'][:12]}.",
    ]
    for key in keys:
        lines += ["", f"## {titles[key]}", "", "| method | " + " | ".join(map(str, nfes)) + " |"]
        lines.append("|---" * (len(nfes) + 1) + "|")
        for method in dict.fromkeys(row["method"] for row in implicit):
            row = [number(cells[method, nfe], key) for nfe in nfes]
            lines.append(f"| {method} | " + " | ".join(row) + " |")
    lines += equal_lines(result)
    columns = ("value", "params", "seconds_per_batch", "peak_memory_bytes")
    if explicit:
        lines += ["", "## networks of finite depth", "", f"| network | {' | '.join(columns)} |"]
        lines.append("|---" * (len(columns) + 1) + "|")
        for row in explicit:
            lines.append(f"| {row['method']} | {' | '.join(number(row, key) for key in columns)} |")
    return "\n".join(lines) + "\n"


def equal_lines(result: dict) -> list[str]:
    """The table of evaluations and seconds to the converged teacher's metric, less the margin."""
    before = result["injection_seconds"]
    whole = {row["method"]: before + row["seconds_per_batch"] for row in result["equal"]}
    lines = [
        "",
        f"## as good as the converged teacher, less {result['margin']:g} (chosen on validation)",
        "",
        f"Times are from the injected input to the logits; the injection takes {before:.4f} s.",
        "",
        f"| method | NFE by seed | {result['metric']} | seconds | / Anderson's | with injection |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["equal"]:
        name, nfes = row["method"], ", ".join(map(str, row["nfe"]))
        cells = [name, nfes, number(row, "value"), number(row, "seconds_per_batch"), "", ""]
        if "anderson" in whole:
            part = row["seconds_per_batch"] / (whole["anderson"] - before)
            cells[4:] = f"{part:.3f}", f"{whole[name] / whole['anderson']:.3f}"
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def number(row: dict, key: str) -> str:
    """One cell of a table; empty where nothing was measured."""
    if row.get(key) is None:
        return ""
    if key == "value":
        return f"{row['value']:.2f}{spread(row)}"
    return f"{row[key]:,.0f}" if key in ("params", "peak_memory_bytes") else f"{row[key]:.4f}"


def spread(row: dict) -> str:
    return f" ± {row['std']:.2f}" if row.get("std") is not None else ""


def figure(result: dict, path: Path) -> None:
    """Metric and relative residual (Fig. 2's axes) against NFE, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    canvas, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    implicit = [row for row in result["rows"] if row["nfe"]]
    for method in dict.fromkeys(row["method"] for row in implicit):
        rows = [row for row in implicit if row["method"] == method]
        style = dict(marker="o", markersize=4, linestyle="-" if method == "cdeq" else "--")
        for axis, key in ((left, "value"), (right, "residual")):
            axis.plot([r["nfe"] for r in rows], [r[key] for r in rows], label=method, **style)
    converged = result["teacher"]["value"]
    left.axhline(converged, color="gray", linewidth=1, label="teacher, converged")
    left.set(ylabel=f"{result['split']} {result['metric']}")
    right.set(ylabel="relative residual |f(z) - z| / |z|", yscale="log")
    for axis in (left, right):
        ticks = sorted({row["nfe"] for row in implicit})
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, map(str, ticks))
        axis.set(xlabel="evaluations of f (NFE)")
        axis.grid(alpha=0.3)
    for row in result["rows"]:
        if not row["nfe"] and row["value"] is not None:
            left.axhline(row["value"], linewidth=1, linestyle=":", label=row["method"])
    left.legend()
    canvas.suptitle(f"{result.get('note') or result['task']}, seeds {result['seeds']}")
    with atomic(path) as file:
        canvas.savefig(file, format="png", dpi=120)
    pyplot.close(canvas)


def write(result: dict, stem: Path, **options) -> str:
    """STEM.json, STEM.md and STEM.png; returns the Markdown."""
    text = markdown(result, **options)
    for suffix, contents in ((".json", json.dumps(result, indent=1) + "\n"), (".md", text)):
        with atomic(stem.with_suffix(suffix)) as file:
            file.write(contents.encode())
    figure(result, stem.with_suffix(".png"))
    return text


def train(*flags: str) -> None:
    """Runs train.py as its own process, as a user would; a finished stage returns at once."""
    command = [sys.executable, str(Path(__file__).with_name("train.py")), *flags]
    print("running: python train.py", *flags, file=sys.stderr, flush=True)
    code = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
    if code:
        raise UsageError(f"train.py {' '.join(flags)} ended with exit code {code}, see its message")


def table_over_seeds(task: str, seeds: list[int], variants: dict[str, list[str]], extra: list[str]):
    """Trains what is missing and reports the named students of every seed in one table.

    A task's references (explicit networks) and rivals (teachers solved beside the first one, under
    the names "picard (eignn)", ...) have rows too.
    """
    kind = TASKS[task](data_folder(extra))
    reports = []
    for seed in seeds:
        folder = Path(f"runs/{task}-seed{seed}")
        base = ["--task", task, "--seed", str(seed), *extra]
        here = [*base, "--out", str(folder)]
        for name, flags in variants.items():
            named = ["--name", name] if name not in ("", "paper") else []
            for stage in ("teacher", "student"):
                train(*here, "--stage", stage, *flags, *named)
        for name in kind.references:
            train(*here, "--stage", "explicit", "--explicit", name)
        run = infer.open_run(folder, names=tuple(variants))
        missing = set(variants) - set(run.students)
        if missing:
            raise UsageError(f"{folder}: no finished student {', '.join(sorted(missing))}")
        result = report(run)
        for rival in kind.rivals:
            other = folder.with_name(f"{folder.name}-{rival}")
            train(*base, "--preset", rival, "--stage", "teacher", "--out", str(other))
            rows = report(infer.open_run(other))["rows"]
            result["rows"] += [{**row, "method": f"{row['method']} ({rival})"} for row in rows]
        reports.append(result)
    return merge(reports)


def data_folder(flags: list[str]) -> Path:
    """The --data among flags for train.py."""
    return Path(flags[flags.index("--data") + 1] if "--data" in flags else "data")


def solver_overhead(shape: tuple[int, int], K: int = 12, repeats: int = 5) -> dict:
    """Seconds per step without f of our Anderson and torchdeq's, m = 6, side by side."""
    from torchdeq.solver.anderson import anderson_solver

    buffers = [torch.randn(shape) for _ in range(3)]  # an f that costs nothing: ready-made answers
    calls = Counter(lambda z: buffers[calls.nfe % 3])
    z0 = torch.zeros(shape)
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
        "passes_floor_seconds": 19 * copy_seconds(shape) / 2,  # 2m + 7 passes; a copy makes two
    }


def copy_seconds(shape: tuple[int, int], repeats: int = 5) -> float:
    """Seconds to copy one state: one read and one write of it."""
    a, b = torch.randn(shape), torch.empty(shape)
    return statistics.median(interleaved({"": lambda: b.copy_(a)}, repeats, a.device)[""])


def window_memory(m: int = 6, n: int = 8_000_000) -> float:
    """Peak memory of a solve beyond z_0 and f's own, in states. Linux, in a fresh process."""
    z0, out = torch.ones(1, n), torch.ones(1, n)  # written, so that their pages are there
    anderson(lambda z: z * 0.5, torch.zeros(1, 8), 3)  # libraries load outside the measurement
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    anderson(lambda z: torch.mul(z, 0.5, out=out), z0, 3 * m, m=m, last=True)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (4 * n)


@torch.no_grad()
def student_overhead(batch: int = 128, repeats: int = 800) -> list[dict]:
    """J-step inference against J bare evaluations of f: the ratio of their seconds."""
    task = TASKS["digits"](Path("data"))
    net = task.network({"preset": task.presets[0]}).eval()
    config = dict(K=20, eps=0.002, T=5.0, gamma=1.0, aa=True, alpha_grad=False)
    student = infer.build_student(net, config, rho=0.19).eval()
    u = net.inject(task.train.batch(torch.arange(batch))[0])
    z0 = net.initial(u)

    def bare(J: int) -> Tensor:
        z = z0
        for _ in range(J):
            z = net.f(z, u)
        return z

    rows = []
    for J in (1, 2, 8):
        jobs = {"cdeq": lambda J=J: cdeq(student, z0, u, J, 0.8, True), "f": lambda J=J: bare(J)}
        spent = interleaved(jobs, repeats // J + 20, z0.device, warmup=100 // J)
        ratio = statistics.median(a / b for a, b in zip(*spent.values(), strict=True))
        medians = {key: statistics.median(times) for key, times in spent.items()}
        rows.append({"J": J, "batch": batch, "seconds": medians, "ratio": ratio})
    return rows


@torch.no_grad()
def graph_scaling(edges=(10**4, 10**5, 10**6, 10**7), d: int = 64, repeats: int = 5) -> list[dict]:
    """Seconds of IGNN's f on random graphs with ten neighbours a node, its floor (the bare sparse
    and the bare dense product, each alone) and Anderson's share of a step."""
    from models.ignn import IGNN, Graph

    rows = []
    for E in edges:
        N = E // 10
        net = IGNN(Graph(torch.randint(N, (2, E // 2)), N), 8, 2, width=d, hidden=8)
        A, _ = net.cell.graph.matrices(torch.device("cpu"))
        z, u, W = torch.randn(1, N, d), torch.randn(1, N, d), net.cell.W
        jobs = {
            "f": lambda net=net, z=z, u=u: net.f(z, u),
            "sparse": lambda A=A, z=z: A @ z[0],
            "dense": lambda z=z, W=W: z[0] @ W,
            "anderson": lambda z=z: anderson(lambda z: z, z, 12, last=True),
        }
        spent = interleaved(jobs, repeats, z.device)
        seconds = {key: statistics.median(times) for key, times in spent.items()}
        seconds["anderson"] /= 12
        floor = seconds["sparse"] + seconds["dense"]
        rows.append({"nodes": N, "edges": net.cell.graph.edges, "width": d, "seconds": seconds})
        rows[-1] |= {"ratio": seconds["f"] / floor, "anderson": seconds["anderson"] / seconds["f"]}
    return rows


def scaling_figure(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    canvas, axis = pyplot.subplots(figsize=(5, 4), layout="constrained")
    edges = [row["edges"] for row in rows]
    axis.loglog(edges, [row["seconds"]["f"] for row in rows], marker="o", label="one evaluation")
    first = rows[-1]["seconds"]["f"] / edges[-1]
    axis.loglog(edges, [first * E for E in edges], linestyle=":", color="gray", label="linear")
    axis.set(xlabel="edges (both directions, self-loops)", ylabel="seconds", title="IGNN, f")
    axis.legend()
    with atomic(path) as file:
        canvas.savefig(file, format="png", dpi=120)
    pyplot.close(canvas)


def speed() -> dict:
    """Everything measured as a ratio: solver overhead, window memory, the student's step."""
    torch.set_num_threads(2)
    here = str(Path(__file__).parent)
    code = "import compare; print(compare.window_memory())"
    fresh = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=here)
    result = {**provenance(), "versions": versions(), "threads": 2, "dtype": "fp32"}
    result["window_memory_states"] = {"m": 6, "states": float(fresh.stdout)}
    result["student_step"] = student_overhead()
    result["graph_scaling"] = graph_scaling()
    try:
        shapes = ((32, 188_160), (1, 21_700_000))
        result["solver_overhead"] = [solver_overhead(shape) for shape in shapes]
    except ModuleNotFoundError:
        result["solver_overhead"] = None
        print('torchdeq is missing (pip install ".[peers]"): not compared', file=sys.stderr)
    return result


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = refuse
    add = parser.add_argument
    add("--task", choices=tuple(TASKS), default="digits")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--ablation", action="store_true", help="each ingredient of the recipe removed in turn")
    add("--speed", action="store_true", help="overheads as ratios, side by side")
    add(
        "--results", type=Path, default=Path("results"), help="folder of the JSON, table and figure"
    )
    add("--flags", nargs=argparse.REMAINDER, default=[], help="more flags for train.py, last")
    args = parser.parse_args(argv)
    if args.speed:
        result = speed()
        with atomic(args.results / "speed.json") as file:
            file.write((json.dumps(result, indent=1) + "\n").encode())
        scaling_figure(result["graph_scaling"], args.results / "speed-graphs.png")
        print(json.dumps(result, indent=1))
    elif args.ablation:
        result = table_over_seeds(args.task, args.seeds, {"": []} | ABLATIONS, args.flags)
        print(write(result, args.results / f"{args.task}-ablation", keys=("value", "distance")))
    else:
        variants = {"": [], "paper": ["--recipe", "paper"]}
        result = table_over_seeds(args.task, args.seeds, variants, args.flags)
        print(write(result, args.results / args.task))


if __name__ == "__main__":
    with plain_errors():
        main(sys.argv[1:])
