"""Image classification tasks.

`digits`: the 1,797 real handwritten digits of 8 x 8 pixels that come with scikit-learn (Alpaydin &
Kaynak, 1998): 1,097 to train, 200 to validate, 500 to test, stratified, the same in every run.
`digits-hard`: the same pictures under strong random transforms and noise.
`imagenet`, and `imagenette` at 64 pixels: --data DIR with train/ and val/, a folder per class in
each, or torchvision's ImageNet archives. `cifar10`, `fashion-mnist`: torchvision's, downloaded on
first use. Of these, val/ or the test part is the test split; of the training part a tenth, 10,000
pictures at most, is held out to validate, the same in every run.
"""

import functools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoint import UsageError
from models.explicit import vision
from models.mdeq import MDEQ, PRESETS
from tasks import Split, Task
from tasks.pictures import decoded, folders, pictures, to_tensor

IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
DRAWS = 10  # views of a hard digit
CIFAR = dict(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))  # as locuslab/deq has it
FASHION = dict(mean=(0.2860,), std=(0.3530,))
# At ten times this rate, a student of photographs unlearns the solver step that it starts with.
PHOTOGRAPHS = dict(student_lr=2e-4)
# The schedule of the reference, half of it unrolled, with the batch of eight GPUs.
IMAGENET_SETTINGS = dict(
    batch=512, dtype="bf16", optimizer="sgd", teacher_lr=0.2, teacher_decay=5e-5, clip=5.0,
    teacher_steps=250_000, growing=0.5, before=18, K=26, student_steps=100_000,
    cache_dtype="bf16", chunk=64, save_every=1000, **PHOTOGRAPHS,
)  # fmt: skip
REFERENCES = ("alexnet", "googlenet", "resnet34")  # torchvision's; Table 2 has HRNet-W18, too


def accuracy(logits: Tensor, y: Tensor, k: int = 1) -> Tensor:
    """100 if the right class is among the k likeliest, else 0: the mean is a percentage."""
    return 100.0 * (logits.topk(k, dim=1).indices == y[:, None]).any(1).float()


def image_task(name: str, train, valid, test, classes: tuple[str, ...], **more) -> Task:
    """A classification task whose networks are the MDEQ presets of its family: NAME, NAME-..."""
    family = more.pop("family", name)
    presets = tuple(p for p in PRESETS if p == family or p.startswith(f"{family}-"))
    size, read = more.pop("size", None), more.pop("read")

    def network(settings: dict) -> MDEQ:
        chosen = dict(PRESETS[settings["preset"]])
        if size:
            chosen["image"] = (chosen["image"][0], size, size)
        try:
            return MDEQ(**chosen)
        except ValueError as error:
            raise UsageError(
                f"--preset {settings['preset']} --image_size {size}: {error}"
            ) from error

    return Task(
        name=name,
        metric="accuracy",
        higher_is_better=True,
        train=train,
        valid=valid,
        test=test,
        network=network,
        presets=presets,
        score=accuracy,
        read=read,
        classes=classes,
        **more,
    )


def digits(data: Path) -> Task:
    """The embedded default task; `data` is not used."""
    from torchvision.transforms import v2

    bilinear = v2.InterpolationMode.BILINEAR
    jitter = v2.RandomAffine(10, (0.06, 0.06), (0.9, 1.1), interpolation=bilinear, fill=-1)
    train, valid, test = scans()
    parts = Split(*train, jitter), Split(*valid), Split(*test)
    return image_task("digits", *parts, tuple("0123456789"), read=read_digit)


@functools.cache
def digits_hard(data: Path) -> Task:
    """The same digits rotated, shifted, scaled, sheared and with noise; validation and test have 10
    fixed views of each picture. `data` is not used."""
    from torchvision.transforms import v2

    bilinear = v2.InterpolationMode.BILINEAR
    affine = v2.RandomAffine(45, (0.2, 0.2), (0.6, 1.3), 20, interpolation=bilinear, fill=-1)
    distort = v2.Compose([affine, v2.GaussianNoise(sigma=0.2, clip=False)])
    train, *rest = scans()
    parts = [Split(*train, distort)]
    for x, y in rest:
        views = Split(x.repeat_interleave(DRAWS, 0), y.repeat_interleave(DRAWS), distort)
        seeds = torch.arange(len(views))
        parts.append(Split(*views.batch(seeds, seeds), draws=DRAWS))
    return image_task(
        "digits-hard", *parts, tuple("0123456789"), read=read_digit, family="digits",
        defaults=dict(teacher_steps=3000, store="rolling", save_every=100),  # new views all along
    )  # fmt: skip


def scans() -> list[tuple[Tensor, Tensor]]:
    """The digits and their labels: train, valid, test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    rest, test = train_test_split(
        range(len(labels)), test_size=500, random_state=0, stratify=labels
    )
    train, valid = train_test_split(rest, test_size=200, random_state=0, stratify=labels[rest])
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1  # ink 0..16 to -1..1
    y = torch.tensor(labels)
    return [(x[part], y[part]) for part in (train, valid, test)]


def picture(path: Path, mode: str):
    """A user's image file as a PIL image; UsageError if it is none."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        return decoded(path, mode)
    except Exception as error:  # whatever a damaged file makes PIL raise
        raise UsageError(
            f"{path} is not a readable image: PNG, JPEG, BMP, ... ({error})"
        ) from error


