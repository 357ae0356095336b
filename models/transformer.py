r"""The DEQ-Transformer (Bai et al., 2019): one Transformer-XL layer as f, over a segment of tokens.

Let c = [z_history; z] be the states of M + L positions and u their injection. One evaluation of f:

    q, k, v = W_qkv c + u                                    q of the segment's L positions alone
    a_ij = ((q_i + b_w) . k_j + (q_i + b_r) . r_{i+M-j}) / sqrt(d_head)           for j <= i + M
    y = LN(z + W_o softmax(a) v + b_o),   r_n = W_r (sinusoids of the distance n)
    f = LN(y + W_2 relu(W_1 y + b_1) + b_2)                                     LN without affine

With `pre_norm`, the first line has LN(c) in place of c, and the last one has no outer LN. u is a
linear map of each word's adaptive embedding; the head is an adaptive softmax over the same vectors.

Shapes: x, y (B, L) words; z (B, L, d). Each token is a problem of its own (sample_dims = 2): if a
whole sequence shared its Anderson weights, later words would change earlier predictions.

The `transformer-103` presets are those of locuslab/deq, tensor for tensor, and
models/published.py reads its checkpoints.

Departs from the reference: no dropout on attention weights (its configuration has 0).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from models import Cell, Equilibrium, VariationalDropout, labels
from models.adaptive import AdaptiveEmbedding, AdaptiveSoftmax

WT103 = dict(d=700, heads=10, inner=48_000, cutoffs=(20_000, 40_000, 200_000), std=0.01)
WINDOW = dict(d=64, heads=4, inner=256, cutoffs=(), reach=2)
PRESETS = {
    # These two have the same tensors: a file does not show which of them it was trained as.
    "transformer-103": WT103 | dict(dropout=0.05),
    "transformer-103-pre-ln": WT103 | dict(dropout=0.05, pre_norm=True),
    # For one GPU, and for a CPU.
    "transformer-small": dict(d=384, heads=6, inner=3072, cutoffs=(4_000, 20_000), dropout=0.1),
    "transformer-tiny": dict(d=128, heads=4, inner=512, cutoffs=(2_000, 10_000), dropout=0.1),
    # Attention to a word and the one before it, for tasks/permutations.py; and a far start.
    "transformer-window": WINDOW,
    "transformer-window-far": WINDOW | dict(far=5),
}


@dataclass(frozen=True)
class Context:
    """What f sees besides z: u (B, M + L, 3 d), the injections of history and segment; states
    (B, M, d) of the history."""

    u: Tensor
    states: Tensor

    def __getitem__(self, rows) -> "Context":
        return Context(self.u[rows], self.states[rows])


class TextStart(nn.Module):
    """A guess of z* from u: a causal convolution over three positions.

    far: then so many merges of each position with the one 1, 2, 4, .. before it, by one network for
    all of them, as a parallel scan does it. The guess sees 2^far + 2 positions of a segment.
    """

    def __init__(self, d: int, far: int = 0):
        super().__init__()
        width = d // 2 if far else d // 4
        self.wide, self.out, self.far = nn.Conv1d(3 * d, width, 3), nn.Conv1d(width, d, 1), far
        if far:
            first, second = nn.Conv1d(2 * width, 4 * width, 1), nn.Conv1d(4 * width, width, 1)
            self.merge = nn.Sequential(first, nn.ReLU(), second)

    def forward(self, u: Context) -> list[Tensor]:
        M = u.states.shape[1]
        before = F.pad(u.u.mT, (2, 0))[..., M:]  # the last two of the memory, or zeros
        y = self.wide(before).relu()
        for i in range(self.far):
            earlier = F.pad(y, (2**i, 0))[..., : y.shape[-1]]
            y = y + self.merge(torch.cat([y, earlier], dim=1))
        return [self.out(y).mT]


class TransformerCell(Cell):
    """f itself. reach: attention sees only words nearer than this; far: as of TextStart."""

    def __init__(
        self, d: int, heads: int, inner: int, dropout: float, pre_norm: bool = False,
        reach: int = 1000, far: int = 0,
    ):  # fmt: skip
        super().__init__()
        if d % heads or d % 2:
            raise ValueError(f"width {d} must be even and divisible by {heads} heads")
        self.channels, self.heads, self.pre_norm = (d,), heads, pre_norm
        self.reach, self.far = reach, far
        self.qkv, self.r = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)
        self.out, self.wide, self.narrow = nn.Linear(d, d), nn.Linear(d, inner), nn.Linear(inner, d)
        self.b_w, self.b_r = (nn.Parameter(torch.zeros(heads, d // heads)) for _ in range(2))
        # One mask for all positions of a sequence and all steps of a solve.
        self.drops = nn.ModuleList(VariationalDropout(dropout, dim=-1) for _ in range(4))

    def start(self) -> TextStart:
        return TextStart(*self.channels, self.far)

    def forward(self, z: Tensor, u: Context) -> list[Tensor]:
        drop_r, drop_attention, drop_inner, drop_out = self.drops
        z = torch.cat([u.states.to(z.dtype), z], dim=1)
        L, d = z.shape[1] - u.states.shape[1], z.shape[2]
        q, k, v = (self.qkv(norm(z) if self.pre_norm else z) + u.u).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        q = q[:, :, -L:]  # (B, heads, L, d_head), against M + L keys
        r = self.r(drop_r(distances(z.shape[1], d, z.device).to(z)[None]))
        r = r.view(-1, self.heads, d // self.heads).permute(1, 2, 0)  # (heads, d_head, M + L)
        bias = shift((q + self.b_r[:, None]) @ r) * q.shape[-1] ** -0.5
        bias = bias.masked_fill(hidden(L, z.shape[1], self.reach, z.device), -torch.inf)
        heads = F.scaled_dot_product_attention(q + self.b_w[:, None], k, v, attn_mask=bias)
        y = z[:, -L:] + drop_attention(self.out(heads.transpose(1, 2).flatten(2)))
        y = norm(y)  # both variants: before the second branch, or after the first one
        y = y + drop_out(self.narrow(drop_inner(self.wide(y).relu())))
        return [y if self.pre_norm else norm(y)]


def norm(z: Tensor) -> Tensor:
    return F.layer_norm(z, z.shape[-1:])


def distances(n: int, d: int, device: torch.device) -> Tensor:
    """Sinusoids of the distances n - 1 .. 0, all sines before all cosines: (n, d)."""
    wavelengths = 10_000 ** (torch.arange(0, d, 2.0, device=device) / d)
    angles = torch.arange(n - 1, -1, -1.0, device=device)[:, None] / wavelengths
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def shift(scores: Tensor) -> Tensor:
    """Scores by distance, (..., L, n) for distances n - 1 .. 0, to scores by key.

    Query i (0 .. L - 1) needs key j at distance i + n - L - j: its row moved left by L - 1 - i. One
    column more, L entries skipped and the rows read anew do that; what wraps around is the future.
    """
    L, n = scores.shape[-2:]
    padded = F.pad(scores, (1, 0))
    return padded.flatten(-2)[..., L:].unflatten(-1, (L, n))


def hidden(L: int, n: int, reach: int, device: torch.device) -> Tensor:
    """Whether key j is hidden from query i: it comes later, or `reach` or more words before."""
    gap = torch.arange(n - L, n, device=device)[:, None] - torch.arange(n, device=device)
    return (gap < 0) | (gap >= reach)


class Injection(nn.Module):
    """The injection of words (B, L) into queries, keys and values, appended to that of `memory`."""

    def __init__(self, n: int, d: int, cutoffs: tuple[int, ...], dropout: float):
        super().__init__()
        self.embedding = AdaptiveEmbedding(n, d, cutoffs)
        self.drop, self.linear = VariationalDropout(dropout, dim=-1), nn.Linear(d, 3 * d)

    def forward(self, x: Tensor, memory: Context | None = None) -> Context:
        u = self.linear(self.drop(self.embedding(x)))
        if memory is None:
            return Context(u, u.new_zeros(len(u), 0, u.shape[2] // 3))
        return Context(torch.cat([memory.u.to(u.dtype), u], dim=1), memory.states)


class DEQTransformer(Equilibrium):
    """words: size of the vocabulary; segment, memory: positions L and M; std: of the initial
    weights; cell: more options of TransformerCell. Raises ValueError if d is not divisible by the
    number of heads."""

    sample_dims = 2

    def __init__(
        self, words: int, d: int, heads: int, inner: int, cutoffs: tuple[int, ...],
        dropout: float = 0.0, pre_norm: bool = False, weighted: bool = True, std: float = 0.1,
        segment: int = 64, memory: int = 64, **cell,
    ):  # fmt: skip
        super().__init__()
        self.segment, self.memory = segment, memory
        cutoffs = tuple(cut for cut in cutoffs if cut < words)
        self.injection = Injection(words, d, cutoffs, dropout)
        self.cell = TransformerCell(d, heads, inner, dropout, pre_norm, **cell)
        self.softmax = AdaptiveSoftmax(self.injection.embedding)
        self.drop = VariationalDropout(dropout, dim=-1)
        for name, weight in self.named_parameters():
            if name.endswith("bias") or ".biases." in name:
                nn.init.zeros_(weight)
            else:
                nn.init.normal_(weight, std=std)
        if weighted:
            cell = self.cell
            for linear in (cell.qkv, cell.r, cell.out, cell.wide, cell.narrow):
                weight_norm(linear)
        self.project()

    def initial(self, u: Context) -> Tensor:
        B, M, d = u.states.shape
        return u.states.new_zeros(B, u.u.shape[1] - M, d)

    def remember(self, u: Context, z: Tensor) -> Context | None:
        if not self.memory:
            return None
        states = torch.cat([u.states, z], dim=1)
        return Context(*(v[:, -self.memory :].detach() for v in (u.u, states)))

    def segments(self, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(x.split(self.segment, dim=1), y.split(self.segment, dim=1), strict=True)

    def head(self, z: Tensor) -> Tensor:
        return self.softmax.log_probabilities(self.drop(z))

    def nll(self, z: Tensor, y: Tensor) -> Tensor:
        # For all positions, labelled or not: to select some, the host would wait for their number.
        losses = self.softmax.nll(self.drop(z).flatten(0, 1), y.flatten().clamp(min=0))
        losses = losses.where(y.flatten() >= 0, 0.0)
        rows = torch.arange(len(y), device=y.device).repeat_interleave(y.shape[1])
        return losses.new_zeros(len(y)).index_add(0, rows, losses) / labels(y).clamp(min=1)

    @torch.no_grad()
    def project(self) -> None:
        """Ties the tails' projections. In the reference they are one tensor that counts as two
        parameters; here they are two, set to their mean after every update."""
        pairs = zip(self.injection.embedding.projections, self.softmax.projections, strict=True)
        for a, b in list(pairs)[1:]:
            mean = (a.weight + b.weight) / 2
            a.weight.copy_(mean), b.weight.copy_(mean)
