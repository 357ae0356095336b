"""Node classification: the whole graph is one input, the splits are masks over its nodes.

`ogbn-arxiv`, `ogbn-products` (Hu et al., 2020): ogb's loader and split. `cora`,
`citeseer`, `pubmed` (Planetoid; Yang et al., 2016): 60/20/20 random split, the same in every run;
`cora-public` and so on: the public split of 20 labels a class. `digits-graph`: the embedded digits,
each joined to its 8 nearest neighbours by pixels, which only a few nodes show. `graph`: your own,
`--data FILE`, an .npz or a .pt of edge_index (2, E), x (N, p), y (N,) and train_mask, valid_mask,
test_mask, each boolean (N,) or a list of nodes.

Labels outside a split's mask are -1, which losses and metrics ignore. Training sees all features
and edges (the transductive setting of these benchmarks), but only the labels of the train split.
"""

import functools
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoint import UsageError
from models.explicit import EXPLICIT
from models.ignn import IGNN, PRESETS, Graph
from tasks import Split, Task, graph_files
from tasks.graph_files import MASKS, checked

ARXIV_FIRST = -0.0579  # first number of the official features; other ones are a replacement
# Sizes with about the paper's numbers of parameters, 0.15 M and 0.17 M (Table 3).
PAPER = {
    "ogbn-arxiv": dict(width=64, hidden=734),
    "ogbn-products": dict(width=64, hidden=974),
}
OPTIONS = ("width", "hidden", "kappa", "dropout")
SMALL = dict(
    cache_gb=8.0, augment=False, save_every=200, layers=8, before=16,
    teacher_steps=300, teacher_lr=5e-3, teacher_decay=5e-4,
    student_steps=400, student_lr=5e-3,
)  # fmt: skip
LARGE = SMALL | dict(
    save_every=20, dropout=0.2, layers=4,
    teacher_steps=300, teacher_lr=1e-2,
    student_steps=200, student_lr=4e-3,
)  # fmt: skip


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """100 if the likeliest class is right, 0 if it is wrong or there is no label: (B, N)."""
    return 100.0 * ((logits.argmax(-1) == y) & (y >= 0))


class Networks:
    """The networks that fit a graph. sizes: width and hidden of the implicit ones; presets: the
    arguments of each of them; norm: normalisation of A unless the preset names one."""

    def __init__(
        self, data: dict[str, Tensor], classes: int, sizes: dict, presets: dict, norm: str
    ):
        self.edges, self.nodes, self.features = data["edge_index"], *data["x"].shape
        self.classes, self.sizes, self.presets, self.norm = classes, sizes, presets, norm

    @functools.cache  # noqa: B019 - one graph for all networks of a process
    def adjacency(self, norm: str) -> Graph:
        return Graph(self.edges, self.nodes, norm)

    def implicit(self, settings: dict) -> IGNN:
        chosen = self.sizes | self.presets[settings["preset"]]
        chosen |= {key: settings[key] for key in ("width", "hidden") if settings[key]}
        chosen |= {key: settings[key] for key in ("kappa", "dropout")}
        adjacency = self.adjacency(chosen.pop("norm", self.norm))
        return IGNN(adjacency, self.features, self.classes, **chosen)

    def explicit(self, name: str, settings: dict) -> nn.Module:
        if name not in EXPLICIT:
            allowed = " | ".join(f"explicit-{known}" for known in EXPLICIT)
            raise UsageError(f"explicit-{name}: allowed is {allowed}")
        return EXPLICIT[name](self.adjacency(self.norm), self.features, self.classes)


def no_files(name: str, path: Path) -> Tensor:
    """`read` of a graph's task: there is no other input."""
    raise UsageError(f"--files {path}: {name} is one graph; train on your own by --task graph")


