"""How many pictures a worker reads per second: decoded, cropped to 224 pixels, normalised."""

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tasks.images import imagenet

WIDTH, HEIGHT, QUALITY = 500, 375, 92  # ImageNet's pictures have 110 KB on average


def reading(count: int) -> dict:
    """Pictures per second of processor time, which does not depend on other jobs, on one thread.
    The pictures are artificial: blurred noise with some grain."""
    random, sizes, threads = np.random.default_rng(0), [], torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("val/class/0.jpg", *(f"train/class/{i}.jpg" for i in range(20))):
            coarse = random.integers(256, size=(HEIGHT // 25, WIDTH // 25, 3), dtype=np.uint8)
            smooth = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
            grain = random.normal(scale=16, size=(HEIGHT, WIDTH, 3))
            file = Path(folder, name)
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = (np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(file, quality=QUALITY)
            sizes.append(file.stat().st_size)
        split = imagenet(Path(folder)).train
        rows, passes = torch.arange(len(split)), -(-count // len(split))
        torch.set_num_threads(1)
        split.batch(rows, rows)  # libraries load outside the measurement
        begin = time.process_time()
        for i in range(passes):
            split.batch(rows, rows + i)
        spent = time.process_time() - begin
    torch.set_num_threads(threads)
    found = {"size": [WIDTH, HEIGHT], "bytes": sum(sizes) / len(sizes)}
    return found | {"per_second": passes * len(split) / spent}
