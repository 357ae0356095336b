"""Pictures from files: decoded when asked for, by torchvision and torch's DataLoader.

`Pictures` has the interface of tasks.Split, so training, stores and evaluation treat both alike. A
random view is a function of its own seed: it is the same on any number of ranks, in any worker
process and after any restart.
"""

import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from checkpoint import UsageError


@dataclass
class Pictures:
    """A split of pictures that are decoded when asked for; the interface is Split's.

    dataset: torchvision's, dataset[i] -> (PIL image, class); rows: the entries that belong to the
    split; plain, augment: transforms to a tensor. unreadable: "refuse" ends the run at a damaged
    file; "skip" counts it and, in training, uses the next one instead.
    """

    dataset: object
    rows: Tensor
    plain: Callable
    augment: Callable | None = None
    unreadable: str = "refuse"
    draws: int = 1
    skipped: set[str] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int | None]):
        """(x, class) of one row, augmented if it has a seed; or a complaint that names the file,
        if it cannot be read, and the row."""
        row, seed = key
        number = int(self.rows[row])
        try:
            image, label = self.dataset[number]
        except Exception as error:  # whatever a damaged file makes PIL raise
            return f"{self.dataset.samples[number][0]} is not a readable image ({error})", row
        if seed is None or self.augment is None:
            return self.plain(image), label
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.augment(image), label

    def collate(self, samples: list[tuple], full: bool = False) -> tuple[Tensor, Tensor, list[str]]:
        """x, y, and complaints about unreadable files; full: others take their place."""
        complaints = [first for first, _ in samples if isinstance(first, str)]
        if full or self.augment is not None:  # every rank needs its share of a training batch
            samples = [self.readable(*sample) for sample in samples]
        good = [sample for sample in samples if not isinstance(sample[0], str)]
        if not good:
            return torch.empty(0), torch.empty(0, dtype=torch.long), complaints
        x, y = zip(*good, strict=True)
        return torch.stack(x), torch.tensor(y), complaints

    def readable(self, first, second: int) -> tuple:
        """The sample itself or, if it could not be read, the next one that can."""
        for row in range(second + 1, second + 1 + len(self)):
            if not isinstance(first, str):
                break
            first, second = self[row % len(self), None]
        return first, second

    def report(self, complaints: list[str]) -> None:
        for complaint in complaints:
            if self.unreadable == "refuse":
                raise UsageError(f"{complaint}: repair or remove it, or add --unreadable skip")
            if complaint not in self.skipped:
                self.skipped.add(complaint)
                print(f"{complaint}: skipped, {len(self.skipped)} so far", file=sys.stderr)

    def fingerprint(self, crc: int) -> int:
        """A checksum of the files' names, or of the labels that torchvision holds in memory,
        continued from crc."""
        samples = getattr(self.dataset, "samples", None)
        if samples is None:
            return zlib.crc32(np.asarray(self.dataset.targets).tobytes(), crc)
        files = (Path(samples[row][0]) for row in self.rows.tolist())
        names = "\n".join(f"{file.parent.name}/{file.name}" for file in files)
        return zlib.crc32(names.encode(), crc)

    def batch(self, rows: Tensor, seeds: Tensor | None = None) -> tuple[Tensor, Tensor]:
        keys = keys_of(rows, seeds)
        x, y, complaints = self.collate([self[key] for key in keys], full=True)
        self.report(complaints)
        return x, y

    def stream(self, batches: Iterable[tuple], workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        loader = torch.utils.data.DataLoader(
            self,
            batch_sampler=(keys_of(*batch) for batch in batches),
            num_workers=workers,
            collate_fn=self.collate,
            pin_memory=torch.cuda.is_available(),
        )
        for x, y, complaints in loader:
            self.report(complaints)
            yield x, y


def keys_of(rows: Tensor, seeds: Tensor | None = None) -> list[tuple[int, int | None]]:
    every = [None] * len(rows) if seeds is None else seeds.tolist()
    return list(zip(rows.tolist(), every, strict=True))


def pictures(train, test, plain, augment, unreadable: str = "refuse") -> list[Pictures]:
    """Train, validation and test split of two torchvision data sets."""
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    held = min(10_000, max(1, len(train) // 10))
    splits = {
        "train": Pictures(train, order[held:], plain, augment, unreadable),
        "validate": Pictures(train, order[:held], plain, None, unreadable),
        "test": Pictures(test, torch.arange(len(test)), plain, None, unreadable),
    }
    for use, split in splits.items():
        first = split.readable(*split[0, None])[0] if len(split) else ""
        if isinstance(first, str):
            raise UsageError(
                f"of {len(split)} pictures to {use}, none can be read {first and f'({first})'}: "
                "train/ needs two at least, val/ one"
            )
    return [*splits.values()]


def decoded(path: Path | str, mode: str = "RGB"):
    """A picture file as PIL's 8-bit image: upright, on white where it is transparent, and light
    from 0 to 1 whether the file says so in 8 bits, in 16 or in floats."""
    from PIL import Image, ImageOps

    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
    if image.mode[0] in "IF":
        light = np.asarray(image, dtype=np.float32)
        top = next((top for top in (1.0, 255.0) if image.mode == "F" and light.max() <= top), 65535)
        image = Image.fromarray((light / top * 255).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def to_tensor(statistics: dict, *transforms):
    """These transforms of a PIL image, then a normalised tensor."""
    from torchvision.transforms import v2

    end = v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(**statistics)
    return v2.Compose([*transforms, *end])


def folders(data: Path, name: str) -> list:
    """torchvision data sets of the train and val folders at `data` or in data/NAME."""
    from torchvision.datasets import ImageFolder, ImageNet

    root = next((r for r in (data / name, data) if (r / "train").is_dir()), data)
    if (root / "ILSVRC2012_devkit_t12.tar.gz").exists():  # unpacks the archives on first use
        try:
            return [ImageNet(str(root), split, loader=decoded) for split in ("train", "val")]
        except Exception as error:  # whatever a damaged archive makes its readers raise
            raise UsageError(
                f"--data {root}: torchvision cannot read ImageNet's archives there ({error}); "
                "where train/ and val/ are unpacked already, move the devkit away"
            ) from error
    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise UsageError(
                f"--data {data}: need train/ and val/ there or in {name}/, each with a folder of "
                f"images per class; {root / part} is missing"
            )
    try:
        train, test = (ImageFolder(str(root / part), loader=decoded) for part in ("train", "val"))
    except FileNotFoundError as error:
        raise UsageError(f"--data {root}: {error}") from error
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise UsageError(
            f"--data {root}: train/ and val/ need the same class folders, {len(odd)} are in one "
            f"alone: {', '.join(odd[:5])}"
        )
    return [train, test]
