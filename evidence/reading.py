r"""Pictures that one worker reads in a second: decoded, cropped to 224 pixels, normalised.

    python -m evidence.reading           -> results/speed-reading.json

The pictures are made up, of ImageNet's mean size and length. The second is one of processor time,
so that a busy machine does not change it.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from checkpoint import atomic, plain_errors, provenance, versions
from config import command_line
from tasks.images import imagenet

WIDTH, HEIGHT, QUALITY = 500, 375, 92  # ImageNet's pictures have 110 KB on average


def make(folder: Path, n: int) -> float:
    """Writes a data set of n training pictures, blurred noise with some of its grain; returns the
    mean bytes of one."""
    random = np.random.default_rng(0)
    for i in range(n + 1):
        coarse = random.integers(256, size=(HEIGHT // 25, WIDTH // 25, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        grain = random.normal(scale=16, size=(HEIGHT, WIDTH, 3))
        pixels = (np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8)
        file = folder / ("val" if i == n else "train") / "class" / f"{i}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file, quality=QUALITY)
    sizes = [file.stat().st_size for file in (folder / "train" / "class").iterdir()]
    return sum(sizes) / n


def rate(folder: Path, count: int) -> float:
    """Pictures per second of one worker, which has one thread."""
    split, threads = imagenet(folder).train, torch.get_num_threads()
    torch.set_num_threads(1)
    split.batch(torch.arange(len(split)), torch.arange(len(split)))  # libraries load outside
    begin = time.process_time()
    for first in range(0, count, len(split)):
        rows = torch.arange(len(split))
        split.batch(rows, rows + first)
    spent = time.process_time() - begin
    torch.set_num_threads(threads)
    return -(-count // len(split)) * len(split) / spent


def main(argv: list[str]) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--pictures", type=int, default=1000, help="how many are read")
    parser.add_argument("--results", type=Path, default=Path("results"), help="where to write")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        size = make(Path(folder), 20)
        found = {
            "size": [WIDTH, HEIGHT],
            "bytes": size,
            "per_second": rate(Path(folder), args.pictures),
        }
    result = {**provenance(), "versions": versions(), **found}
    with atomic(args.results / "speed-reading.json") as file:
        file.write((json.dumps(result, indent=1) + "\n").encode())
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    with plain_errors():
        main(sys.argv[1:])
