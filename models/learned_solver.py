r"""Learned solvers: HyperDEQ (Bai, Koltun & Kolter, 2022) and IGNN-Solver (Lin et al., 2024).

Re-implementations: neither has public code that runs. Both are Anderson acceleration with learned
weights in place of the least squares, and with a learned start in place of z_0 = 0:

    z_0 = initialiser(u)
    z_{k+1} = beta sum_i a_i f(z_i) + (1 - beta) sum_i a_i z_i, the last m states i
    a, beta = networks of the residuals f(z_i) - z_i, each compressed to 20 numbers; sum_i a_i = 1

f is the teacher's, frozen; no labels are used. The initialiser is a small convolution (images,
sequences: a causal one) or two linear maps (graphs). IGNN-Solver's compression is a graph network.

Shapes: z (B, state...), P problems of sample_dims leading dimensions, each with a and beta of its
own, as in anderson.py. NFE counts f, and the start where that is f-sized (`start_share`); a step's
own networks are a fraction of f, and their time is in every table.

Departs from the paper: a_i and beta start as Picard's (the newest state, 1), not at random.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from anderson import Map, accumulator, iterate
from models import Cell, Equilibrium
from models.ignn import GraphCell
from models.mdeq import MDEQCell, conv
from models.transformer import Context, TransformerCell

WIDTH = 20  # numbers that a residual is compressed to


class ImageStart(nn.Module):
    """Branch 0 from u; each lower branch from the one above, halved."""

    def __init__(self, channels: tuple[int, ...]):
        super().__init__()
        C = channels[0]
        self.first = nn.Sequential(conv(C, C, 3), nn.GroupNorm(4, C), nn.ReLU())
        pairs = pairwise(channels)
        self.lower = nn.ModuleList(nn.Sequential(conv(a, b, 3, 2), nn.ReLU()) for a, b in pairs)
        self.out = nn.ModuleList(conv(C, C, 1, bias=True) for C in channels)

    def forward(self, u: Tensor) -> list[Tensor]:
        maps = [self.first(u)]
        for lower in self.lower:
            maps.append(lower(maps[-1]))
        return [out(v).permute(0, 2, 3, 1) for out, v in zip(self.out, maps, strict=True)]


class TextStart(nn.Module):
    """A causal convolution over the injection of three positions."""

    def __init__(self, d: int, width: int = 200):
        super().__init__()
        self.wide, self.out = nn.Conv1d(3 * d, width, 3), nn.Conv1d(width, d, 1)

    def forward(self, u: Context) -> list[Tensor]:
        M = u.states.shape[1]
        before = F.pad(u.u.mT, (2, 0))[..., M:]  # the last two of the memory, or zeros
        return [self.out(self.wide(before).relu()).mT]


class GraphStart(nn.Module):
    """Two linear maps of each node's injection."""

    def __init__(self, d: int, width: int = 32):
        super().__init__()
        self.wide, self.out = nn.Linear(d, width), nn.Linear(width, d)

    def forward(self, u: Tensor) -> list[Tensor]:
        return [self.out(self.wide(u).relu())]


def start_for(cell: Cell) -> nn.Module:
    """The network u -> features of z_0 for this kind of cell; `out` are its last layers."""
    kinds = ((MDEQCell, ImageStart), (TransformerCell, TextStart), (GraphCell, GraphStart))
    start = next(start for kind, start in kinds if isinstance(cell, kind))
    return start(cell.channels if start is ImageStart else cell.channels[0])


@torch.no_grad()
def start_share(start: nn.Module, net: Equilibrium, u) -> float:
    """FLOPs of a start as a share of those of one evaluation of f."""
    flops = []
    for part in (lambda: start(u), lambda: net.f(net.initial(u), u)):
        with FlopCounterMode(display=False) as counter:
            part()
        flops.append(counter.get_total_flops())
    return flops[0] / max(1, flops[1])


