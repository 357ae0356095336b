r"""The multiscale DEQ for images (Bai et al., 2020), any number of branches.

Branch i holds C_i channels at 1 / 2^i of the finest resolution. One evaluation of f:

    y_i = GN(ReLU(z_i + GN(conv(ReLU(GN(conv(z_i)))) + u_i)))         residual block, u on branch 0
    x_i = sum_j T_ji(y_j)                                             fusion of all resolutions
    f_i = GN(conv_1x1(ReLU(x_i)))                                     after the fusion

With one branch there is nothing to fuse, and f is the residual block: the single-stream DEQ.

State: (B, n), all branches flattened channels-last and joined, finest first. Each branch is thus a
view (B, H, W, C) for the student's W and t, and a channels-last image for the convolutions.

The imagenet-* and cifar-* presets are those of locuslab/deq's MDEQ-Vision, tensor for tensor, and
models/published.py reads its checkpoints; `python -m models` lists all presets with their sizes.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from models import Cell, Equilibrium, VariationalDropout

SMALL, LARGE = (32, 64, 128, 256), (80, 160, 320, 640)
REFERENCE = dict(expansion=5, groups=8, batch_norm=True, weighted=True)
IMAGENET = REFERENCE | dict(image=(3, 224, 224), classes=1000, final=2048, downsample=2)
CIFAR = REFERENCE | dict(image=(3, 32, 32), classes=10, post_affine=False)

PRESETS = {
    # Two branches for 8 x 8 images: two CPU cores train it in a minute or two.
    "digits": dict(image=(1, 8, 8), classes=10, channels=(16, 32), head=(8, 16), final=128),
    "digits-single": dict(image=(1, 8, 8), classes=10, channels=(24,), head=(16,), final=128),
    # Three branches, 16, 8 and 4 pixels wide, for photographs of 64 pixels: an hour on two cores.
    "imagenette": REFERENCE
    | dict(
        image=(3, 64, 64),
        classes=10,
        channels=(32, 64, 128),
        head=(16, 32, 64),
        final=512,
        downsample=2,
        expansion=3,
        weighted=False,
    ),
    "fashion-mnist": dict(
        image=(1, 32, 32),
        classes=10,
        channels=(16, 32, 64),
        head=(8, 16, 32),
        final=256,
        downsample=1,
        batch_norm=True,
    ),
    "imagenet-small": IMAGENET | dict(channels=SMALL, head=(24, 48, 96, 192)),
    "imagenet-small-reg": IMAGENET
    | dict(channels=SMALL, head=(28, 56, 112, 224), dropout=0.02, post_affine=False),
    "imagenet-large": IMAGENET | dict(channels=LARGE, head=(32, 64, 128, 256)),
    "imagenet-large-reg": IMAGENET
    | dict(channels=LARGE, head=(32, 64, 128, 256), post_affine=False),
    "imagenet-xl": IMAGENET
    | dict(channels=(88, 176, 352, 704), head=(32, 64, 128, 256), expansion=6),
    "imagenet-single": IMAGENET | dict(channels=(368,), head=(96,), downsample=3),
    "cifar-large": CIFAR | dict(channels=SMALL, head=(14, 28, 56, 112), final=1680, dropout=0.3),
    "cifar-tiny": CIFAR
    | dict(channels=(24, 24), head=(8, 16), final=200, dropout=0.25, entry=False),
}


def conv(c_in: int, c_out: int, size: int, stride: int = 1, bias: bool = False) -> nn.Conv2d:
    layer = nn.Conv2d(c_in, c_out, size, stride, size // 2, bias=bias)
    nn.init.kaiming_normal_(layer.weight)
    return layer


class Block(nn.Module):
    """The residual block of one branch; the input enters here, and only here."""

    def __init__(self, C: int, expansion: int, groups: int, dropout: float, weighted: bool):
        super().__init__()
        self.conv1, self.norm1 = conv(C, expansion * C, 3), nn.GroupNorm(groups, expansion * C)
        self.conv2, self.norm2 = conv(expansion * C, C, 3), nn.GroupNorm(groups, C)
        self.norm3 = nn.GroupNorm(groups, C)
        self.drop = VariationalDropout(dropout)
        if weighted:
            weight_norm(self.conv1), weight_norm(self.conv2)

    def forward(self, z: Tensor, u: Tensor | None) -> Tensor:
        y = self.drop(self.conv2(self.norm1(self.conv1(z)).relu()))
        y = self.norm2(y if u is None else y + u)
        return self.norm3((y + z).relu())


def transfer(channels: tuple[int, ...], j: int, i: int, groups: int) -> nn.Module:
    """T_ji: brings branch j to the resolution and width of branch i."""
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


class ImageStart(nn.Module):
    """A guess of z* from u: branch 0 first, then each branch from the one before, halved."""

    def __init__(self, channels: tuple[int, ...]):
        super().__init__()
        C = channels[0]
        self.first = nn.Sequential(conv(C, C, 3), nn.GroupNorm(4, C), nn.ReLU())
        pairs = pairwise(channels)
        self.lower = nn.ModuleList(nn.Sequential(conv(a, b, 3, 2), nn.ReLU()) for a, b in pairs)
        self.out = nn.ModuleList(conv(C, C, 1, bias=True) for C in channels)

    def forward(self, u: Tensor) -> list[Tensor]:
        maps = [self.first(u)]
        for lower in self.lower:
            maps.append(lower(maps[-1]))
        return [out(v).permute(0, 2, 3, 1) for out, v in zip(self.out, maps, strict=True)]


class MDEQCell(Cell):
    """f of the multiscale DEQ; u (B, C_0, H, W) is injected into branch 0 alone.

    size: (H, W) of branch 0. The other arguments are those of MDEQ.
    """

    def __init__(
        self,
        size: tuple[int, int],
        channels: tuple[int, ...],
        expansion: int,
        groups: int,
        dropout: float = 0.0,
        post_affine: bool = True,
        weighted: bool = False,
    ):
        super().__init__()
        self.channels = channels
        self.shapes = [(size[0] >> i, size[1] >> i, C) for i, C in enumerate(channels)]
        self.sizes = [H * W * C for H, W, C in self.shapes]
        self.blocks = nn.ModuleList(
            Block(C, expansion, groups, dropout, weighted) for C in channels
        )
        branches = range(len(channels)) if len(channels) > 1 else ()
        self.fuse = nn.ModuleList(
            nn.ModuleList(transfer(channels, j, i, groups) for j in branches) for i in branches
        )
        self.post = nn.ModuleList(
            nn.Sequential(nn.ReLU(), conv(C, C, 1), nn.GroupNorm(4, C, affine=post_affine))
            for C in channels[: len(branches)]
        )
        if weighted:
            for post in self.post:
                weight_norm(post[1])

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

    def start(self) -> ImageStart:
        return ImageStart(self.channels)


class Stem(nn.Sequential):
    """The injection: (B, colors, H, W) -> u (B, C_0, H, W), each side halved `downsample` times."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous(memory_format=torch.channels_last))


