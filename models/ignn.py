r"""Implicit graph neural networks: IGNN, EIGNN and MIGNN, one state for a whole graph.

    IGNN   Z = ReLU(A Z W^T + u), |rows of W|_1 <= kappa            (Gu et al., 2020)
    EIGNN  Z = kappa A Z G + u, G = F^T F / |F^T F|_F                     (Liu et al., 2021)
    MIGNN  Z = ReLU(A Z W^T + u), |W|_2 < kappa, by the forward-backward step
           f(Z) = ReLU((1 - a) Z + a (A Z W^T + u))                      (Baker et al., 2023)

with u = A encoder(X), computed once per input. A is the graph with self-loops, normalised
symmetrically, D^-1/2 (A + I) D^-1/2, or by rows, D^-1 (A + I); its Perron eigenvalue is 1 either
way. In each network kappa < 1 makes f a contraction, so the equilibrium exists and is unique.

Shapes: z and u (1, N, d): the graph is one sample with one vector of Anderson weights; x (1, N, p).

The least that an evaluation costs: d numbers read per edge by the sparse product, and 2 N d^2 FLOPs
of the dense one, which also adds the injection; ReLU works in place. At z = 0 neither product is
needed, and without gradients neither is computed.

Departs from the references: the encoder is a small perceptron where IGNN has one matrix; EIGNN is
iterated, because its closed form needs the dense eigenvectors of A.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from models import Cell, Equilibrium
from models.graph import Graph

HOPS = 4  # of a start; each costs an eighth of the sparse product of f
PRESETS = {
    "ignn": dict(kind="ignn"),
    "ignn-row": dict(kind="ignn", norm="row"),
    "eignn": dict(kind="eignn"),
    "mignn": dict(kind="mignn"),
}


def project_rows(W: Tensor, radius: float) -> Tensor:
    """Euclidean projection of every row of W (h, d) onto the L1 ball (Duchi et al., 2008).

    Rows inside the ball stay; the others are soft-thresholded at the theta that puts them on it.
    """
    sizes = W.abs()
    sorted_, _ = sizes.sort(dim=1, descending=True)
    excess = sorted_.cumsum(1) - radius
    n = torch.arange(1, W.shape[1] + 1, device=W.device)
    last = (sorted_ * n > excess).sum(1, keepdim=True)  # entries that stay above theta
    last = last.clamp(min=1)  # 0 if a number is not finite, which the next loss will report
    theta = excess.gather(1, last - 1) / last
    inside = sizes.sum(1, keepdim=True) <= radius
    return torch.where(inside, W, W.sign() * (sizes - theta).clamp(min=0))


class Gram(nn.Module):
    """EIGNN's W = kappa F^T F / |F^T F|_F: symmetric, positive, spectral norm at most kappa."""

    def __init__(self, kappa: float):
        super().__init__()
        self.kappa = kappa

    def forward(self, F: Tensor) -> Tensor:
        G = F.T @ F
        return self.kappa * G / (torch.linalg.matrix_norm(G) + 1e-12)


class Cayley(nn.Module):
    """MIGNN's W = kappa sigmoid(size) (I - C)(I + C)^-1 D: orthogonal up to its norm below kappa.

    C is the skew part of the free matrix, D a fixed diagonal of signs, one in five negative.
    """

    def __init__(self, d: int, kappa: float):
        super().__init__()
        self.kappa, self.size = kappa, nn.Parameter(torch.tensor(2.0))
        self.register_buffer("D", torch.where(torch.arange(d) % 5 == 4, -1.0, 1.0))

    def forward(self, free: Tensor) -> Tensor:
        C, eye = free - free.T, torch.eye(len(free), dtype=free.dtype, device=free.device)
        orthogonal = torch.linalg.solve(eye + C, eye - C)
        return self.kappa * self.size.sigmoid() * orthogonal * self.D