def node_task(
    name: str,
    data: Mapping[str, Tensor],
    sizes: dict,
    defaults: dict,
    note: str = "",
    references: tuple[str, ...] = ("gcn", "gat", "gcnii"),
    paper: dict | None = None,
    presets: dict = PRESETS,
    norm: str = "sym",
) -> Task:
    """The task of a graph: one input, three label vectors, the networks that fit it.

    sizes: width and hidden of its networks; paper: those of a preset `ignn-paper`; presets, norm:
    see Networks.
    """
    graph = checked(data, name)
    x, y, masks = graph["x"][None], graph["y"], graph["masks"]
    classes = int(y[masks.any(0)].max()) + 1
    presets = presets | ({} if paper is None else {"ignn-paper": dict(kind="ignn", **paper)})
    networks = Networks(graph, classes, sizes, presets, norm)
    few = min(200, defaults["teacher_steps"])  # explicit networks train briefly, as in OGB

    return Task(
        name,
        *("accuracy", True),
        *(Split(x, torch.where(mask, y, -1)[None]) for mask in masks),
        network=networks.implicit,
        presets=tuple(presets),
        options=OPTIONS,
        score=accuracy,
        read=functools.partial(no_files, name),
        classes=tuple(map(str, range(classes))),
        defaults=defaults,
        note=note,
        margin=0.3,
        explicit=networks.explicit,
        explicit_defaults=dict(teacher_steps=few, teacher_lr=1e-2, teacher_decay=0.0),
        references=references,
        edges=graph["edge_index"],
        learned=("hyperdeq", "ignn-solver"),
        rivals=("eignn", "mignn", "teacher-longer"),
    )


def ogbn(name: str, data: Path) -> Task:
    content, note = graph_files.ogbn(name, data), ""
    if name == "ogbn-arxiv" and abs(content["x"][0, 0].item() - ARXIV_FIRST) > 1e-3:
        note = "ogbn-arxiv graph, structural features"
    sizes = dict(width=64, hidden=256)
    return node_task(name, content, sizes, LARGE, note, ("gcn",), PAPER[name])


def planetoid(name: str, public: bool, data: Path) -> Task:
    content = graph_files.planetoid(name, data)
    if not public:
        content |= zip(MASKS, random_masks(len(content["x"])), strict=True)
    sizes = dict(width=64, hidden=64)
    return node_task(name.lower() + "-public" * public, content, sizes, SMALL)


def random_masks(N: int, train: float = 0.6) -> tuple[Tensor, Tensor, Tensor]:
    """Masks: this share of the nodes to train, a fifth for validation, the rest for the test."""
    rank = torch.randperm(N, generator=torch.Generator().manual_seed(0)) / N
    return rank < train, (rank >= train) & (rank < train + 0.2), rank >= train + 0.2


def digits_graph(data: Path) -> Task:
    """The embedded graph; `data` is not used. One node in twenty shows its pixels and three in ten
    have a training label: what a node is must be found from nodes several hops away."""
    from sklearn.datasets import load_digits

    images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    # Squared distances of whole numbers are exact, and a stable sort breaks ties: the choice of a
    # library among equal distances depends on the number of threads.
    squares = images.square().sum(1)
    gaps = squares[:, None] + squares - 2 * images @ images.T
    near = gaps.fill_diagonal_(torch.inf).argsort(dim=1, stable=True)[:, :8]
    shown = torch.rand(len(labels), 1, generator=torch.Generator().manual_seed(0)) < 0.05
    pixels = images.float() / 8 - 1
    content = dict(
        zip(MASKS, random_masks(len(labels), 0.3), strict=True),
        edge_index=torch.stack([torch.arange(len(near)).repeat_interleave(8), near.flatten()]),
        x=torch.cat([pixels * shown, shown.float()], dim=1),
        y=labels,
    )
    return node_task("digits-graph", content, dict(width=32, hidden=32), SMALL)


def own_graph(data: Path) -> Task:
    """A user's graph from one file."""
    return node_task("graph", graph_files.own(data), dict(width=64, hidden=128), SMALL)


TASKS = {
    "digits-graph": digits_graph,
    **{name: functools.partial(ogbn, name) for name in ("ogbn-arxiv", "ogbn-products")},
    **{
        name.lower() + "-public" * public: functools.partial(planetoid, name, public)
        for name in ("Cora", "CiteSeer", "PubMed")
        for public in (False, True)
    },
    "graph": own_graph,
}
