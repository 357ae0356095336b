"""Networks: what every equilibrium model gives to solvers, student, losses and trajectories.

A network is three parts around one state z: an input injection u, a cell f(z, u) whose fixed point
is the representation, and a task head. Nothing outside models/ knows more than this interface.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class VariationalDropout(nn.Module):
    """Dropout of whole channels, with one mask for all evaluations of a solve and all positions.

    x (B, C, ...), or with dim = -1 (B, ..., C).

    A mask drawn anew at every evaluation would leave no fixed point to find. Equilibrium.redraw
    asks for the next mask.
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
    """f itself, one evaluation of which is the unit of NFE; the part that the student copies.

    channels: width of each branch of the state, the dimension in which W and t act (Eq. 8).
    """

    channels: tuple[int, ...]

    def forward(self, z: Tensor, u: Tensor) -> list[Tensor]:
        """One layer evaluation with u = inject(x): the features of the new state, not yet joined,
        since the student's W goes in between."""
        raise NotImplementedError

    def start(self) -> nn.Module | None:
        """A network that guesses the features of z* from u, of at most a quarter of f's FLOPs, on
        graphs half; its last layers are called `out`. None: there is none, and students begin at
        z_0."""

    def features(self, z: Tensor) -> list[Tensor]:
        """Views of z with channels last, one per branch, sample dimensions first."""
        return [z]

    def join(self, features: list[Tensor]) -> Tensor:
        """The inverse of `features`."""
        return features[0]

    def compile(self, *args, **options) -> None:
        """nn.Module.compile, with room for more variants. All cells of a process share forward's:
        a teacher's and a student's, with and without gradient, memory and cached weights."""
        torch._dynamo.config.recompile_limit = 64
        super().compile(*args, **options)


class Equilibrium(nn.Module):
    """A deep equilibrium model; every teacher is one.

    sample_dims: leading dimensions of z that index problems with their own Anderson weights.
    injection: the module x -> u, evaluated once per input; u's first dimension is the sample.
    memory: positions of an earlier segment that f sees; 0 where inputs do not follow each other.
    """

    sample_dims, memory = 1, 0
    cell: Cell
    injection: nn.Module

    def f(self, z: Tensor, u: Tensor) -> Tensor:
        return self.cell.join(self.cell(z, u))  # Eq. 1: z* = f(z*, u)

    def features(self, z: Tensor) -> list[Tensor]:
        return self.cell.features(z)

    def inject(self, x: Tensor, memory=None) -> Tensor:
        """u of an input and of what `remember` gave after the one before, if there was any."""
        return self.injection(x) if memory is None else self.injection(x, memory)

    def remember(self, u: Tensor, z: Tensor):
        """What the next segment of a stream sees of this one, without gradient."""

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
        """What the head predicts of a state, (B, ..., classes) fp32."""
        return self.head(z).float().log_softmax(-1)

    def redraw(self) -> None:
        """New dropout masks from the next evaluation on; called before every training solve."""
        for part in self.modules():
            if isinstance(part, VariationalDropout):
                part.mask = None

    def project(self) -> None:
        """Puts the weights back where an equilibrium exists; called after every update."""

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
