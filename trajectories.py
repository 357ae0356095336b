r"""Teacher trajectories: sampled, augmented, stored and served.

Paper: Sec. 3.2, App. B.2, Alg. 4.

    z_{k+1} = S_AA({z_i}; f, x), k = 0 .. K-1, from z_0                          Alg. 4, l. 1-5
    z_k <- z_K with probability p_aug, for 1 <= k <= K - 3                       (13), l. 7-12

Three stores have one interface. `Memory` and `Disk` hold every trajectory of the train split;
`Rolling` holds a window of trajectories that are made on the fly, used `reuse` times each and then
replaced (all of ImageNet's would take 13 TB). `plan` picks the first one that fits its budget.

    store.batch(step) -> x, y, rows       the micro-batch of this number, a pure function of it
    store.ends(rows) -> z_K               of those samples, (B, ...)
    store.states(rows, ks) -> states      z_k of those samples: ks (B, n) -> n tensors (B, ...)

Only the recipe `paper` asks for `states`. The default recipe asks for `ends`, so its store keeps
one state of each sample instead of K + 1.

Departs from the paper: z_0 = 0, as its footnote 1 has it and inference does (Alg. 4 draws it from
N(0, I)). Eq. 13 is drawn anew at every use, not once when the cache is filled: it only redirects
an index, and a fixed draw would hide the same states from the student throughout the training.
"""

import itertools
import json
import math
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from anderson import anderson
from checkpoint import UsageError, atomic, fingerprint
from config import DTYPES
from models import Equilibrium
from runs import Job, moved, say, state_shape
from tasks import Split, positions

Solve = Callable[[Tensor], Tensor]  # x (B, ...) -> states (n, B, ...), the last one z_K
# Eq. 13: the probability; the first step that may be replaced; how many last ones may not.
P_AUG, K_MIN, K_TAIL = 0.1, 1, 3
REUSE = 8  # uses of a trajectory in the rolling store


@torch.no_grad()
def sample(net: Equilibrium, x: Tensor, K: int, ends: bool = False, **solver) -> Tensor:
    """The teacher's trajectory on x, (K + 1, B, state...), whose z_K stands for z*; with `ends`,
    z_K alone, (1, B, state...)."""
    u = net.inject(x)
    options = dict(sample_dims=net.sample_dims, last=ends, **solver)
    states = anderson(lambda z: net.f(z, u), net.initial(u), K, **options)  # Alg. 4, l. 1-5
    return states[None] if ends else states


def augment(ks: Tensor, draws: Tensor) -> Tensor:
    """Redirects steps ks (B, n) to K where their state is replaced by z_K. draws (B, K + 1) in
    [0, 1), one per state, so that a state is replaced everywhere in its row of ks or nowhere."""
    K = draws.shape[1] - 1
    k = torch.arange(K + 1, device=ks.device)
    replaced = (draws < P_AUG) & (k >= K_MIN) & (k <= K - K_TAIL)
    return torch.where(replaced.gather(1, ks), K, ks)  # Eq. 13; Alg. 4, l. 7-12


def plan(n: int, states: int, size: int, dtype: torch.dtype, cache_gb: float, disk_gb: float):
    """The store that fits n samples with so many states of `size` numbers each, and a line that
    shows the arithmetic: (kind, message)."""
    each = states * size * dtype.itemsize
    full = n * each / 1e9
    kind = "memory" if full <= cache_gb else "disk" if full <= disk_gb else "rolling"
    return kind, (
        f"trajectories: {n:,} samples x {states} state{'s' * (states > 1)} x {size:,} numbers x "
        f"{dtype.itemsize} bytes = {full:.3g} GB; memory budget {cache_gb:g} GB, disk budget "
        f"{disk_gb:g} GB: {kind} store"
    )


