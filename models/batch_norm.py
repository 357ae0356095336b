"""Batch normalisation on several processes: statistics of all their samples together.

nn.SyncBatchNorm works on GPUs only. This module does the same on a CPU, so that a batch gives the
same update on any number of processes.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def synchronise(module: nn.Module, device: torch.device) -> None:
    """Makes every BatchNorm of module use the samples of all processes, equally many on each."""
    if device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(module)
        return
    for part in module.modules():
        if isinstance(part, _BatchNorm):
            part.forward = partial(normalise, part)


def normalise(norm: _BatchNorm, x: Tensor) -> Tensor:
    """norm(x), where x (B, C, ...) is this process's share of a batch."""
    if not norm.training:
        return type(norm).forward(norm, x)
    dims = [d for d in range(x.dim()) if d != 1]
    shape = [1, -1, *[1] * (x.dim() - 2)]
    world, v = dist.get_world_size(), x.to(norm.running_mean.dtype)
    n = v.numel() // v.shape[1] * world
    mean = Sum.apply(v.mean(dims)) / world
    centred = v - mean.view(shape)
    var = Sum.apply(centred.square().mean(dims)) / world
    with torch.no_grad():
        norm.num_batches_tracked += 1
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(var * n / (n - 1), norm.momentum)
    y = centred * (var + norm.eps).rsqrt().view(shape)
    if norm.affine:
        y = y * norm.weight.view(shape) + norm.bias.view(shape)
    return y.to(x.dtype)


class Sum(torch.autograd.Function):
    """The sum over all processes, of a tensor and of its gradients."""

    @staticmethod
    def forward(ctx, v: Tensor) -> Tensor:
        total = v.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return Sum.forward(ctx, gradient)
