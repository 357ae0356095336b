r"""Learned solvers: HyperDEQ (Bai, Koltun & Kolter, 2022) and IGNN-Solver (Lin et al., 2024).

Re-implementations, since neither has public code that runs. Both are Anderson acceleration with
learned weights in place of the least squares and a learned start in place of z_0 = 0:

    z_0 = initialiser(u)
    z_{k+1} = beta sum_i a_i f(z_i) + (1 - beta) sum_i a_i z_i, the last m states i
    a, beta = networks of the residuals f(z_i) - z_i, each compressed to 20 numbers; sum_i a_i = 1

f is the teacher's, frozen; no labels are used. The initialiser is a small convolution (images,
sequences: a causal one) or two linear maps with hops between them (graphs). IGNN-Solver's
compression is a graph network.

Shapes: z (B, state...); its leading sample_dims dimensions index P problems, each with its own a
and beta, as in anderson.py. NFE counts f. The start costs at most a quarter of f's FLOPs, half on
graphs (tested), the networks of a step less; their time is in every table.

Departs from the paper: a_i and beta start as Picard's (the newest state, 1), not at random.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anderson import Map, accumulator, iterate
from models import Equilibrium
from models.ignn import GraphCell

WIDTH = 20  # numbers that a residual is compressed to


class LearnedSolver(nn.Module):
    """A learned start and learned weights for one teacher. graph_net: residuals are propagated over
    the graph before they are compressed (IGNN-Solver); ValueError if the teacher has no graph."""

    def __init__(self, net: Equilibrium, m: int = 6, graph_net: bool = False):
        super().__init__()
        cell = net.cell
        if graph_net and not isinstance(cell, GraphCell):
            raise ValueError("ignn-solver needs a network of a graph")
        self.teacher = (net,)  # in a tuple: no part of this module
        self.m, self.graph_net = m, graph_net
        self.start = cell.start()
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
        """A residual (B, state...) as 20 numbers per problem, (P, 20), the mean over positions."""
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
        """A function step(z) -> (z_next, f(z), residual mixed by a) that keeps m states."""
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
