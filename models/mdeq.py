r"""The multiscale DEQ for images (Bai et al., 2020), any number of branches.

Branch i holds C_i channels at 1 / 2^i of the finest resolution. One evaluation of f:

    y_i = GN(ReLU(z_i + GN(conv(ReLU(GN(conv(z_i)))) + u_i)))         residual block, u on branch 0
    x_i = sum_j T_ji(y_j)                                             fusion of all resolutions
    f_i = GN(conv_1x1(ReLU(x_i)))                                     after the fusion

With one branch there is nothing to fuse and f is the residual block: the single-stream DEQ.

State: (B, n), all branches flattened channels-last and joined, finest first. A branch is then a
view (B, H, W, C) for the student's W and t, and a channels-last image for the convolutions.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from models import Cell, Equilibrium

PRESETS = {
    # Two branches for 8 x 8 images: small enough that two CPU cores train it in a minute or two.
    "digits": dict(image=(1, 8, 8), classes=10, channels=(16, 32), head=(8, 16), final=128),
    "digits-single": dict(image=(1, 8, 8), classes=10, channels=(24,), head=(16,), final=128),
}


def conv(c_in: int, c_out: int, size: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    layer = nn.Conv2d(c_in, c_out, size, stride, size // 2, bias=bias)
    nn.init.normal_(layer.weight, std=0.01)  # every convolution is followed by a normalisation
    return layer


class Block(nn.Module):
    """The residual block of one branch, the only place where the input enters."""

    def __init__(self, C: int, expansion: int, groups: int):
        super().__init__()
        self.conv1, self.norm1 = conv(C, expansion * C, 3), nn.GroupNorm(groups, expansion * C)
        self.conv2, self.norm2 = conv(expansion * C, C, 3), nn.GroupNorm(groups, C)
        self.norm3 = nn.GroupNorm(groups, C)

    def forward(self, z: Tensor, u: Tensor | None) -> Tensor:
        y = self.conv2(self.norm1(self.conv1(z)).relu())
        y = self.norm2(y if u is None else y + u)
        return self.norm3((y + z).relu())


def transfer(channels: tuple[int, ...], j: int, i: int, groups: int) -> nn.Module:
    """T_ji, branch j to the resolution and width of branch i."""
    if j == i:
        return nn.Identity()
    if j > i:  # coarser to finer
        up = nn.Upsample(scale_factor=2 ** (j - i), mode="nearest")
        return nn.Sequential(
            conv(channels[j], channels[i], 1), nn.GroupNorm(groups, channels[i]), up
        )
    layers: list[nn.Module] = []
    for step in range(j + 1, i + 1):  # finer to coarser: halve, and widen in the last step only
        C = channels[i] if step == i else channels[j]
        layers += [conv(channels[j], C, 3, stride=2), nn.GroupNorm(groups, C), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class MDEQCell(Cell):
    """f of the multiscale DEQ; u (B, C_0, H, W) is injected into branch 0 alone."""

    def __init__(
        self, size: tuple[int, int], channels: tuple[int, ...], expansion: int, groups: int
    ):
        super().__init__()
        self.channels = channels
        self.shapes = [(size[0] >> i, size[1] >> i, C) for i, C in enumerate(channels)]
        self.sizes = [H * W * C for H, W, C in self.shapes]
        self.blocks = nn.ModuleList(Block(C, expansion, groups) for C in channels)
        branches = range(len(channels)) if len(channels) > 1 else ()
        self.fuse = nn.ModuleList(
            nn.ModuleList(transfer(channels, j, i, groups) for j in branches) for i in branches
        )
        self.post = nn.ModuleList(
            nn.Sequential(
                nn.ReLU(), conv(channels[i], channels[i], 1), nn.GroupNorm(4, channels[i])
            )
            for i in branches
        )

    def features(self, z: Tensor) -> list[Tensor]:
        parts = z.split(self.sizes, dim=1)
        return [v.view(-1, *shape) for v, shape in zip(parts, self.shapes, strict=True)]

    def join(self, features: list[Tensor]) -> Tensor:
        return torch.cat([v.flatten(1) for v in features], dim=1)

    def forward(self, z: Tensor, u: Tensor) -> list[Tensor]:
        maps = [v.permute(0, 3, 1, 2) for v in self.features(z)]
        y = [
            block(v, u if i == 0 else None)
            for i, (block, v) in enumerate(zip(self.blocks, maps, strict=True))
        ]
        if self.post:
            y = [
                post(sum(T(v) for T, v in zip(row, y, strict=True)))
                for row, post in zip(self.fuse, self.post, strict=True)
            ]
        return [v.permute(0, 2, 3, 1) for v in y]


class Stem(nn.Sequential):
    """The injection: (B, colors, H, W) -> u (B, C_0, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous(memory_format=torch.channels_last))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 (four times as wide), with a projected shortcut: the head of one branch."""

    def __init__(self, c_in: int, c: int, groups: int):
        super().__init__()

        def norm(width: int) -> nn.Module:
            return nn.GroupNorm(groups, width, affine=False)

        self.body = nn.Sequential(
            *(conv(c_in, c, 1), norm(c), nn.ReLU(), conv(c, c, 3), norm(c), nn.ReLU()),
            *(conv(c, 4 * c, 1), norm(4 * c)),
        )
        self.shortcut = nn.Sequential(conv(c_in, 4 * c, 1), norm(4 * c))

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) + self.shortcut(x)).relu()


class MDEQ(Equilibrium):
    """Stem and injection, the multiscale cell, and a head that merges branches fine to coarse.

    image: (channels, height, width) of x; channels: width of each branch; head: bottleneck width
    of each branch; final: width before the classifier. Raises ValueError where an image side
    cannot be halved once per further branch.
    """

    def __init__(
        self,
        image: tuple[int, int, int],
        classes: int,
        channels: tuple[int, ...],
        head: tuple[int, ...],
        final: int,
        expansion: int = 4,
        groups: int = 4,
    ):
        super().__init__()
        colors, *size = image
        unit = 2 ** (len(channels) - 1)
        if any(side % unit for side in size):
            raise ValueError(f"{len(channels)} branches need sides divisible by {unit}, got {size}")
        C, widths = channels[0], [4 * c for c in head]
        self.injection = Stem(
            *(conv(colors, C, 3), nn.GroupNorm(groups, C), nn.ReLU()),
            *(conv(C, C, 3), nn.GroupNorm(groups, C), nn.ReLU()),
            *(conv(C, C, 1), nn.GroupNorm(groups, C), nn.ReLU()),
        )
        self.cell = MDEQCell((size[0], size[1]), channels, expansion, groups)
        pairs = zip(channels, head, strict=True)
        self.increase = nn.ModuleList(Bottleneck(c_in, c, groups) for c_in, c in pairs)
        self.down = nn.ModuleList(
            nn.Sequential(conv(a, b, 3, 2, bias=True), nn.GroupNorm(groups, b), nn.ReLU())
            for a, b in pairwise(widths)
        )
        self.last = nn.Sequential(
            *(conv(widths[-1], final, 1, bias=True), nn.GroupNorm(groups, final), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(final, classes)),
        )

    def initial(self, u: Tensor) -> Tensor:
        return u.new_zeros(len(u), sum(self.cell.sizes))

    def head(self, z: Tensor) -> Tensor:
        """(B, n) -> logits (B, classes)."""
        y = None
        for i, v in enumerate(self.features(z)):
            branch = self.increase[i](v.permute(0, 3, 1, 2))
            y = branch if y is None else branch + self.down[i - 1](y)
        return self.last(y)
