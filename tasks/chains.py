"""The chains of Gu et al. (2020, IGNN) and Liu et al. (2021, EIGNN): depth by construction.

`chains-L`: two classes and L nodes in each chain; `chains10-L`: ten classes. There are twenty
chains of each class, and an edge from each node to the next one, as in the code of both papers. The
first node of a chain has its class as a one-hot feature; all other features are zero. The class of
every node is to be predicted.

A theorem: one evaluation of f moves information by one hop, and so does the injection. After J
evaluations from z_0 = 0, the state of a node that is J + 1 or more hops from the first node does
not depend on the class, however f was trained; a chain of L nodes needs L - 1 evaluations. The same
holds for a network of finite depth and the number of its layers.

Splits as in Liu et al.: 5 % of all nodes to train, 10 % for validation, 85 % for the test, at
random. The chains of a class are copies of each other, so a split by chains would test on trained
inputs; with this one, a test node may be farther from the first node than any trained one.
"""

import dataclasses
import functools
import math
from pathlib import Path

import torch

from tasks import Task
from tasks.graph_files import MASKS
from tasks.graphs import SMALL, node_task

CHAINS = 20  # of each class
LENGTHS = (10, 20, 50, 100, 200)


def content(length: int, classes: int) -> dict[str, torch.Tensor]:
    """The graph's tensors, as graph_files has them."""
    nodes = torch.arange(classes * CHAINS * length).view(-1, length)
    y = torch.arange(classes).repeat_interleave(CHAINS * length)
    x = torch.zeros(len(y), classes)
    x[nodes[:, 0], y[nodes[:, 0]]] = 1.0
    rank = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)) / len(y)
    masks = rank < 0.05, (rank >= 0.05) & (rank < 0.15), rank >= 0.15
    edges = torch.stack([nodes[:, :-1].flatten(), nodes[:, 1:].flatten()])
    return dict(zip(MASKS, masks, strict=True), edge_index=edges, x=x, y=y)


def presets(length: int) -> dict[str, dict]:
    """The networks in the papers' own form; `ignn-far` has a start that sees a whole chain."""
    return {
        "ignn": dict(kind="ignn", plain=True),
        "ignn-far": dict(kind="ignn", plain=True, cell=dict(far=math.ceil(math.log2(length)))),
        "eignn": dict(kind="eignn", plain=True),
        "mignn": dict(kind="mignn", plain=True, width=32, cell=dict(std=2e-3)),
    }


def chains(length: int, classes: int, data: Path) -> Task:
    """The task; `data` is not used."""
    name = f"chains{'' if classes == 2 else classes}-{length}"
    defaults = SMALL | dict(
        kappa=0.98, before=length, K=4 * length, m=3,
        teacher_steps=400, teacher_lr=2e-2, student_steps=200,
    )  # fmt: skip
    options = dict(presets=presets(length), norm="into")
    task = node_task(name, content(length, classes), dict(width=16), defaults, **options)
    explicit = task.explicit_defaults | dict(teacher_steps=100)
    more = dict(options=("width", "kappa", "dropout"), learned=(), rivals=("eignn", "mignn"))
    return dataclasses.replace(task, explicit_defaults=explicit, **more)


TASKS = {f"chains-{length}": functools.partial(chains, length, 2) for length in LENGTHS}
TASKS |= {"chains10-100": functools.partial(chains, 100, 10)}
