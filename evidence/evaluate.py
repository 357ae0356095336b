"""Measures methods over a split: metric, residual and distance to the equilibrium, by NFE.

    residual   |f(z) - z| / |z| under the teacher's f, as in Fig. 2; per sample, then the mean
    distance   |z - z*| / |z*|, where z* is the teacher's own solver after 2 K evaluations

Every process adds up sums and counts, and the division comes last: a mean of means would weigh
samples by their batch. The metric's summands are kept one by one, for the bootstrap of intervals.
"""

import collections
import math
import statistics
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from anderson import anderson
from infer import Method, anytime, counted
from models import labels
from runs import Run
from student import Student
from tasks import Split, Task


@torch.no_grad()
def evaluate(
    run: Run,
    methods: dict,
    split: Split,
    nfes=None,
    batch: int = 128,
    own_memory: bool = True,
    converge: bool = True,
) -> dict[object, list[dict]]:
    """For each method, a row per NFE with means over labels and the metric's items.

    own_memory: a network that sees the segment before sees the states that the same method gave
    there with the same NFE; otherwise the teacher's equilibria. converge: False if there is no
    equilibrium to measure residual and distance by.
    """
    net, nfes = run.teacher, nfes or run.task.nfes
    own = own_memory and net.memory > 0
    tallies = {(name, nfe): Tally() for name in methods for nfe in nfes}
    calls = 0
    for method in methods.values():
        method.counter.nfe = 0
    for x_all, y_all, samples in stream(run, split, batch):
        before, star, u = None, None, None
        pasts = {name: dict.fromkeys(nfes) for name in methods}
        for segment, (x, y) in enumerate(net.segments(x_all, y_all)):
            calls, units = calls + 1, samples + segment * len(split)
            if converge:
                u = net.inject(x, before)
                star = equilibrium(run, net.initial(u), u)
            for name, method in methods.items():
                past = method, x, pasts[name]
                states = own_states(*past) if own else states_of(*past, star)
                for nfe, z in zip(nfes, states, strict=True):
                    tallies[name, nfe].add(measures(run, z, u, star, y), y, units)
                del states, z  # gigabytes on a graph: not beside the next method's
            before = net.remember(u, star) if converge else None
    for name, method in methods.items():
        made, declared = method.counter.nfe, calls * (sum(nfes) if own else max(nfes))
        if made != declared:
            raise AssertionError(f"{name}: {made} evaluations were made, {declared} declared")
    rows: dict = {name: [] for name in methods}
    for (name, nfe), tally in zip(tallies, gathered([*tallies.values()]), strict=True):
        rows[name].append({"nfe": nfe, **tally.row()})
    return rows


def own_states(method: Method, x: Tensor, memories: dict) -> Iterator[Tensor]:
    """z at each NFE of `memories`; each memory is replaced by the one that z leaves."""
    for nfe, memory in memories.items():
        u = method.inject(x, memory)
        z = method.solve(method.initial(u), u, nfe, last=True)
        memories[nfe] = method.remember(u, z)
        yield z


def states_of(method: Method, x: Tensor, memories: dict, star) -> Iterator[Tensor]:
    """z at each NFE of `memories`, from one solve that passes through all of them; the memory of
    the next segment is the state star for each."""
    u = method.inject(x, next(iter(memories.values())))
    states = method.solve(method.initial(u), u, max(memories))
    if star is not None:
        memories |= dict.fromkeys(memories, method.remember(u, star))
    yield from (states[nfe] for nfe in memories)


