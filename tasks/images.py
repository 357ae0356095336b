"""Image classification tasks.

`digits`: the 1,797 real handwritten digits of 8 x 8 pixels that come with scikit-learn (Alpaydin &
Kaynak, 1998): 1,097 to train, 200 to validate, 500 to test, stratified, the same in every run.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoint import UsageError
from models.mdeq import MDEQ, PRESETS
from tasks import Split, Task


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """100 where the likeliest class is right, else 0: the mean is per cent."""
    return 100.0 * (logits.argmax(1) == y).float()


def digits(data: Path) -> Task:
    """The embedded default task; `data` is not used."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from torchvision.transforms import v2

    images, labels = load_digits(return_X_y=True)
    rest, test = train_test_split(
        range(len(labels)), test_size=500, random_state=0, stratify=labels
    )
    train, valid = train_test_split(rest, test_size=200, random_state=0, stratify=labels[rest])
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1  # ink 0..16 to -1..1
    y = torch.tensor(labels)
    jitter = v2.RandomAffine(
        degrees=10,
        translate=(0.06, 0.06),
        scale=(0.9, 1.1),
        interpolation=v2.InterpolationMode.BILINEAR,
        fill=-1,
    )
    presets = tuple(name for name in PRESETS if name.startswith("digits"))
    return Task(
        name="digits",
        metric="accuracy",
        higher_is_better=True,
        train=Split(x[train], y[train], jitter),
        valid=Split(x[valid], y[valid]),
        test=Split(x[test], y[test]),
        network=lambda settings: MDEQ(**PRESETS[settings["preset"]]),
        presets=presets,
        score=accuracy,
        read=read_digit,
        classes=tuple("0123456789"),
    )


def read_digit(path: Path) -> Tensor:
    """An image file with one digit as an input (1, 1, 8, 8); dark on light is inverted."""
    from PIL import Image, UnidentifiedImageError
    from torchvision.transforms import v2

    try:
        picture = Image.open(path).convert("L")
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file") from error
    except (UnidentifiedImageError, OSError) as error:
        raise UsageError(f"{path} is not a readable image (PNG, JPEG, BMP, ...)") from error
    gray = v2.functional.to_dtype(v2.functional.to_image(picture), torch.float32, scale=True)
    border = torch.cat([gray[0, 0], gray[0, -1], gray[0, :, 0], gray[0, :, -1]])
    ink = 1 - gray if border.mean() > 0.5 else gray  # the training images are light ink on dark
    square = v2.functional.center_crop(ink, [max(ink.shape)] * 2)  # pads the shorter side
    return F.adaptive_avg_pool2d(square, 8)[None] * 2 - 1  # ink per pixel, as the data was made


TASKS = {"digits": digits}
