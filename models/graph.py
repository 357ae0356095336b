r"""A graph's normalised adjacency A as sparse rows, and products with it.

    norm "sym"   D^-1/2 (A + I) D^-1/2 of the edges in both directions
    norm "row"   D^-1 (A + I) of the same
    norm "into"  D^-1 (A + I) of the edges as they are, each from its source to its target

Each row belongs to a target, and D counts its entries. The Perron eigenvalue of each A is 1.

Shapes: z (N, d) or (B, N, d).
"""

import warnings

import numpy as np
import torch
from torch import Tensor


class Graph:
    """The normalised adjacency, shared by all networks and never copied.

    edge_index (2, E): sources and targets; loops and repetitions make no difference. `product`
    multiplies by A, and its gradient by A^T in the same sparse form.
    """

    def __init__(self, edge_index: Tensor, N: int, norm: str = "sym", dtype=torch.float32):
        loops = torch.arange(N)
        source, target = edge_index.long()
        keys = [target * N + source, loops * N + loops]
        if norm != "into":
            keys.append(source * N + target)
        keys = torch.cat(keys).unique()
        rows, columns = keys.div(N, rounding_mode="floor"), keys % N
        degree = torch.bincount(rows, minlength=N).to(dtype)
        self.N, self.norm, self.edges = N, norm, len(keys)

        def csr(rows: Tensor, columns: Tensor, values: Tensor) -> Tensor:
            counts = torch.bincount(rows, minlength=N)
            pointers = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            index = (pointers.int(), columns.int())  # int32 halves the bytes and is what MKL reads
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
                return torch.sparse_csr_tensor(*index, values, (N, N), check_invariants=False)

        if norm == "sym":
            A = csr(rows, columns, degree[rows].rsqrt() * degree[columns].rsqrt())
            pair = (A, A)
        else:
            values, order = 1 / degree[rows], (columns * N + rows).argsort()
            transposed = (part[order] for part in (columns, rows, values))
            pair = (csr(rows, columns, values), csr(*transposed))
        self._on, self._jumps = {torch.device("cpu"): pair}, {}

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

    def jumps(self, count: int) -> list["Graph"]:
        """`count` graphs whose edges join nodes exactly 1, 2, 4, .. hops apart, normalised alike.

        They are made once, by squaring: a node within 2 k hops is within k hops of one that is
        within k hops.
        """
        from scipy.sparse import csr_array, eye_array

        if count not in self._jumps:
            source, target = self.edge_index(torch.device("cpu")).numpy()
            within = csr_array(([True] * len(source), (target, source)), [self.N] * 2)
            nearer, found = eye_array(self.N, dtype=bool, format="csr"), []
            for _ in range(count):
                target, source = (within > nearer).nonzero()
                edges = torch.from_numpy(np.stack([source, target]))
                found.append(Graph(edges, self.N, self.norm))
                within, nearer = within @ within, within @ nearer
            self._jumps[count] = found
        return self._jumps[count]

    def product(self, z: Tensor) -> Tensor:
        """A z, for every graph of a batch: (N, d) or (B, N, d), the same shape."""
        A, A_t = self.matrices(z.device)
        return Product.apply(z.to(A.dtype), A, A_t)


class Product(torch.autograd.Function):
    """A z with the gradient A^T g: autograd would transpose the sparse matrix every time."""

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
