"""Word vectors and a softmax whose size follows the frequency of words.

Words are numbered by falling frequency and cut into clusters. Rarer clusters have narrower vectors
(Baevski & Auli, 2019), and the softmax scores a rare word only after its cluster (Grave et al.,
2017). Embedding and softmax share the vectors.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AdaptiveEmbedding(nn.Module):
    """Word vectors (Baevski & Auli, 2019): rarer words have narrower ones, projected to width d.

    words 0 .. n - 1 by falling frequency; cutoffs: where the next cluster begins, each `div` times
    narrower than the one before.
    """

    def __init__(self, n: int, d: int, cutoffs: tuple[int, ...], div: int = 4):
        super().__init__()
        self.bounds = list(pairwise((0, *cutoffs, n)))
        sizes = [(end - start, max(1, d // div**i)) for i, (start, end) in enumerate(self.bounds)]
        self.words = nn.ModuleList(nn.Embedding(count, width) for count, width in sizes)
        self.projections = nn.ModuleList(nn.Linear(width, d, bias=False) for _, width in sizes)

    def forward(self, x: Tensor) -> Tensor:
        """Words (...) to vectors (..., d), scaled by sqrt(d)."""
        d = self.projections[0].out_features
        vectors = self.words[0].weight.new_zeros(x.numel(), d)
        places = members(cluster_of(x.flatten(), self.bounds), len(self.bounds))
        parts = zip(self.bounds, self.words, self.projections, places, strict=True)
        for (start, _), words, project, here in parts:
            found = project(words(x.flatten()[here] - start)).to(vectors.dtype)
            vectors = vectors.index_copy(0, here, found)
        return vectors.view(*x.shape, d) * d**0.5


def cluster_of(x: Tensor, bounds: list[tuple[int, int]]) -> Tensor:
    """The cluster of each word, x (N,): (N,)."""
    return sum(((x >= start).long() for start, _ in bounds[1:]), torch.zeros_like(x))


def members(cluster: Tensor, n: int) -> list[Tensor]:
    """The positions of the words of each cluster 0 .. n - 1. With more than one cluster the host
    waits for the device, because the number of words in each is a tensor's size."""
    if n == 1:
        return [torch.arange(len(cluster), device=cluster.device)]
    counts = torch.stack([(cluster == i).sum() for i in range(n)]).tolist()
    return list(cluster.argsort(stable=True).split(counts))


class AdaptiveSoftmax(nn.Module):
    """Grave et al., 2017, over the embedding's own word vectors (tied).

    The head scores the frequent words and one entry per tail cluster. As in the reference, the
    *last* entry is that of the first tail cluster.
    """

    def __init__(self, embedding: AdaptiveEmbedding):
        super().__init__()
        self.bounds, self.words = embedding.bounds, embedding.words
        d, tails = embedding.projections[0].out_features, len(self.bounds) - 1
        self.biases = nn.ParameterList(torch.zeros(end - start) for start, end in self.bounds)
        self.projections = nn.ModuleList(
            nn.Linear(words.embedding_dim, d, bias=False) for words in self.words
        )
        self.cluster = nn.Linear(d, tails) if tails else None

    def logits(self, z: Tensor, i: int) -> Tensor:
        """Logits of the words of cluster i; for i = 0, also of the tail clusters; z (N, d)."""
        W, b = self.words[i].weight, self.biases[i]
        if i == 0 and self.cluster is not None:
            W, b = torch.cat([W, self.cluster.weight]), torch.cat([b, self.cluster.bias])
        return F.linear(z @ self.projections[i].weight, W, b).float()

    def nll(self, z: Tensor, y: Tensor) -> Tensor:
        """-log p(y | z), nats, fp32, in token order: z (N, d), y (N,) -> (N,)."""
        rare = cluster_of(y, self.bounds)
        entry = torch.where(rare == 0, y, self.bounds[0][1] + len(self.bounds) - 1 - rare)
        losses = F.cross_entropy(self.logits(z, 0), entry, reduction="none")
        places = members(rare, len(self.bounds))
        for i, here in enumerate(places[1:], 1):
            rest = y[here] - self.bounds[i][0]
            tail = F.cross_entropy(self.logits(z[here], i), rest, reduction="none")
            losses = losses.index_add(0, here, tail)
        return losses

    def log_probabilities(self, z: Tensor) -> Tensor:
        """Log-probabilities of all words: z (..., d) -> (..., n)."""
        head = F.log_softmax(self.logits(z, 0), dim=-1)
        parts = [head[..., : self.bounds[0][1]]]
        for i in range(1, len(self.bounds)):
            parts.append(head[..., -i, None] + F.log_softmax(self.logits(z, i), dim=-1))
        return torch.cat(parts, dim=-1)
