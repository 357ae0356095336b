"""The sizes of all presets: python -m models

For each: parameters, those of f among them, the numbers in one sample's state, and the FLOPs of f
and of the head on one sample (a multiplication and an addition count as two). A sample of a text is
a segment of 150 words after a memory of 150, with the vocabulary of WikiText-103.
"""

import torch
from torch.utils.flop_counter import FlopCounterMode

from models import Equilibrium, mdeq, transformer
from models.mdeq import MDEQ
from models.transformer import Context, DEQTransformer

WORDS, SEGMENT = 267_735, 150


def sizes(preset: str) -> dict[str, int]:
    """Those of a preset of images or texts."""
    if preset in mdeq.PRESETS:
        net: Equilibrium = MDEQ(**mdeq.PRESETS[preset]).eval()
        u = net.inject(torch.zeros(1, *mdeq.PRESETS[preset]["image"]))
    else:
        net = DEQTransformer(WORDS, **transformer.PRESETS[preset]).eval()
        d = net.cell.channels[0]
        u = Context(torch.zeros(1, 2 * SEGMENT, 3 * d), torch.zeros(1, SEGMENT, d))
    z = net.initial(u)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net.f(z, u)
        flops = counter.get_total_flops()
        net.head(z)
    return {
        "parameters": sum(p.numel() for p in net.parameters()),
        "f": sum(p.numel() for p in net.cell.parameters()),
        "state": z.numel(),
        "flops": flops,
        "head": counter.get_total_flops() - flops,
    }


if __name__ == "__main__":
    print(f"{'preset':24}{'parameters':>14}{'of f':>14}{'state':>10}{'GFLOP of f':>14}{'head':>10}")
    for name in (*mdeq.PRESETS, *transformer.PRESETS):
        row = sizes(name)
        numbers = f"{row['parameters']:14,}{row['f']:14,}{row['state']:10,}"
        print(f"{name:24}{numbers}{row['flops'] / 1e9:14.3f}{row['head'] / 1e9:10.3f}")
