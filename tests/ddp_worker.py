"""Run by torchrun: the losses' gradients on shards of a batch against one process's on all of it,
and an evaluation against one process's. Prints the largest differences on rank 0."""

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import compare
import infer
import runs
from fpode import TimeMap
from losses import Distillation, TeacherLoss
from models.mdeq import MDEQ
from models.transformer import DEQTransformer
from student import Student
from tasks import Split


def gradients(module, network, batch) -> torch.Tensor:
    network.zero_grad()
    sum(module(*batch).values()).backward()
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def gap(module, network, batch) -> float:
    """Largest difference between the gradient of all and the averaged gradients of the shards."""
    rank, world = dist.get_rank(), dist.get_world_size()

    def shard(v):
        if isinstance(v, tuple):
            return tuple(shard(z) for z in v)
        if not isinstance(v, torch.Tensor):
            return v
        return v[len(v) // world * rank : len(v) // world * (rank + 1)]

    whole = gradients(module, network, batch)
    shares = tuple(shard(v) if i < 6 else v for i, v in enumerate(batch))
    parts = gradients(DistributedDataParallel(module), network, shares)
    return ((whole - parts).abs().max() / whole.abs().max()).item()


def text_gaps() -> tuple[float, float]:
    """Those of a language model's student, half of each window being memory, and teacher."""
    torch.manual_seed(0)
    net = DEQTransformer(40, 16, 2, 24, (20,), segment=5, memory=5)
    student = Student(net, TimeMap(rho=0.3, K=6))
    frozen = copy.deepcopy(net).requires_grad_(False)
    module = Distillation(frozen, student, copy.deepcopy(student).requires_grad_(False))
    x, y = torch.randint(40, (2, 8, 10))
    k, states = torch.arange(8) % 6, tuple(torch.randn(5, 8, 10, 16))
    times = student.times.schedule(3, 0.8)
    batch = (x, y, k, k + 1, states, torch.ones(8), times, 5, True)
    probe = torch.randn(8, 10, 16)
    return gap(module, student, batch), gap(TeacherLoss(net), net, (x, y, 2, 2, probe))


def main(folder: str) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    net = MDEQ((1, 8, 8), 10, channels=(8, 8), head=(4, 4), final=16)
    student = Student(net, TimeMap(rho=0.3, K=6), start=True)
    x, y = torch.randn(8, 1, 8, 8), torch.arange(8)
    z = torch.randn(7, 8, sum(net.cell.sizes))
    k = torch.tensor([0, 1, 2, 3, 4, 5, 0, 0])
    states = tuple(z[i] for i in (0, 1, 1, 2, 6))
    times = student.times.schedule(3, 0.8)
    frozen = copy.deepcopy(net).requires_grad_(False)
    ema = copy.deepcopy(student).requires_grad_(False)
    distillation = Distillation(frozen, student, ema)
    batch = (x, y, k, k + 1, states, torch.ones(8), times)
    teacher = TeacherLoss(net)
    gaps = (
        gap(distillation, student, batch),
        gap(teacher, net, (x, y, 2, 2, torch.randn_like(z[0]))),
    )
    gaps += text_gaps()
    run = infer.open_run(Path(folder), device="cpu")
    odd = Split(run.task.test.x[:101], run.task.test.y[:101])  # 101 samples: no even split
    # One by one: batches of other sizes round otherwise.
    row = infer.evaluate(run, compare.methods(run), odd, (2,), batch=1)["cdeq"][0]
    if dist.get_rank() == 0:
        print("GAPS", *gaps, "VALUE", row["value"], row["distance"], flush=True)
    runs.leave()


if __name__ == "__main__":
    main(sys.argv[1])
