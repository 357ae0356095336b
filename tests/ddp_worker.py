"""Compares several processes with one; run under torchrun by test_train.py.

The gradients of every loss on shards of a batch are averaged and compared with those of the whole
batch. Rank 0 prints the largest differences, then metric and distance of an evaluation by all.
"""

import copy
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
import torch.distributed as dist

import infer
import runs
from evidence.evaluate import evaluate
from evidence.methods import methods
from evidence.rivals import Rivals
from fpode import TimeMap
from losses import (
    Distillation,
    OwnRun,
    OwnRunBatch,
    TeacherBatch,
    TeacherLoss,
    TrajectoryBatch,
)
from models.mdeq import MDEQ
from models.transformer import DEQTransformer
from student import Student
from tasks import Split


def gradients(module, network, batch) -> torch.Tensor:
    network.zero_grad()
    sum(module(batch).values()).backward()
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def gap(module, network, batch, dtype="fp32") -> float:
    """Largest difference between the gradient of all and the averaged gradients of the shards,
    which travel in this number format."""
    rank, world = dist.get_rank(), dist.get_world_size()

    def shard(v):
        if isinstance(v, tuple):
            return tuple(map(shard, v))
        if not isinstance(v, torch.Tensor):
            return v
        return v[len(v) // world * rank : len(v) // world * (rank + 1)]

    whole = gradients(module, network, batch)
    own = type(batch)(**{key: shard(v) for key, v in vars(batch).items()})
    config = SimpleNamespace(dtype=dtype)
    job = SimpleNamespace(world=world, device=torch.device("cpu"), config=config)
    parts = gradients(runs.distributed(job, module), network, own)
    return ((whole - parts).abs().max() / whole.abs().max()).item()


def batch_norms() -> float:
    """The gap of a teacher with BatchNorm, or the difference of its running statistics if that is
    larger. In fp64: near its initial weights, the network amplifies rounding a thousandfold."""
    net = MDEQ((1, 8, 8), 10, channels=(8, 8), head=(4, 4), final=16, batch_norm=True).double()
    batch = TeacherBatch(torch.randn(8, 1, 8, 8).double(), torch.arange(8), 2, 2)
    twin = copy.deepcopy(net)
    found = gap(TeacherLoss(net), net, batch)  # updates them twice
    for _ in range(2):
        gradients(TeacherLoss(twin), twin, batch)
    pairs = zip(net.buffers(), twin.buffers(), strict=True)
    return max(found, *((a - b).abs().max().item() for a, b in pairs))


def gaps(net, x, y, past=()) -> list[float]:
    """The gaps of a teacher and of its students by both recipes. past: arguments for the memory."""
    plain, ours = (Student(net, TimeMap(rho=0.3, K=6), start=start) for start in (False, True))
    frozen = copy.deepcopy(net).requires_grad_(False)
    z_K = torch.randn_like(frozen.initial(frozen.inject(x)))
    states = (*torch.randn(3, *z_K.shape), z_K)
    paper = Distillation(frozen, plain, copy.deepcopy(plain).requires_grad_(False))
    k = torch.tensor([1, 2, 3, 4, 5, 6, 1, 1])
    return [
        gap(TeacherLoss(net), net, TeacherBatch(x, y, 2, 2, torch.randn_like(z_K))),
        gap(paper, plain, TrajectoryBatch(x, y, k, states, torch.ones(8), *past[:1])),
        gap(OwnRun(frozen, ours), ours, OwnRunBatch(x, z_K, ours.times.schedule(3, 0.8), *past)),
    ]


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    net = MDEQ((1, 8, 8), 10, channels=(8, 8), head=(4, 4), final=16)
    found = gaps(net, torch.randn(8, 1, 8, 8), torch.arange(8))
    net = DEQTransformer(40, 16, 2, 24, (20,), segment=5, memory=5)
    found += gaps(net, *torch.randint(40, (2, 8, 10)), (5, True))  # half of a window is memory
    found.append(batch_norms())
    half = gap(TeacherLoss(net), net, TeacherBatch(*torch.randint(40, (2, 8, 10)), 2, 2), "bf16")
    run = infer.open_run(Path(folder), device="cpu")
    odd = Split(run.task.test.x[:101], run.task.test.y[:101])  # 101 samples: no even split
    # One by one: batches of other sizes round otherwise.
    row = evaluate(run, methods(run, Rivals({}, {}, {})), odd, (2,), batch=1)["cdeq"][0]
    if dist.get_rank() == 0:
        print("GAPS", *found, half, "VALUE", row["value"], row["distance"], flush=True)
    runs.leave()


if __name__ == "__main__":
    main(sys.argv[1])
