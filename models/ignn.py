r"""Implicit graph neural networks: IGNN, EIGNN and MIGNN, one state for a whole graph.

    IGNN   Z = ReLU(A Z W^T + u), |rows of W|_1 <= kappa            (Gu et al., 2020)
    EIGNN  Z = kappa A Z G + u, G = F^T F / |F^T F|_F                     (Liu et al., 2021)
    MIGNN  Z = ReLU(A Z W^T + u), |W|_2 < kappa, by the forward-backward step
           f(Z) = ReLU((1 - a) Z + a (A Z W^T + u))                      (Baker et al., 2023)

with u = A encoder(X), computed once per input. A is the graph with self-loops, normalised
symmetrically, D^-1/2 (A + I) D^-1/2, or by rows, D^-1 (A + I); its Perron eigenvalue is 1 either
way. In each network kappa < 1 makes f a contraction, so the equilibrium exists and is unique.

Shapes: z and u (1, N, d): the graph is one sample with one vector of Anderson weights; x (1, N, p).

Floor of one evaluation: the sparse product reads d numbers per edge, the dense one makes 2 N d^2
FLOPs; the injection rides on the latter and ReLU works in place. At z = 0 neither is needed, and
without gradients neither is computed.

Departs from the references: the encoder is a small perceptron where IGNN has one matrix; EIGNN is
iterated, for its closed form needs the dense eigenvectors of A.
"""

import warnings

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from models import Cell, Equilibrium

PRESETS = {
    "ignn": dict(kind="ignn"),
    "ignn-row": dict(kind="ignn", norm="row"),
    "eignn": dict(kind="eignn"),
    "mignn": dict(kind="mignn"),
}


class Graph:
    """The normalised adjacency of an undirected graph as sparse rows, shared and never copied.

    edge_index (2, E): both directions of every edge are made; loops and repetitions do not matter.
    norm: "sym" or "row". Products with A go through `product`, whose gradient is a product with
    A^T in the same sparse form.
    """

    def __init__(self, edge_index: Tensor, N: int, norm: str = "sym", dtype=torch.float32):
        loops = torch.arange(N)
        source, target = edge_index.long()
        keys = torch.cat([target * N + source, source * N + target, loops * N + loops]).unique()
        rows, columns = keys.div(N, rounding_mode="floor"), keys % N
        counts = torch.bincount(rows, minlength=N)
        degree = counts.to(dtype)
        pointers = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        self.N, self.norm, self.edges = N, norm, len(keys)

        def csr(values: Tensor) -> Tensor:
            index = (pointers.int(), columns.int())  # int32 halves the bytes and is what MKL reads
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
                return torch.sparse_csr_tensor(*index, values, (N, N), check_invariants=False)

        if norm == "sym":
            A = csr(degree[rows].rsqrt() * degree[columns].rsqrt())
            pair = (A, A)
        else:
            pair = (csr(1 / degree[rows]), csr(1 / degree[columns]))  # the pattern is symmetric
        self._on = {torch.device("cpu"): pair}

    def __deepcopy__(self, memo) -> "Graph":
        return self

    def matrices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """A and A^T on a device, moved there once."""
        if device not in self._on:
            self._on[device] = tuple(M.to(device) for M in self._on[torch.device("cpu")])
        return self._on[device]

    def edge_index(self, device: torch.device) -> Tensor:
        """(source, target) of every edge, self-loops included: (2, E)."""
        A, _ = self.matrices(device)
        target = torch.repeat_interleave(A.crow_indices().diff())
        return torch.stack([A.col_indices(), target]).long()

    def product(self, z: Tensor) -> Tensor:
        """A z, for every graph of a batch: (N, d) or (B, N, d), the same shape."""
        A, A_t = self.matrices(z.device)
        return Product.apply(z.to(A.dtype), A, A_t)


class Product(torch.autograd.Function):
    """A z with the gradient A^T g: autograd alone would transpose the sparse matrix every time."""

    @staticmethod
    def forward(ctx, z: Tensor, A: Tensor, A_t: Tensor) -> Tensor:
        ctx.pair = A, A_t
        return _each(A, z)

    @staticmethod
    def backward(ctx, g: Tensor):
        A, A_t = ctx.pair
        return Product.apply(g.contiguous(), A_t, A), None, None


def _each(A: Tensor, z: Tensor) -> Tensor:
    if z.dim() == 2:
        return A @ z
    return (A @ z[0])[None] if len(z) == 1 else torch.stack([A @ v for v in z])