def read_digit(path: Path) -> Tensor:
    """An image file with one digit, as an input (1, 1, 8, 8); dark ink on light is inverted."""
    from torchvision.transforms.v2 import functional

    gray = functional.to_dtype(functional.to_image(picture(path, "L")), torch.float32, scale=True)
    border = torch.cat([gray[0, 0], gray[0, -1], gray[0, :, 0], gray[0, :, -1]])
    ink = 1 - gray if border.mean() > 0.5 else gray  # the training images are light ink on dark
    square = functional.center_crop(ink, [max(ink.shape)] * 2)  # pads the shorter side
    return F.adaptive_avg_pool2d(square, 8)[None] * 2 - 1  # ink per pixel, as the data was made


def photographs(
    name: str, data: Path, image_size: int, unreadable: str, defaults: dict, **more
) -> Task:
    """A task like ImageNet: random resized crops, or the centre of a slightly larger image."""
    from torchvision.transforms import v2

    train, test = folders(data, more.pop("folder", name))
    plain = to_tensor(IMAGENET, v2.Resize(image_size * 8 // 7), v2.CenterCrop(image_size))
    crop = v2.RandomResizedCrop(image_size, scale=more.pop("scale", (0.08, 1.0)))
    augment = to_tensor(IMAGENET, crop, v2.RandomHorizontalFlip())
    classes = tuple(train.classes)
    return image_task(
        name,
        *pictures(train, test, plain, augment, unreadable),
        classes,
        read=lambda path: plain(picture(path, "RGB"))[None],
        size=image_size,
        further={"top5": functools.partial(accuracy, k=5)} if len(classes) > 5 else {},
        nfes=(1, 2, 4, 8, 20),
        defaults=defaults,
        explicit=functools.partial(vision, classes=len(classes)),
        explicit_defaults=dict(teacher_lr=1e-3, teacher_decay=0.05),
        references=REFERENCES,
        directs=(1, 2),
        rivals=(),
        **more,
    )


def imagenet(data: Path, image_size: int = 224, unreadable: str = "refuse") -> Task:
    return photographs("imagenet", data, image_size, unreadable, IMAGENET_SETTINGS)


def imagenette(data: Path, image_size: int = 64, unreadable: str = "refuse") -> Task:
    """Ten classes of ImageNet, for one GPU or one or two hours of a CPU."""
    defaults = dict(
        batch=64, teacher_steps=2500, teacher_lr=2e-3, before=6, layers=3,
        store="rolling", student_steps=1000, save_every=100, **PHOTOGRAPHS,
    )  # fmt: skip
    return photographs(
        "imagenette", data, image_size, unreadable, defaults, folder="imagenette-64",
        scale=(0.35, 1.0),
    )  # fmt: skip


def downloaded(name: str, cls: str, data: Path, statistics: dict, side: int, **more) -> Task:
    """A task of one of torchvision's small data sets: random crops of a padded image."""
    from torchvision import datasets
    from torchvision.transforms import v2

    try:
        kind = getattr(datasets, cls)
        train, test = (kind(str(data), train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError) as error:  # no network, or damaged files
        raise UsageError(
            f"{name} is not in {data} and cannot be downloaded ({error}); put the files of "
            f"torchvision's {cls} there by hand"
        ) from error
    mode = "RGB" if len(statistics["mean"]) == 3 else "L"
    plain = to_tensor(statistics, v2.Resize((side, side)))
    crop = v2.RandomCrop(side, padding=side // 8)
    augment = to_tensor(statistics, v2.Resize((side, side)), crop, v2.RandomHorizontalFlip())
    return image_task(
        name,
        *pictures(train, test, plain, augment),
        tuple(train.classes),
        read=lambda path: plain(picture(path, mode))[None],
        explicit=functools.partial(vision, classes=len(train.classes)),
        explicit_defaults=dict(teacher_lr=1e-3, teacher_decay=0.05),
        references=("resnet18",),
        **more,
    )


def cifar10(data: Path) -> Task:
    defaults = dict(
        batch=96, teacher_steps=100_000, teacher_lr=1e-3, teacher_decay=0.0, student_steps=20_000,
        student_lr=1e-3, save_every=500,
    )  # fmt: skip
    return downloaded("cifar10", "CIFAR10", data, CIFAR, 32, family="cifar", defaults=defaults)


def fashion(data: Path) -> Task:
    defaults = dict(batch=96, teacher_steps=5_000, student_steps=2_000)
    return downloaded("fashion-mnist", "FashionMNIST", data, FASHION, 32, defaults=defaults)


TASKS = {
    "digits": digits,
    "digits-hard": digits_hard,
    "imagenet": imagenet,
    "imagenette": imagenette,
    "cifar10": cifar10,
    "fashion-mnist": fashion,
}
