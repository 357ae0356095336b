r"""Explicit networks: the finite-depth references of Tables 2 and 3, from well-kept libraries.

Images: torchvision's networks, and timm's HRNet-W18 if timm is installed, trained here or with the
library's own ImageNet weights. Neither library has Inception-V2; googlenet, its first version, is
the nearest.
Graphs: PyG's layers. Text: the layer of models/transformer.py, stacked with weights of its own in
each, and a TCN (Bai et al., 2018), both between the same embedding and softmax as the DEQ's.

GCN (Kipf & Welling, 2017), GAT (Velickovic et al., 2018) and GCNII (Chen et al., 2020) are trained
by OGB's protocol: full graph, batch normalisation, dropout .5. What is kept is the end of a cosine
schedule, not the epoch that validated best. GPM (Wang et al., 2025) is missing: its pattern
tokeniser and its sequence model over random walks are in no library.

Shapes of graphs as in ignn.py: x (1, N, p) -> logits (1, N, classes).
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import UsageError
from models import labels
from models.adaptive import AdaptiveEmbedding, AdaptiveSoftmax
from models.ignn import Graph
from models.transformer import PRESETS, Context, TransformerCell


class Reference(nn.Module):
    """The base of every explicit network, which has nll(x, y): an input is a single segment."""

    def segments(self, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        yield x, y


class Vision(Reference):
    """A network of torchvision or timm: x (B, colors, H, W) -> logits (B, classes)."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def nll(self, x: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy, nats: (B,) fp32."""
        return F.cross_entropy(self(x).float(), y, reduction="none")


TIMM = ("hrnet_w18",)  # what torchvision lacks


def vision(name: str, settings: dict, classes: int) -> Vision:
    """The library's network of this name; NAME-pretrained has its ImageNet weights."""
    base, pretrained = name.removesuffix("-pretrained"), name.endswith("-pretrained")
    if pretrained and classes != 1000:
        raise UsageError(f"{name}: its weights have 1000 classes, not {classes}")
    try:
        return Vision((from_timm if base in TIMM else from_torchvision)(base, pretrained, classes))
    except OSError as error:
        raise UsageError(f"explicit-{name} cannot be downloaded ({error})") from error


def from_timm(name: str, pretrained: bool, classes: int) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise UsageError(
            f'explicit-{name} needs timm, which is not installed: pip install ".[references]"'
        ) from error
    return timm.create_model(name, pretrained=pretrained, num_classes=classes)


def from_torchvision(name: str, pretrained: bool, classes: int) -> nn.Module:
    from torchvision.models import get_model

    options = dict(weights="DEFAULT") if pretrained else dict(num_classes=classes)
    if not pretrained and name in ("googlenet", "inception_v3"):
        options |= dict(aux_logits=False, init_weights=True)
    try:
        return get_model(name, **options)
    except ValueError as error:
        raise UsageError(f"explicit-{name}: torchvision has no such network") from error


class Explicit(Reference):
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
    """A PyG layer that uses the sparse product of Graph: PyG's transposes A in every backward."""
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


class Language(Reference):
    """A causal network between adaptive embedding and softmax: words (B, L) -> nll (B,).

    It keeps no state: each segment is read together with the `memory` words before it.
    """

    def __init__(self, words: int, preset: dict, segment: int, memory: int):
        super().__init__()
        d, cutoffs = preset["d"], tuple(cut for cut in preset["cutoffs"] if cut < words)
        self.segment, self.memory = segment, memory
        self.embedding = AdaptiveEmbedding(words, d, cutoffs)
        self.softmax, self.drop = AdaptiveSoftmax(self.embedding), nn.Dropout(preset["dropout"])
        self.net = self.layers(d, preset)
        for module in (self.embedding, self.softmax):
            for weight in module.parameters():
                nn.init.normal_(weight, std=preset.get("std", 0.1))

    def layers(self, d: int, preset: dict) -> nn.Module:
        """The causal network, (B, L, d) -> (B, L, d)."""
        raise NotImplementedError

    def segments(self, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, x.shape[1], self.segment):
            begin, end = max(0, start - self.memory), start + self.segment
            answers = torch.cat([torch.full_like(y[:, begin:start], -1), y[:, start:end]], dim=1)
            yield x[:, begin:end], answers

    def nll(self, x: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy, nats: the mean over the labels >= 0 of each sample, (B,) fp32."""
        z, labelled = self.drop(self.net(self.drop(self.embedding(x)))), y >= 0
        losses = self.softmax.nll(z[labelled], y[labelled])
        total = losses.new_zeros(len(y)).index_add(0, labelled.nonzero()[:, 0], losses)
        return total / labels(y).clamp(min=1)


class TransformerXL(Language):
    class Layer(TransformerCell):
        def forward(self, z: Tensor) -> Tensor:
            for drop in self.drops:
                drop.mask = None
            context = Context(z.new_zeros(1, 1, 1), z.new_zeros(len(z), 0, z.shape[2]))
            return super().forward(z, context)[0]

    def layers(self, d: int, preset: dict, depth: int = 4) -> nn.Module:
        options = preset["heads"], preset["inner"], preset["dropout"]
        net = nn.Sequential(*(self.Layer(d, *options) for _ in range(depth)))
        for name, weight in net.named_parameters():
            if not name.endswith("bias"):
                nn.init.normal_(weight, std=preset.get("std", 0.1))
        return net


class TCN(Language):
    """Two dilated causal convolutions a block, kernel 3, dilations 1, 2, 4, ..."""

    class Block(nn.Module):
        def __init__(self, d: int, dilation: int, dropout: float):
            super().__init__()
            convs = (nn.Conv1d(d, d, 3, dilation=dilation) for _ in range(2))
            self.convs = nn.ModuleList(map(nn.utils.parametrizations.weight_norm, convs))
            self.dilation, self.drop = dilation, nn.Dropout(dropout)

        def forward(self, x: Tensor) -> Tensor:
            y = x.mT  # (B, d, L)
            for conv in self.convs:
                y = self.drop(conv(F.pad(y, (2 * self.dilation, 0))).relu())
            return (x + y.mT).relu()

    def layers(self, d: int, preset: dict, depth: int = 5) -> nn.Module:
        return nn.Sequential(*(self.Block(d, 2**i, preset["dropout"]) for i in range(depth)))


LANGUAGE = {"transformer-xl": TransformerXL, "tcn": TCN}


def language(name: str, settings: dict, words: int, segment: int, memory: int) -> Language:
    """The network of this name, as wide as the settings' preset."""
    if name not in LANGUAGE:
        allowed = " | ".join(f"explicit-{known}" for known in LANGUAGE)
        raise UsageError(f"explicit-{name}: allowed is {allowed}")
    return LANGUAGE[name](words, PRESETS[settings["preset"]], segment, memory)