class GraphStart(nn.Module):
    """A guess of z* from u: two linear maps of each node's injection, narrow in between, plus a
    multiple of each channel, which is cheap and keeps what the narrow maps lose.

    Between the maps there are jumps, sparse products of the few channels: the guess sees all nodes
    within the sum of their hops. The first map has no bias, so that a node about which nothing is
    known stays 0 and does not mask what the jumps bring. There is no nonlinearity: a ReLU on so few
    channels would lose a class for which all of them are negative.
    """

    def __init__(self, d: int, jumps: list[Graph]):
        super().__init__()
        width = max(4, d // 8)
        self.scale = nn.Parameter(torch.zeros(d))
        self.wide, self.out = nn.Linear(d, width, bias=False), nn.Linear(width, d)
        self.scales = nn.Parameter(torch.ones(len(jumps), width))
        self.jumps = jumps

    def forward(self, u: Tensor) -> list[Tensor]:
        y = self.wide(u)
        for jump, scale in zip(self.jumps, self.scales, strict=True):
            y = torch.addcmul(y, jump.product(y), scale)
        return [torch.addcmul(self.out(y), u, self.scale)]


class GraphCell(Cell):
    """f of IGNN, from which the others are derived: z (1, N, d), u (1, N, d).

    far: the number of jumps of its start, of 1, 2, 4, .. hops; such a start costs more than half
    of f. 0: HOPS jumps of one hop each.
    """

    def __init__(self, graph: Graph, d: int, kappa: float, far: int = 0):
        super().__init__()
        self.graph, self.kappa, self.channels, self.far = graph, kappa, (d,), far
        # Near a multiple of I, W propagates states from the first update on: depth counts at once.
        self.W = nn.Parameter(0.9 * torch.eye(d) + torch.randn(d, d) * 0.1 / d)
        self.project()

    @torch.no_grad()
    def project(self) -> None:
        if not parametrize.is_parametrized(self):  # a parametrisation bounds the norm by itself
            self.W.copy_(project_rows(self.W, self.kappa))

    def start(self) -> GraphStart:
        jumps = self.graph.jumps(self.far) if self.far else [self.graph] * HOPS
        return GraphStart(*self.channels, jumps)

    def linear(self, z: Tensor, u: Tensor) -> Tensor:
        """A z W^T + u."""
        # z_0 = 0 has nothing to propagate. On a GPU this check would make the host wait.
        if z.is_cpu and not torch.is_grad_enabled() and not z[:, 0].any() and not z.any():
            return u.clone()
        Az = self.graph.product(z)
        return torch.addmm(u.flatten(0, 1), Az.flatten(0, 1), self.W.T).view_as(z)

    def forward(self, z: Tensor, u: Tensor) -> list[Tensor]:
        return [self.linear(z, u).relu_()]


class LinearCell(GraphCell):
    """f of EIGNN: no nonlinearity."""

    def __init__(self, graph: Graph, d: int, kappa: float, **options):
        super().__init__(graph, d, kappa, **options)
        parametrize.register_parametrization(self, "W", Gram(kappa))

    def forward(self, z: Tensor, u: Tensor) -> list[Tensor]:
        return [self.linear(z, u)]


class MonotoneCell(GraphCell):
    """f of MIGNN: one forward-backward step of length a. std: of the free matrix's initial entries;
    with a small one, W starts near a diagonal matrix."""

    def __init__(
        self, graph: Graph, d: int, kappa: float, a: float = 0.9, std: float = 0.0, **options
    ):
        super().__init__(graph, d, kappa, **options)
        self.a = a
        nn.init.normal_(self.W, std=std or d**-0.5)
        parametrize.register_parametrization(self, "W", Cayley(d, kappa))

    def forward(self, z: Tensor, u: Tensor) -> list[Tensor]:
        return [torch.lerp(z, self.linear(z, u), self.a).relu_()]


CELLS = {
    "ignn": GraphCell,
    "eignn": LinearCell,
    "mignn": MonotoneCell,
}


class Direction(nn.Module):
    """Each node's state divided by its L1 norm: the squares of an L2 norm underflow for nodes far
    from all features. floor: the least divisor. It bounds the gradient at a state of zeros, and
    makes the loss ask for states that are larger."""

    def __init__(self, floor: float = 1e-6):
        super().__init__()
        self.floor = floor

    def forward(self, z: Tensor) -> Tensor:
        return F.normalize(z, p=1, dim=-1, eps=self.floor)


class Injection(nn.Module):
    """(1, N, p) -> u = A encoder(x), (1, N, d)."""

    def __init__(self, graph: Graph, encoder: nn.Module):
        super().__init__()
        self.graph, self.encoder = graph, encoder

    def forward(self, x: Tensor) -> Tensor:
        return self.graph.product(self.encoder(x.flatten(0, 1)).unflatten(0, x.shape[:2]))


class IGNN(Equilibrium):
    """Encoder, one of the cells above, and a linear head for node classification.

    features, classes: sizes of x and of the logits. width: d. hidden: width of the encoder's hidden
    layer. dropout: in encoder and head, in training only. plain: the form of the references, with
    one matrix for the encoder and a head on the direction of each node's state; neither has a bias,
    so that a node without features gets its state from its neighbours alone. cell: options of the
    cell. Raises ValueError if kappa is outside (0, 1).
    """

    def __init__(
        self,
        graph: Graph,
        features: int,
        classes: int,
        kind: str = "ignn",
        width: int = 128,
        hidden: int = 256,
        kappa: float = 0.95,
        dropout: float = 0.5,
        plain: bool = False,
        cell: dict = {},  # noqa: B006 - never changed
    ):
        super().__init__()
        if not 0 < kappa < 1:
            raise ValueError(f"kappa must be in (0, 1), got {kappa}")
        self.cell = CELLS[kind](graph, width, kappa, **cell)
        encoder = nn.Linear(features, width, bias=False) if plain else nn.Sequential(
            *(nn.Dropout(dropout), nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.ReLU()),
            *(nn.Dropout(dropout), nn.Linear(hidden, width)),
        )  # fmt: skip
        self.injection = Injection(graph, encoder)
        scale = Direction() if plain else nn.BatchNorm1d(width)
        self.readout = nn.Sequential(
            scale, nn.Dropout(dropout), nn.Linear(width, classes, bias=not plain)
        )

    def initial(self, u: Tensor) -> Tensor:
        return torch.zeros_like(u)

    def head(self, z: Tensor) -> Tensor:
        """(1, N, d) -> logits (1, N, classes)."""
        return self.readout(z.flatten(0, 1)).unflatten(0, z.shape[:2])

    def nll(self, z: Tensor, y: Tensor) -> Tensor:
        # All graphs of a batch are the same one: the head is computed on its labelled nodes only.
        known = y[0] >= 0
        return super().nll(z[:, known], y[:, known])

    def project(self) -> None:
        self.cell.project()
