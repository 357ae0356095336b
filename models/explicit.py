r"""Explicit networks: the finite-depth references of Table 3, from PyG's own layers.

GCN (Kipf & Welling, 2017), GAT (Velickovic et al., 2018) and GCNII (Chen et al., 2020), trained by
OGB's protocol: full graph, batch normalisation, dropout .5; but for the end of a cosine schedule,
not for the epoch that validated best.
GPM (Wang et al., 2025) is not here: its pattern tokeniser and sequence model over random walks are
a project of their own, and no layer library has them.

Shapes as in ignn.py: x (1, N, p) -> logits (1, N, classes).
"""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from models.ignn import Graph


class Explicit(nn.Module):
    """A stack of PyG convolutions with BatchNorm, ReLU and dropout between them.

    Its layers get the normalised adjacency of `graph`, self-loops included, as sparse rows.
    """

    def __init__(self, graph: Graph, dropout: float = 0.5):
        super().__init__()
        self.graph, self.dropout = graph, dropout

    def drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)

    def nll(self, x: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of the labelled nodes, nats: (1,)."""
        return F.cross_entropy(self(x)[0], y[0], ignore_index=-1)[None]


def sparse(layer: nn.Module, graph: Graph) -> nn.Module:
    """A PyG layer whose sparse product is Graph's: PyG's own transposes A in every backward."""
    layer.message_and_aggregate = lambda adj_t, x: graph.product(x)
    return layer


class GCN(Explicit):
    def __init__(self, graph: Graph, p: int, classes: int, d: int = 256, layers: int = 3):
        from torch_geometric.nn import GCNConv

        super().__init__(graph)
        sizes = [p] + [d] * (layers - 1) + [classes]
        self.convs = nn.ModuleList(
            sparse(GCNConv(a, b, normalize=False), graph) for a, b in pairwise(sizes)
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(d) for _ in range(layers - 1))

    def forward(self, x: Tensor) -> Tensor:
        A, _ = self.graph.matrices(x.device)
        h = self.drop(x[0])
        for conv, norm in zip(self.convs, self.norms, strict=False):
            h = self.drop(norm(conv(h, A)).relu())
        return self.convs[-1](h, A)[None]


class GCNII(Explicit):
    """Initial residual and identity mapping: deep without over-smoothing."""

    def __init__(self, graph: Graph, p: int, classes: int, d: int = 64, layers: int = 16):
        from torch_geometric.nn import GCN2Conv

        super().__init__(graph)
        self.first, self.last = nn.Linear(p, d), nn.Linear(d, classes)
        self.convs = nn.ModuleList(
            sparse(GCN2Conv(d, alpha=0.1, theta=0.5, layer=i, normalize=False), graph)
            for i in range(1, layers + 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        A, _ = self.graph.matrices(x.device)
        h = start = self.first(self.drop(x[0])).relu()
        for conv in self.convs:
            h = conv(self.drop(h), start, A).relu()
        return self.last(self.drop(h))[None]


class GAT(Explicit):
    """Attention over edges: needs memory for every edge, head and channel at once."""

    def __init__(self, graph: Graph, p: int, classes: int, d: int = 8, heads: int = 8):
        from torch_geometric.nn import GATConv

        super().__init__(graph, dropout=0.6)
        self.first = GATConv(p, d, heads, dropout=0.6, add_self_loops=False)
        self.last = GATConv(d * heads, classes, 1, dropout=0.6, add_self_loops=False)

    def forward(self, x: Tensor) -> Tensor:
        edges = self.graph.edge_index(x.device)
        h = F.elu(self.first(self.drop(x[0]), edges))
        return self.last(self.drop(h), edges)[None]


EXPLICIT = {"gcn": GCN, "gat": GAT, "gcnii": GCNII}