def make_store(job: Job, teacher: Equilibrium, ends: bool) -> "Memory":
    """The trajectories of the train split, or their ends, in a store that fits the budgets."""
    config, split = job.config, job.task.train
    dtype, states = DTYPES[config.cache_dtype], 1 if ends else config.K + 1
    size, budgets = state_shape(job, teacher).numel(), (config.cache_gb, config.disk_gb)
    kind, message = plan(len(split), states, size, dtype, *budgets)
    if config.store != "auto":
        kind, message = config.store, f"{message}; chosen by hand: {config.store}"
    say(job, message)

    def solve(x: Tensor) -> Tensor:
        x = moved(job, x)
        with torch.autocast(job.device.type, torch.bfloat16, enabled=config.dtype == "bf16"):
            return sample(teacher, x, config.K, ends, m=config.m)

    common = (solve, split, job.micro_batch, config.seed)
    options = dict(chunk=config.chunk, dtype=dtype)
    if kind == "memory":
        return Memory(*common, **options)
    if kind == "disk":
        header = {"teacher": fingerprint(teacher), "K": config.K, "m": config.m, "split": "train"}
        folder = job.folder / ("equilibria" if ends else "trajectories")
        return Disk(*common, folder=folder, header=header, **options)
    slots = int(config.cache_gb * 1e9 / (states * size * dtype.itemsize))
    # At most one trajectory per sample, and at most a fifth of all solves to fill it at first.
    solves = config.student_steps * config.batch // REUSE
    slots = min(slots, max(REUSE, min(len(split), solves // 4) // job.world))
    options |= dict(augment=config.augment, workers=config.workers)
    return Rolling(*common, slots=slots, **options)


class Memory:
    """Every trajectory in memory. Each rank solves a share, then all exchange them.

    batch: size of a micro-batch over all ranks; rank r serves its slice of it.
    """

    def __init__(self, solve: Solve, split: Split, batch: int, seed: int, *, chunk: int, dtype):
        self.split, self.seed, self.dtype = split, seed, dtype
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if _many() else (0, 1)
        self.local, self.chunk = batch // self.world, chunk
        self.solve_all(solve)

    def solve_all(self, solve: Solve) -> None:
        starts = range(0, len(self.split), self.chunk)
        parts = {c: self.solve(solve, c) for c in self.own_chunks(starts)}
        if len(starts) == 1 and not _many():  # a graph: no second copy of gigabytes
            self.z = parts[0]
            return
        shape = next(iter(parts.values())).shape[1:] if parts else None
        if _many():  # every rank knows the shape of rank 0's chunk, which always exists
            shapes = [shape]
            dist.broadcast_object_list(shapes, src=0)
            shape = shapes[0]
        self.z = torch.empty(len(self.split), *shape, dtype=self.dtype)
        for i, c in enumerate(starts):
            part = self.z[c : c + self.chunk]
            if c in parts:
                part.copy_(parts.pop(c))
            if _many():
                dist.broadcast(part, src=i % self.world)

    def own_chunks(self, chunks):
        """This rank's share of the chunks, with a progress bar on rank 0."""
        own = list(chunks)[self.rank :: self.world]
        return tqdm(own, desc="trajectories", unit="chunk", disable=None if not self.rank else True)

    def solve(self, solve: Solve, first: int) -> Tensor:
        """States of samples first .. first + chunk as stored: (chunk, n, state...)."""
        rows = torch.arange(first, min(first + self.chunk, len(self.split)))
        return solve(self.split.batch(rows)[0]).transpose(0, 1).to("cpu", self.dtype)

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        first = step * self.local * self.world
        rows, _ = positions(len(self.split), first, self.local * self.world, self.seed)
        rows = rows[self.rank * self.local :][: self.local]
        return *self.split.batch(rows), rows

    def states(self, rows: Tensor, ks: Tensor) -> tuple[Tensor, ...]:
        return self.z[rows[:, None], ks].unbind(1)

    def ends(self, rows: Tensor) -> Tensor:
        return self.states(rows, torch.full((len(rows), 1), -1))[0]


class Disk(Memory):
    """Every trajectory in memory-mapped files of `chunk` samples, shared by the ranks of a node.

    A shard is a magic word, the length of a JSON header, the header, the checksum of both, and raw
    numbers. The header says what they were made from (`header`: teacher, solver, split) and holds
    their checksum; all of it is verified at every start.
    """

    MAGIC = b"CDEQ-trajectory\n"

    def __init__(self, *args, folder: Path, header: dict, **options):
        self.folder, self.header = folder, header
        super().__init__(*args, **options)

    def solve_all(self, solve: Solve) -> None:
        starts = range(0, len(self.split), self.chunk)
        for first in self.own_chunks(starts):
            if not self.path(first).exists():
                self.write(first, self.solve(solve, first))
            self.open(first, verify=True)
        if _many():
            dist.barrier()
        self.shards = [self.open(first) for first in starts]

    def path(self, first: int) -> Path:
        return self.folder / f"shard-{first // self.chunk:06d}.traj"

    def expected(self, first: int) -> dict:
        return {**self.header, "first": first, "chunk": self.chunk, "dtype": str(self.dtype)}

    def write(self, first: int, z: Tensor) -> None:
        raw = z.contiguous().view(torch.uint8).numpy().reshape(-1)
        header = {**self.expected(first), "shape": list(z.shape), "crc32": zlib.crc32(raw)}
        text = json.dumps(header).encode()
        head = len(text).to_bytes(8, "little") + text
        with atomic(self.path(first)) as file:
            file.write(self.MAGIC + head + zlib.crc32(head).to_bytes(4, "little"))
            file.write(raw)

    def open(self, first: int, verify: bool = False) -> Tensor:
        """Maps a shard; UsageError names one that is damaged or was made for something else."""
        path = self.path(first)
        advice = "delete it and start again: its trajectories are then solved anew"
        try:
            with open(path, "rb") as file:
                if file.read(len(self.MAGIC)) != self.MAGIC:
                    raise UsageError(f"{path} is not a trajectory shard; {advice}")
                length = file.read(8)
                text = file.read(min(int.from_bytes(length, "little"), 10**6))
                if zlib.crc32(length + text).to_bytes(4, "little") != file.read(4):
                    raise ValueError("the header's checksum")
                header, offset = json.loads(text), file.tell()
            raw = np.memmap(path, np.uint8, mode="c", offset=offset)
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} is truncated or unreadable; {advice}") from error
        for name, value in self.expected(first).items():
            if header.get(name) != value:
                raise UsageError(f"{path} has {name} {header.get(name)}, not {value}; {advice}")
        if len(raw) != math.prod(header["shape"]) * self.dtype.itemsize or (
            verify and zlib.crc32(raw) != header["crc32"]
        ):
            raise UsageError(f"{path} is damaged (length or checksum); {advice}")
        return torch.from_numpy(raw).view(self.dtype).view(header["shape"])

    def states(self, rows: Tensor, ks: Tensor) -> tuple[Tensor, ...]:
        picked = [
            self.shards[row // self.chunk][row % self.chunk, k]
            for row, k in zip(rows.tolist(), ks, strict=True)
        ]
        return torch.stack(picked).unbind(1)


class Rolling(Memory):
    """A window of `slots` trajectories per rank over an endless shuffled stream of samples.

    The window is `reuse` chunks. A pass over it uses every slot once; then the next chunk of the
    stream replaces the oldest one. Its contents are a function of the step, so that a resumed run
    solves the same window again. Inputs are kept beside their states; if `augment`, they are random
    views, new in every chunk. seconds: time spent on solves so far.
    """

    def __init__(self, solve, *args, slots, reuse=REUSE, augment=False, workers=0, **options):
        if slots < reuse:
            raise UsageError(
                f"a rolling store needs room for {reuse} trajectories at least, the budget holds "
                f"{slots}: raise --cache_gb"
            )
        self.solver, self.reuse, self.augment, self.workers = solve, reuse, augment, workers
        self.at_once, self.seconds, self.stream = options["chunk"], 0.0, None
        self.live: list[int | None] = [None] * reuse
        super().__init__(solve, *args, **(options | {"chunk": slots // reuse}))

    def solve_all(self, solve: Solve) -> None:
        self.x = self.y = self.z = None  # allocated when the first chunk shows the shapes

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        slots = self.reuse * self.chunk
        rows, passed = positions(slots, step * self.local, self.local, self.seed + self.rank)
        for number in range(passed, passed + self.reuse):
            if self.live[number % self.reuse] != number:
                self.replace(number)
        return self.x[rows], self.y[rows], rows

    def keys(self, number: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Rows and seeds of this rank's chunks `number`, number + 1, ... of the stream."""
        count = self.chunk * self.world
        for first in itertools.count(number * count, count):
            rows, _ = positions(len(self.split), first, count, self.seed)
            seeds = self.seed * 10**9 + first + torch.arange(count)
            share = slice(self.rank, None, self.world)
            yield rows[share], seeds[share] if self.augment else None

    def replace(self, number: int) -> None:
        """Solves chunk `number` into the place of the oldest one."""
        if self.stream is None or self.next != number:
            self.stream = self.split.stream(self.keys(number), self.workers)
        x, y = next(self.stream)
        self.next, start = number + 1, time.perf_counter()
        parts = x.split(self.at_once)
        z = [self.solver(part).transpose(0, 1).to("cpu", self.dtype) for part in parts]
        self.seconds += time.perf_counter() - start
        if self.z is None:
            slots = self.reuse * self.chunk
            self.x, self.y, self.z = (v.new_empty(slots, *v.shape[1:]) for v in (x, y, z[0]))
        place = slice(number % self.reuse * self.chunk, (number % self.reuse + 1) * self.chunk)
        self.x[place], self.y[place], self.z[place] = x, y, torch.cat(z)
        self.live[number % self.reuse] = number


def _many() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1
