"""The report of a run folder: every method at equal NFE, with time and memory."""

import collections
import dataclasses

import torch
from torch import nn

import runs
from anderson import anderson
from checkpoint import load, provenance, versions
from evidence.evaluate import Tally, choose_decay, evaluate, gathered, ranks, scores, stream
from evidence.merge import merge
from evidence.methods import label, methods, picard_of, solved_by
from evidence.rivals import Rivals, open_rivals
from evidence.tables import write
from evidence.timing import cost
from fpode import contraction
from models import Equilibrium, labels
from runs import Run
from tasks import Split

BATCH = 128  # samples that are answered together


def pick_decay(job: runs.Job) -> None:
    """Chooses the schedule's base on the validation split, which finishes the student."""
    path = runs.student_path(job.folder, job.config.name)
    if runs.finished(path, "student", job.config):
        return
    saved, run = load(path, "student"), runs.reopened(job, ())
    run.config |= {"K": saved["config"]["K"]}
    student = runs.build_student(run.teacher, saved["config"], saved["rho"])
    student.load_state_dict(saved["ema"])
    decay, scores = choose_decay(run, student.to(job.device).eval())
    runs.say(job, f"schedule base {decay} (validation)")
    runs.log(job, decay=decay, validation={str(key): value for key, value in scores.items()})
    more = {key: saved[key] for key in ("model", "ema", "optimizer", "rho", "teacher")}
    runs.write_checkpoint(job, path, "student", step=saved["step"], decay=decay, **more)
    runs.barrier(job)


def report(run: Run) -> None:
    """Measures everything finished in a run folder: report.json, report.md, report.png."""
    result = measure(run, open_rivals(run))
    if ranks()[0] == 0:  # the one that measured times
        print(write(merge([result]), run.folder / "report"))


@torch.no_grad()
def measure(run: Run, rivals: Rivals) -> dict:
    """Every method of a run on the test split. merge.py turns such measurements into the form of
    report.json and of results/."""
    task = run.task
    table, end = methods(run, rivals), ("anderson", run.config["K"])
    converged, name_K = {"anderson": table["anderson"]}, (run.config["K"],)
    valid = evaluate(run, converged, task.valid, name_K, BATCH, own_memory=False)["anderson"][0]
    equal = {key for key in equals(run, table).items() if key[1]}
    rows, points, spent = measured(run, rivals, table, equal | {end})
    return {
        "task": task.name,
        "note": task.note,
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "split": "test",
        "seeds": [run.config["seed"]],
        **provenance(),
        "versions": versions(),
        "device": torch.cuda.get_device_name() if run.device.type == "cuda" else "cpu",
        "dtype": run.config["dtype"],
        "batch": min(BATCH, len(task.test)),
        "teacher": {
            **points[end],
            "valid": valid["value"],
            "contraction": contraction_of(run),
            "params": parameters(run, rivals, "anderson"),
        },
        "rows": rows,
        "margin": task.margin,
        "equal": [
            {"method": name, "nfe": [nfe], "value": points[name, nfe]["value"],
             "seconds_per_batch": spent[name, nfe][0]}
            for name, nfe in sorted(equal, key=lambda key: list(table).index(key[0]))
        ],
        "injection_seconds": spent["injection", None][0],
        "decay": {label(name): [decay] for name, (_, decay) in run.students.items()},
    }  # fmt: skip


def equals(run: Run, table: dict) -> dict[str, int | None]:
    """For each method, the fewest evaluations from which on its validation metric stays within the
    task's margin of the converged teacher's; None if there is no such number up to K."""
    task, K = run.task, run.config["K"]
    nfes = tuple(range(1, K + 1))
    converge = run.teacher.memory > 0  # else the equilibrium is of no use here
    options = dict(own_memory=False, converge=converge)
    curves = evaluate(run, table, task.to_choose(), nfes, BATCH, **options)
    teacher = curves["anderson"][-1]["value"]
    fewest = {}
    for name, rows in curves.items():
        short = [row["nfe"] for row in rows if not task.as_good(row["value"], teacher)]
        first = max(short, default=0) + 1
        fewest[name] = first if first <= K else None
    return fewest