def project_rows(W: Tensor, radius: float) -> Tensor:
    """Euclidean projection of every row of W (h, d) onto the L1 ball (Duchi et al., 2008).

    Rows inside the ball stay; the others are soft-thresholded at the theta that puts them on it.
    """
    sizes = W.abs()
    sorted_, _ = sizes.sort(dim=1, descending=True)
    excess = sorted_.cumsum(1) - radius
    n = torch.arange(1, W.shape[1] + 1, device=W.device)
    last = (sorted_ * n > excess).sum(1, keepdim=True)  # entries that stay above theta
    last = last.clamp(min=1)  # 0 of numbers that are not finite: the next loss says so
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
    """A guess of z* from u: two narrow linear maps of each node's injection, beside a multiple of
    each of its channels, which costs nothing and carries what the narrow ones cannot."""

    def __init__(self, d: int):
        super().__init__()
        width = max(4, d // 8)
        self.scale = nn.Parameter(torch.zeros(d))
        self.wide, self.out = nn.Linear(d, width), nn.Linear(width, d)

    def forward(self, u: Tensor) -> list[Tensor]:
        return [torch.addcmul(self.out(self.wide(u).relu()), u, self.scale)]


class GraphCell(Cell):
    """f of IGNN, in the form that the others change: z (1, N, d), u (1, N, d)."""

    def __init__(self, graph: Graph, d: int, kappa: float):
        super().__init__()
        self.graph, self.kappa, self.channels = graph, kappa, (d,)
        # Near a multiple of I: propagation itself, so that depth counts from the first update.
        self.W = nn.Parameter(0.9 * torch.eye(d) + torch.randn(d, d) * 0.1 / d)
        self.project()

    @torch.no_grad()
    def project(self) -> None:
        if not parametrize.is_parametrized(self):  # which keeps the norm below kappa by itself
            self.W.copy_(project_rows(self.W, self.kappa))

    def start(self) -> GraphStart:
        return GraphStart(*self.channels)

    def linear(self, z: Tensor, u: Tensor) -> Tensor:
        """A z W^T + u."""
        # z_0 = 0 has nothing to propagate. The question would make the host wait for a GPU.
        if z.is_cpu and not torch.is_grad_enabled() and not z[:, 0].any() and not z.any():
            return u.clone()
        Az = self.graph.product(z)
        return torch.addmm(u.flatten(0, 1), Az.flatten(0, 1), self.W.T).view_as(z)

    def forward(self, z: Tensor, u: Tensor) -> list[Tensor]:
        return [self.linear(z, u).relu_()]


class LinearCell(GraphCell):
    """f of EIGNN: no nonlinearity."""

    def __init__(self, graph: Graph, d: int, kappa: float):
        super().__init__(graph, d, kappa)
        parametrize.register_parametrization(self, "W", Gram(kappa))

    def forward(self, z: Tensor, u: Tensor) -> list[Tensor]:
        return [self.linear(z, u)]


class MonotoneCell(GraphCell):
    """f of MIGNN: one forward-backward step of length a."""

    def __init__(self, graph: Graph, d: int, kappa: float, a: float = 0.9):
        super().__init__(graph, d, kappa)
        self.a = a
        nn.init.normal_(self.W, std=d**-0.5)
        parametrize.register_parametrization(self, "W", Cayley(d, kappa))

    def forward(self, z: Tensor, u: Tensor) -> list[Tensor]:
        return [torch.lerp(z, self.linear(z, u), self.a).relu_()]


CELLS = {
    "ignn": GraphCell,
    "eignn": LinearCell,
    "mignn": MonotoneCell,
}


class Injection(nn.Module):
    """(1, N, p) -> u = A encoder(x), (1, N, d)."""

    def __init__(self, graph: Graph, p: int, hidden: int, d: int, dropout: float):
        super().__init__()
        self.graph = graph
        self.encoder = nn.Sequential(
            *(nn.Dropout(dropout), nn.Linear(p, hidden), nn.BatchNorm1d(hidden), nn.ReLU()),
            *(nn.Dropout(dropout), nn.Linear(hidden, d)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.graph.product(self.encoder(x.flatten(0, 1)).unflatten(0, x.shape[:2]))


class IGNN(Equilibrium):
    """Encoder, one of the cells above, and a linear head for node classification.

    features, classes: sizes of x and of the logits. width: d. hidden: width of the encoder's one
    hidden layer. dropout: in encoder and head, in training only.
    Raises ValueError where kappa is outside (0, 1).
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
    ):
        super().__init__()
        if not 0 < kappa < 1:
            raise ValueError(f"kappa must be in (0, 1), got {kappa}")
        self.cell = CELLS[kind](graph, width, kappa)
        self.injection = Injection(graph, features, hidden, width, dropout)
        self.readout = nn.Sequential(
            nn.BatchNorm1d(width), nn.Dropout(dropout), nn.Linear(width, classes)
        )

    def initial(self, u: Tensor) -> Tensor:
        return torch.zeros_like(u)

    def head(self, z: Tensor) -> Tensor:
        """(1, N, d) -> logits (1, N, classes)."""
        return self.readout(z.flatten(0, 1)).unflatten(0, z.shape[:2])

    def nll(self, z: Tensor, y: Tensor) -> Tensor:
        # All graphs of a batch are the same one, so the head need only see its labelled nodes.
        known = y[0] >= 0
        return super().nll(z[:, known], y[:, known])

    def project(self) -> None:
        self.cell.project()