def stream(run: Run, split: Split, batch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """This rank's samples of a split: x and y on the device, and the unit of each sample (views of
    one picture are one unit). A graph is one sample, on one rank."""
    rank, world = ranks()
    rows = torch.arange(rank, len(split), world).split(batch)
    batches = ((part,) for part in rows if len(part))
    first = 0
    for x, y in split.stream(batches, run.config.get("workers", 0)):
        if len(y):
            samples = rank + world * torch.arange(first, first + len(y))
            first += len(y)
            yield x.to(run.device), y.to(run.device), samples // split.draws


def measures(run: Run, z: Tensor, u: Tensor, star: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The measures of a state z as sums over labels: metrics and, if there is an equilibrium star,
    the residual under the teacher's f and the distance to star."""
    net, wanted = run.teacher, scores(run.task)
    found = {"nll": net.nll(z, y) * labels(y)}
    if star is not None:
        found["residual"] = relative(net.f(z, u), z) * labels(y)
        found["distance"] = relative(z, star) * labels(y)
    logits = net.head(z) if wanted else None
    return found | {name: score(logits, y) for name, score in wanted.items()}


def equilibrium(run: Run, z0: Tensor, u: Tensor) -> Tensor:
    """z*: the teacher's own solver after 2 K evaluations, a reference that is not counted."""
    net, steps = run.teacher, 2 * run.config["K"]
    return anderson(
        lambda z: net.f(z, u), z0, steps, last=True, sample_dims=net.sample_dims, **run.solver()
    )


def choose_decay(run: Run, student: Student) -> tuple[float, dict]:
    """The base of the schedule, chosen on the validation split, and the scores of all candidates.

    Of the candidates whose metric, the mean over the NFEs, is within half a per cent of the best,
    it is the one nearest to the equilibrium: smaller differences are noise on a small split.
    """
    sign = 1 if run.task.higher_is_better else -1
    split = run.task.to_choose()
    candidates = {decay: counted(run.teacher, student, decay) for decay in run.task.decays}
    found = {
        decay: {key: statistics.fmean(row[key] for row in rows) for key in ("value", "distance")}
        for decay, rows in evaluate(run, candidates, split, own_memory=False).items()
    }
    best = max(sign * score["value"] for score in found.values())
    good = [d for d in found if sign * found[d]["value"] >= best - 0.005 * abs(best)]
    return min(good, key=lambda decay: found[decay]["distance"]), found


@torch.no_grad()
def evaluate_anytime(run: Run, name: str, split: str, tol: float, max_nfe: int) -> dict:
    """Metric and NFE of a student's anytime mode on the split of this name."""
    student, decay = run.students[name]
    scores, used = [], []
    for x, y, _ in stream(run, getattr(run.task, split), 128):
        u = student.inject(x)
        z, nfe = anytime(student, run.teacher.initial(u), u, tol, max_nfe, decay)
        scores.append(run.task.score(run.teacher.head(z), y)[y >= 0])
        used.append(nfe)
    nfe = torch.cat(used).float()
    return {
        "tol": tol,
        "value": torch.cat(scores).mean().item(),
        "nfe_mean": nfe.mean().item(),
        "nfe_max": int(nfe.max()),
    }


class Tally:
    """Sums over labels of the measures of one method at one NFE."""

    def __init__(self):
        self.sums: dict[str, float] = collections.defaultdict(float)
        self.items: list[Tensor] = []

    def add(self, found: dict[str, Tensor], y: Tensor, units: Tensor) -> None:
        """found: values per sample, (B,), or per label, in the shape of y; those of the metric are
        also kept one by one. units (B,): of each sample; on a graph, each node is a unit."""
        known = labels(y)
        for name, values in found.items():
            self.sums[name] += values.double().sum().item()
        self.sums["labels"] += int(known.sum())
        metric = found.get("value", found["nll"])
        if metric.numel() > len(y):  # a graph
            units, here = torch.arange(y.numel()), (y >= 0).flatten().cpu()
            units, metric, known = (v.flatten().cpu()[here] for v in (units, metric, y >= 0))
        self.items.append(torch.stack([v.cpu().double() for v in (units, metric, known)], dim=1))

    def row(self) -> dict:
        """Means over labels, the perplexity if there is no other metric, and the metric's items
        (n, 3): unit, sum and number of labels of each."""
        means = {name: value / self.sums["labels"] for name, value in self.sums.items()}
        means.setdefault("value", math.exp(min(means["nll"], 700.0)))
        means.pop("labels")
        return {**means, "items": torch.cat(self.items)}


def gathered(tallies: list[Tally]) -> list[Tally]:
    """The tallies of all ranks together, on every rank."""
    if not dist.is_initialized():
        return tallies
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, tallies)
    for total, *parts in zip(*everyone, strict=True):
        for part in parts:
            total.items += part.items
            for name, value in part.sums.items():
                total.sums[name] += value
    return everyone[0]


def scores(task: Task) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """The functions of logits that a task reports, by name."""
    return ({"value": task.score} if task.score else {}) | task.further


def relative(a: Tensor, b: Tensor) -> Tensor:
    """|a - b| / |b| per sample: (B,)."""
    a, b = a.flatten(1).float(), b.flatten(1).float()
    return (a - b).norm(dim=1) / b.norm(dim=1).clamp(min=1e-12)


def ranks() -> tuple[int, int]:
    """(rank, world size)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