class Bottleneck(nn.Module):
    """The head of one branch: convolutions 1x1, 3x3, 1x1 (four times as wide) and a shortcut."""

    def __init__(self, c_in: int, c: int, norm: Callable[..., nn.Module], affine: bool):
        super().__init__()
        self.body = nn.Sequential(
            *(conv(c_in, c, 1), norm(c, False), nn.ReLU()),
            *(conv(c, c, 3), norm(c, False), nn.ReLU()),
            *(conv(c, 4 * c, 1), norm(4 * c, False)),
        )
        self.shortcut = nn.Sequential(conv(c_in, 4 * c, 1), norm(4 * c, affine))

    def forward(self, x: Tensor) -> Tensor:
        return (self.body(x) + self.shortcut(x)).relu()


def refuse_odd(sides: list[int], branches: int, downsample: int) -> None:
    """ValueError if an image side cannot be halved as often as stem and branches halve it."""
    unit = 2 ** (branches - 1 + downsample)
    if any(side % unit for side in sides):
        raise ValueError(
            f"{branches} branches after {downsample} halvings need image sides divisible by "
            f"{unit}, got {sides[0]} x {sides[1]}"
        )


def stem(colors: int, C: int, downsample: int, entry: bool, norm) -> Iterator[nn.Module]:
    """The layers before the first branch: at least two convolutions, and a 1x1 one if `entry`."""
    for i in range(max(2, downsample)):
        yield from (conv(C if i else colors, C, 3, 2 if i < downsample else 1), norm(C), nn.ReLU())
    if entry:
        yield from (conv(C, C, 1), norm(C), nn.ReLU())


class MDEQ(Equilibrium):
    """Stem and injection, the multiscale cell, and a head that merges branches fine to coarse.

    image: (channels, height, width) of x; channels: width of each branch; head: bottleneck width
    of each branch; final: width before the classifier; downsample: how often the stem halves the
    image; entry: whether the stem ends with a 1x1 convolution; batch_norm: in stem and head, else
    GroupNorm; weighted: weight normalisation of f's convolutions except those between branches.
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
        downsample: int = 0,
        entry: bool = True,
        dropout: float = 0.0,
        post_affine: bool = True,
        batch_norm: bool = False,
        weighted: bool = False,
    ):
        super().__init__()
        colors, *sides = image
        refuse_odd(sides, len(channels), downsample)

        def norm(width: int, affine: bool = True) -> nn.Module:
            if batch_norm:
                return nn.BatchNorm2d(width, affine=affine)
            return nn.GroupNorm(groups, width, affine=affine)

        self.injection = Stem(*stem(colors, channels[0], downsample, entry, norm))
        size = sides[0] >> downsample, sides[1] >> downsample
        self.cell = MDEQCell(size, channels, expansion, groups, dropout, post_affine, weighted)
        self.increase = nn.ModuleList(
            Bottleneck(c_in, c, norm, batch_norm) for c_in, c in zip(channels, head, strict=True)
        )
        widths = [4 * c for c in head]
        self.down = nn.ModuleList(
            nn.Sequential(conv(a, b, 3, 2, bias=True), norm(b), nn.ReLU())
            for a, b in pairwise(widths)
        )
        self.last = nn.Sequential(
            *(conv(widths[-1], final, 1, bias=True), norm(final), nn.ReLU()),
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