class LearnedSolver(nn.Module):
    """The start and the weights for one teacher. graph_net: compress residuals by a propagation
    over the graph first (IGNN-Solver). Raises ValueError where the teacher has none."""

    def __init__(self, net: Equilibrium, m: int = 6, graph_net: bool = False):
        super().__init__()
        cell = net.cell
        if graph_net and not isinstance(cell, GraphCell):
            raise ValueError("ignn-solver needs a network of a graph")
        self.teacher = (net,)  # in a tuple: no part of this module
        self.m, self.graph_net = m, graph_net
        self.start = start_for(cell)
        self.compress = nn.ModuleList(nn.Linear(C, WIDTH) for C in cell.channels)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.over_window = nn.Sequential(
            *(nn.Conv1d(WIDTH, WIDTH, 5, padding=2), nn.GroupNorm(5, WIDTH), nn.ReLU()),
            nn.Conv1d(WIDTH, WIDTH, 5, padding=2),
        )
        self.alpha, self.beta = (
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1)) for _ in range(2)
        )
        for last in (self.alpha[-1], self.beta[-1]):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def initial(self, u) -> Tensor:
        return self.teacher[0].cell.join(self.start(u))

    def compressed(self, r: Tensor) -> Tensor:
        """A residual (B, state...) as (P, 20), the mean over its positions."""
        net = self.teacher[0]
        P, total = math.prod(r.shape[: net.sample_dims]), 0.0
        for v, compress in zip(net.features(r), self.compress, strict=True):
            v = net.cell.graph.product(v) if self.graph_net else v
            total = total + compress(v).relu().reshape(P, -1, WIDTH).mean(1)
        return self.mix(total)

    def weights(self, window: list[Tensor]) -> tuple[Tensor, Tensor]:
        """a (P, n) and beta (P,) from the n compressed residuals, the newest last."""
        x = torch.stack(window, dim=2)
        x = (x + self.over_window(x)).mT
        raw = self.alpha(x)[..., 0]
        raw = raw + F.one_hot(torch.tensor(len(window) - 1), len(window)).to(raw)
        alpha = raw + (1 - raw.sum(1, keepdim=True)) / len(window)
        return alpha, 1 + self.beta(x.mean(1))[:, 0]

    def stepper(self, f: Map):
        """step(z) -> (z_next, f(z), residual mixed by a), which keeps the last m states itself."""
        states, values, window = [], [], []

        def step(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            with torch.no_grad():
                f_z = f(z)
            for kept, new in ((states, z), (values, f_z), (window, self.compressed(f_z - z))):
                kept.append(new)
                del kept[: -self.m]
            alpha, beta = self.weights(window)
            window[:] = [c.detach() for c in window]
            shape = (*z.shape[: self.teacher[0].sample_dims], -1)
            alpha = alpha.view(*shape).movedim(-1, 0)
            spread = (*alpha.shape, *[1] * (z.dim() - alpha.dim() + 1))
            alpha = alpha.reshape(spread).to(z.dtype)
            old = sum(a * v for a, v in zip(alpha, states, strict=True))
            new = sum(a * v for a, v in zip(alpha, values, strict=True))
            beta = beta.view(spread[1:]).to(z.dtype)
            return torch.lerp(old, new, beta), f_z, new - old

        return step


def learned(
    f: Map, z0: Tensor, K: int, *, solver: LearnedSolver, sample_dims: int = 1, **options
) -> Tensor:
    """K steps from z0, exactly K evaluations of f; `options` and result as in anderson.iterate."""
    step = solver.stepper(f)

    def one(z: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        z_next, f_z, _ = step(z)
        gap = (f_z - z).flatten(sample_dims).flatten(0, -2)
        return z_next, f_z, torch.linalg.vector_norm(gap, dim=1, dtype=accumulator(z)).square()

    return iterate(one, z0, K, sample_dims=sample_dims, **options)
