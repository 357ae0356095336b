"""Seconds and peak memory of an answer.

Jobs take turns in one process, so that a busy machine slows all of them alike, and the median of
their times is reported.
"""

import itertools
import math
import re
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import config
from evidence.methods import picard_of, solved_by
from evidence.rivals import Rivals
from infer import Method
from runs import Run


@torch.no_grad()
def cost(run: Run, rivals: Rivals, table: dict, wanted: set[tuple], batch: int) -> dict:
    """(Seconds, bytes) of one batch, by (method, NFE), for those wanted, for direct networks, for
    explicit ones (NFE None) and for ("injection", None). Seconds: the median from the injected
    input to the logits. Bytes: the process's peak memory from the input to the logits. A batch of a
    text is a segment that follows another; the likelihoods of its words take the logits' place."""
    net, task = run.teacher, run.task
    batch_of = task.test.batch(torch.arange(min(batch, len(task.test))))
    x, y = (v.to(run.device) for v in batch_of)
    parts = [*two_parts(net, x, y)]
    (first, _), (last, y_last) = parts[0], parts[-1]

    def past(method: Method):
        """The memory that a method has of the segment before."""
        u = method.inject(first)
        return method.remember(u, method.initial(u)) if net.memory else None

    def answer(method: Method, nfe: int, memory, u=None) -> Tensor:
        u = method.inject(last, memory) if u is None else u
        z = method.solve(method.initial(u), u, nfe, last=True)
        return method.net.head(z) if task.score else method.net.nll(z, y_last)

    jobs = {key: (table[key[0]], key[1]) for key in sorted(wanted)}
    for J, direct in rivals.direct.items():
        jobs["direct", J] = solved_by(direct, picard_of(direct)), J
    jobs = {key: (method, nfe, past(method)) for key, (method, nfe) in jobs.items()}
    alone = {("injection", None): partial(net.inject, last, past(table["anderson"]))}
    for name, explicit in rivals.explicit.items():
        *_, inputs = two_parts(explicit, x, y)
        alone[name, None] = partial(explicit, inputs[0])
        if not task.score:
            alone[name, None] = partial(explicit.nll, *inputs)
    given = {job[0]: job[0].inject(last, job[2]) for job in jobs.values()}
    timed = {key: partial(answer, *job, given[job[0]]) for key, job in jobs.items()}
    spent = interleaved(timed | alone, 5, run.device, patience=60)
    seconds = {key: statistics.median(values) for key, values in spent.items()}
    timed.clear(), given.clear()  # gigabytes on a graph
    whole = {key: partial(answer, *job) for key, job in jobs.items()} | alone
    return {key: (seconds[key], peak_memory(whole[key], run.device)) for key in whole}


def two_parts(network, x: Tensor, y: Tensor):
    """The first two segments of inputs and labels, or the only one."""
    return itertools.islice(network.segments(x, y), 2)


def peak_memory(job: Callable[[], object], device: torch.device) -> int | None:
    """Peak memory of a job in bytes: allocated on a GPU, resident on Linux, else unknown."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        job()
        return torch.cuda.max_memory_allocated(device)
    if hasattr(config.LIBC, "malloc_trim"):
        config.LIBC.malloc_trim(0)  # gives back what earlier jobs have freed
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets the high-water mark
    except OSError:
        return None
    job()
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def interleaved(
    jobs: dict, repeats: int, device: torch.device, warmup: int = 1, patience: float = math.inf
) -> dict[object, list[float]]:
    """Seconds of each job, all jobs taking turns, every second round in reverse order.

    patience: seconds after which three rounds are enough.
    """
    spent: dict = {key: [] for key in jobs}
    start = time.perf_counter()
    for repeat in range(-warmup, repeats):
        if repeat >= 3 and time.perf_counter() - start > patience:
            break
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
