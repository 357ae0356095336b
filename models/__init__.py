"""Networks: the interface between an equilibrium model and everything that works with one.

A network is three parts around one state z: an input injection u, a cell f(z, u) whose fixed point
is the representation, and a task head. Code outside models/ relies on this interface alone.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class VariationalDropout(nn.Module):
    """Dropout of whole channels, with one mask for all positions and all evaluations of a solve:
    if each evaluation had another mask, there would be no fixed point. Equilibrium.redraw asks for
    the next mask. x (B, C, ...), or (B, ..., C) with dim = -1.
    """

    def __init__(self, p: float, dim: int = 1):
        super().__init__()
        self.p, self.dim, self.mask = p, dim, None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if self.mask is None:
            shape = [1] * x.dim()
            shape[0], shape[self.dim] = x.shape[0], x.shape[self.dim]
            self.mask = F.dropout(x.new_ones(shape), self.p)
        return x * self.mask


class Cell(nn.Module):
    """f itself: the part that the student copies. One evaluation of it is the unit of NFE.

    channels: width of each branch of the state, the dimension in which W and t act (Eq. 8).
    """

    channels: tuple[int, ...]

    def forward(self, z: Tensor, u: Tensor) -> list[Tensor]:
        """One evaluation of f, with u = inject(x). Returns the features of the new state before
        `join`, so that the student can apply W in between."""
        raise NotImplementedError

    def start(self) -> nn.Module | None:
        """A network that guesses the features of z* from u, with at most a quarter of f's FLOPs
        (half of them on graphs); its last layers are called `out`. If None, students begin at z_0.
        """

    def features(self, z: Tensor) -> list[Tensor]:
        """Views of z with channels last, one per branch, sample dimensions first."""
        return [z]

    def join(self, features: list[Tensor]) -> Tensor:
        """The inverse of `features`."""
        return features[0]

    def compile(self, *args, **options) -> None:
        """nn.Module.compile with a higher limit of variants: all cells of a process share those of
        `forward`, for teacher and student, with and without gradient, memory and cached weights."""
        torch._dynamo.config.recompile_limit = 64
        super().compile(*args, **options)


class Equilibrium(nn.Module):
    """A deep equilibrium model; every teacher is one.

    sample_dims: leading dimensions of z that index problems with their own Anderson weights.
    injection: the module x -> u, evaluated once per input; u's first dimension is the sample.
    memory: positions of the segment before that f sees; 0 if inputs do not follow each other.
    """

    sample_dims, memory = 1, 0
    cell: Cell
    injection: nn.Module

    def f(self, z: Tensor, u: Tensor) -> Tensor:
        return self.cell.join(self.cell(z, u))  # Eq. 1: z* = f(z*, u)

    def features(self, z: Tensor) -> list[Tensor]:
        return self.cell.features(z)

    def inject(self, x: Tensor, memory=None) -> Tensor:
        """u of an input; memory: what `remember` returned after the input before it, if any."""
        return self.injection(x) if memory is None else self.injection(x, memory)

    def remember(self, u: Tensor, z: Tensor):
        """What the next segment of a text sees of this one, without gradient."""

    def segments(self, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The parts of inputs and labels that are solved one after another."""
        yield x, y

    def initial(self, u: Tensor) -> Tensor:
        """z_0: zeros of the state's shape (footnote 1)."""
        raise NotImplementedError

    def head(self, z: Tensor) -> Tensor:
        """Task logits of a state, (B, ..., classes); frozen during distillation."""
        raise NotImplementedError

    def log_probabilities(self, z: Tensor) -> Tensor:
        """Log-probabilities that the head gives a state, (B, ..., classes) fp32."""
        return self.head(z).float().log_softmax(-1)

    def redraw(self) -> None:
        """Asks for new dropout masks from the next evaluation on; called before each update."""
        for part in self.modules():
            if isinstance(part, VariationalDropout):
                part.mask = None

    def project(self) -> None:
        """Projects the weights onto those with an equilibrium; called after every update."""

    def nll(self, z: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy, nats: the mean over the labels >= 0 of each sample, (B,) fp32."""
        logits = self.head(z).float()
        losses = F.cross_entropy(
            logits.flatten(0, -2), y.flatten(), ignore_index=-1, reduction="none"
        ).view(len(y), -1)
        return losses.sum(1) / labels(y).clamp(min=1)


def labels(y: Tensor) -> Tensor:
    """The number of labels >= 0 of each sample: (B,)."""
    return (y.reshape(len(y), -1) >= 0).sum(1)