def measured(run: Run, rivals: Rivals, table: dict, further: set[tuple] = frozenset()):
    """Rows of the task's tables: each method by NFE, each direct and each explicit network. Also,
    by (method, NFE) and including the `further` ones, measures and seconds."""
    data, nfes = run.task.test, {*run.task.nfes, *(nfe for _, nfe in further)}
    curves = evaluate(run, table, data, tuple(sorted(nfes)))
    points = {(name, row["nfe"]): row for name in table for row in curves[name]}
    wanted = {(name, nfe) for name in table for nfe in run.task.nfes}
    rows = [
        {"method": name, **points[name, nfe], "params": parameters(run, rivals, name)}
        for name in table
        for nfe in run.task.nfes
    ]
    for J, net in rivals.direct.items():
        params = sum(p.numel() for p in net.parameters())
        rows.append({"method": "direct", **direct_row(run, J, net, data), "params": params})
    for name, net in rivals.explicit.items():
        params = sum(p.numel() for p in net.parameters())
        found = evaluate_explicit(run, net, data)
        found["valid"] = evaluate_explicit(run, net, run.task.valid)["value"]
        rows.append({"method": name, "nfe": None, **found, "params": params})
    spent: dict = collections.defaultdict(lambda: (None, None))
    if not ranks()[0]:  # one rank measures time while the others wait
        spent |= cost(run, rivals, table, wanted | further, BATCH)
    for row in rows:
        seconds, memory = spent[row["method"], row["nfe"]]
        row |= {"std": None, "n": 1, "seconds_per_batch": seconds, "peak_memory_bytes": memory}
    return rows, points, spent


def direct_row(run: Run, J: int, net: Equilibrium, split: Split) -> dict:
    """The measures of a network that was trained for J evaluations; it has no equilibrium."""
    method = {"direct": solved_by(net, picard_of(net))}
    alone = dataclasses.replace(run, teacher=net)
    (found,) = evaluate(alone, method, split, (J,), BATCH, converge=False)["direct"]
    return found


def parameters(run: Run, rivals: Rivals, method: str) -> int:
    """Parameters that a method needs: the teacher's, and those of a student or learned solver."""
    method = method.removesuffix("-shared").removesuffix("+anderson")
    networks = [run.teacher, *(s for name, (s, _) in run.students.items() if label(name) == method)]
    networks += [solver for name, solver in rivals.learned.items() if name == method]
    return sum(p.numel() for net in networks for p in net.parameters())


@torch.no_grad()
def contraction_of(run: Run, batch: int = 128) -> float:
    """The error factor per Anderson step of a teacher, on a batch of the validation split."""
    net, split = run.teacher, run.task.valid
    x, y = split.batch(torch.arange(min(batch, len(split))))
    u = net.inject(next(net.segments(x.to(run.device), y))[0])
    options = dict(sample_dims=net.sample_dims, **run.solver())
    states = anderson(lambda z: net.f(z, u), net.initial(u), run.config["K"], **options)
    return contraction(states, net.sample_dims)


@torch.no_grad()
def evaluate_explicit(run: Run, net: nn.Module, split: Split) -> dict:
    """The measures of a network of finite depth over a split."""
    wanted, tally = scores(run.task), Tally()
    for x_all, y_all, samples in stream(run, split, BATCH):
        for segment, (x, y) in enumerate(net.segments(x_all, y_all)):
            logits = net(x) if wanted else None
            found = {"nll": net.nll(x, y) * labels(y)}
            found |= {name: score(logits, y) for name, score in wanted.items()}
            tally.add(found, y, samples + segment * len(split))
    return gathered([tally])[0].row()
