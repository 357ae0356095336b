"""Node classification: the whole graph is one input, the splits are masks over its nodes.

`ogbn-arxiv`, `ogbn-products` (Hu et al., 2020): ogb's loader and split. `cora`,
`citeseer`, `pubmed` (Planetoid; Yang et al., 2016): 60/20/20 random split, the same in every run;
`cora-public` and so on: the public split of 20 labels a class. `digits-graph`: the embedded digits,
each joined to its 8 nearest neighbours by pixels, which few of them show. `graph`: a user's own,
`--data FILE`, an .npz or a .pt of edge_index (2, E), x (N, p), y (N,) and train_mask, valid_mask,
test_mask, each boolean (N,) or the numbers of its nodes.

Labels outside a split's mask are -1, which losses and metrics pass over. All features and edges are
seen in training (the transductive setting of these benchmarks), labels only of the train split.
"""

import functools
import pickle
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import UsageError
from models.explicit import EXPLICIT
from models.ignn import IGNN, PRESETS, Graph
from tasks import Split, Task

# What PyG and ogb themselves are warned of, at every start.
warnings.filterwarnings("ignore", r".*torch\.jit\.script.*deprecated", FutureWarning)
warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)

ARXIV_FIRST = -0.0579  # first number of the official features: anything else is a stand-in
# Sizes with about the paper's numbers of parameters, 0.15 M and 0.17 M (Table 3).
PAPER = {
    "ogbn-arxiv": dict(width=64, hidden=734),
    "ogbn-products": dict(width=64, hidden=974),
}
OPTIONS = ("width", "hidden", "kappa", "dropout")
MASKS = ("train_mask", "valid_mask", "test_mask")
SMALL = dict(
    cache_gb=8.0, augment=False, save_every=200, layers=8, before=16,
    teacher_steps=300, teacher_lr=5e-3, teacher_decay=5e-4,
    student_steps=400, student_lr=5e-3,
)  # fmt: skip
LARGE = SMALL | dict(
    save_every=20, dropout=0.2, layers=4,
    teacher_steps=100, teacher_lr=1e-2, explicit_steps=100,
    student_steps=200, student_lr=4e-3,
)  # fmt: skip


def accuracy(logits: Tensor, y: Tensor) -> Tensor:
    """100 where the likeliest class is right, 0 where it is not or there is no label: (B, N)."""
    return 100.0 * ((logits.argmax(-1) == y) & (y >= 0))


def checked(data: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """A graph's tensors with their types; UsageError names the first thing that is wrong."""
    missing = [key for key in ("edge_index", "x", "y", *MASKS) if key not in data]
    if missing:
        raise UsageError(f"{source}: no {', '.join(missing)} in it")
    for key in ("edge_index", "x", "y", *MASKS):
        value = data[key]
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_complex():
            raise UsageError(f"{source}: {key} must be a dense array of real numbers")
    edges, x, y = data["edge_index"], data["x"].float(), data["y"].squeeze()
    if x.dim() != 2 or not x.numel() or edges.dim() != 2 or len(edges) != 2:
        raise UsageError(
            f"{source}: need x (N, p), p > 0, and edge_index (2, E); got {[*x.shape]} and "
            f"{[*edges.shape]}"
        )
    N = len(x)
    if y.shape != (N,):
        raise UsageError(f"{source}: need y (N,) with N = {N}, as x has; got {[*data['y'].shape]}")
    for key, value in (("edge_index", edges), ("y", y)):
        if (value != value.long()).any():
            raise UsageError(f"{source}: {key} has numbers that are not whole")
    edges, y = edges.long(), y.long()
    masks = torch.stack([mask_of(data[key].squeeze(), N, f"{source}: {key}") for key in MASKS])
    if edges.numel() and (edges.min() < 0 or edges.max() >= N):
        raise UsageError(
            f"{source}: edge_index must be in 0 .. {N - 1}, has {edges.min()} .. {edges.max()}"
        )
    if not x.isfinite().all():
        row = int((~x.isfinite()).any(1).nonzero()[0])
        raise UsageError(f"{source}: x has numbers that are not finite, first in row {row}")
    for key, mask in zip(MASKS, masks, strict=True):
        if not mask.any():
            raise UsageError(f"{source}: {key} is empty")
    if (masks.sum(0) > 1).any():
        node = int((masks.sum(0) > 1).nonzero()[0])
        raise UsageError(f"{source}: the masks overlap, first at node {node}")
    used = y[masks.any(0)]
    if used.min() < 0 or used.max() >= N:
        raise UsageError(f"{source}: labels must be 0, 1, ..., has {used.min()} .. {used.max()}")
    return dict(edge_index=edges, x=x, y=y, masks=masks)


def mask_of(value: Tensor, N: int, name: str) -> Tensor:
    """A boolean mask (N,): as it is, of zeros and ones, or from the numbers of its nodes."""
    if value.shape == (N,) and ((value == 0) | (value == 1)).all():
        return value.bool()
    whole = value.dim() == 1 and value.dtype != torch.bool and not (value != value.long()).any()
    if not whole or (value.numel() and (value.min() < 0 or value.max() >= N)):
        raise UsageError(f"{name} must be a mask ({N},), or numbers of nodes in 0 .. {N - 1}")
    return torch.zeros(N, dtype=torch.bool).index_fill_(0, value.long(), True)


def node_task(
    name: str,
    data: Mapping[str, Tensor],
    sizes: dict,
    defaults: dict,
    note: str = "",
    references: tuple[str, ...] = ("gcn", "gat", "gcnii"),
    paper: dict | None = None,
) -> Task:
    """The task of a graph: one input, three label vectors, the networks that fit it.

    sizes: width and hidden of its networks; paper: those of the preset ignn-paper, if it has one.
    """
    graph = checked(data, name)
    x, y, masks = graph["x"][None], graph["y"], graph["masks"]
    classes = int(y[masks.any(0)].max()) + 1
    presets = PRESETS | ({} if paper is None else {"ignn-paper": dict(kind="ignn", **paper)})
    split = [Split(x, torch.where(mask, y, -1)[None]) for mask in masks]

    @functools.cache
    def adjacency(norm: str) -> Graph:
        return Graph(graph["edge_index"], x.shape[1], norm)

    def network(settings: dict) -> IGNN:
        chosen = sizes | presets[settings["preset"]]
        chosen |= {key: settings[key] for key in ("width", "hidden") if settings[key]}
        chosen |= {key: settings[key] for key in ("kappa", "dropout")}
        return IGNN(adjacency(chosen.pop("norm", "sym")), x.shape[2], classes, **chosen)

    def explicit(settings: dict):
        kind = settings["explicit"]
        if kind not in EXPLICIT:
            raise UsageError(f"--explicit {kind}: allowed is {' | '.join(EXPLICIT)}")
        return EXPLICIT[kind](adjacency("sym"), x.shape[2], classes)

    def read(path: Path) -> Tensor:
        raise UsageError(f"--files {path}: {name} is one graph; train on your own by --task graph")

    return Task(
        name=name,
        metric="accuracy",
        higher_is_better=True,
        train=split[0],
        valid=split[1],
        test=split[2],
        network=network,
        presets=tuple(presets),
        options=OPTIONS,
        score=accuracy,
        read=read,
        classes=tuple(map(str, range(classes))),
        defaults=defaults,
        note=note,
        margin=0.3,
        explicit=explicit,
        references=references,
        edges=graph["edge_index"],
        learned=("hyperdeq", "ignn-solver"),
        unmeasured=tuple(name for name in (*EXPLICIT, "gpm") if name not in references),
        rivals=("eignn", "mignn", "teacher-longer"),
    )


def ogbn(name: str, data: Path, files: tuple[str, ...]) -> Task:
    """A node task of OGB from data/NAME, downloaded by ogb where it is not there yet."""
    from ogb.nodeproppred import PygNodePropPredDataset

    folder = data / name.replace("-", "_")
    expected = [folder / file for file in files]
    missing = [str(file) for file in expected if not file.exists()]
    if folder.exists() and missing:
        raise UsageError(f"{folder} is incomplete, missing {', '.join(missing)}: add or delete it")
    try:
        with pyg_pickles():
            dataset = PygNodePropPredDataset(name, root=str(data))
    except (OSError, EOFError, RuntimeError) as error:  # no network; no one to confirm the download
        raise UsageError(
            f"{name} cannot be downloaded ({error}); by hand, put ogb's archive into {folder}: "
            + ", ".join(files)
        ) from error
    whole, parts = dataset[0], dataset.get_idx_split()
    masks = {
        key: torch.zeros(whole.num_nodes, dtype=torch.bool).index_fill_(0, parts[part], True)
        for key, part in zip(MASKS, ("train", "valid", "test"), strict=True)
    }
    note = ""
    if name == "ogbn-arxiv" and abs(whole.x[0, 0].item() - ARXIV_FIRST) > 1e-3:
        note = "ogbn-arxiv graph, structural features"
    content = dict(edge_index=whole.edge_index, x=whole.x, y=whole.y, **masks)
    sizes = dict(width=64, hidden=256)
    return node_task(name, content, sizes, LARGE, note, ("gcn",), PAPER[name])


@contextmanager
def pyg_pickles():
    """Lets torch.load's safe mode build PyG's data classes, which ogb 1.3.6 has in its files."""
    from torch_geometric.data.data import Data, DataEdgeAttr, DataTensorAttr
    from torch_geometric.data.storage import GlobalStorage

    with torch.serialization.safe_globals([Data, DataEdgeAttr, DataTensorAttr, GlobalStorage]):
        yield


OGB_RAW = tuple(
    f"raw/{part}.csv.gz"
    for part in ("edge", "node-feat", "node-label", "num-node-list", "num-edge-list")
)


def ogbn_arxiv(data: Path) -> Task:
    files = *OGB_RAW, *(f"split/time/{part}.csv.gz" for part in ("train", "valid", "test"))
    return ogbn("ogbn-arxiv", data, files)


def ogbn_products(data: Path) -> Task:
    files = *OGB_RAW, *(f"split/sales_ranking/{part}.csv.gz" for part in ("train", "valid", "test"))
    return ogbn("ogbn-products", data, files)


# All that Planetoid's pickles are made of, by the names of old and of new libraries.
PLAIN = {
    *(("numpy", "dtype"), ("numpy", "ndarray"), ("collections", "defaultdict")),
    *(("__builtin__", "list"), ("builtins", "list"), ("_codecs", "encode")),
    *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
    *((f"scipy.sparse.{csr}", "csr_matrix") for csr in ("csr", "_csr")),
}


class PlainUnpickler(pickle.Unpickler):
    """Reads arrays, sparse matrices, dicts and lists, and refuses whatever else a file asks for:
    pickle would call it."""

    def find_class(self, module: str, name: str):
        if (module, name) not in PLAIN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def planetoid(name: str, public: bool, data: Path) -> Task:
    """Cora, CiteSeer or PubMed from data/planetoid."""
    from torch_geometric import data as pyg
    from torch_geometric.datasets import Planetoid
    from torch_geometric.io import read_planetoid_data
    from torch_geometric.transforms import NormalizeFeatures

    raw, short = data / "planetoid" / name / "raw", name.lower()
    parts = ("x", "tx", "allx", "y", "ty", "ally", "graph", "test.index")
    files = [raw / f"ind.{short}.{part}" for part in parts]
    missing = [str(file) for file in files if not file.exists()]
    if raw.exists() and missing:
        raise UsageError(f"{raw} is incomplete, missing {', '.join(missing)}: add or delete it")
    try:
        for file in files if missing else ():
            pyg.download_url(f"{Planetoid.url}/{file.name}", str(raw), log=False)
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"{name} cannot be downloaded ({error}); by hand, put these into {raw}: "
            + ", ".join(file.name for file in files)
        ) from error
    for file in files[:-1]:  # the last one is text
        try:
            with open(file, "rb") as stream:
                PlainUnpickler(stream, encoding="latin1").load()
        except Exception as error:  # whatever a damaged pickle makes the reader raise
            raise UsageError(
                f"{file} is damaged, or holds more than numbers ({error}); nothing of it was run; "
                "delete it and put Planetoid's own there"
            ) from error
    whole = NormalizeFeatures()(read_planetoid_data(str(raw), short))
    masks = random_masks(whole.num_nodes)
    if public:
        masks = whole.train_mask, whole.val_mask, whole.test_mask
    content = dict(
        zip(MASKS, masks, strict=True), edge_index=whole.edge_index, x=whole.x, y=whole.y
    )
    return node_task(short + "-public" * public, content, dict(width=64, hidden=64), SMALL)


def random_masks(N: int, train: float = 0.6) -> tuple[Tensor, Tensor, Tensor]:
    """This share of the nodes to train, a fifth to validate, the rest to test."""
    rank = torch.randperm(N, generator=torch.Generator().manual_seed(0)) / N
    return rank < train, (rank >= train) & (rank < train + 0.2), rank >= train + 0.2


def digits_graph(data: Path) -> Task:
    """The embedded graph; `data` is not used. Pixels are told of one node in twenty, the labels of
    three in ten: what a node is, it must learn from nodes that are several hops away."""
    from sklearn.datasets import load_digits

    images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    # Squared distances of whole numbers are exact, and the first of equals is nearest: a library's
    # choice among equals changes with the number of threads.
    squares = images.square().sum(1)
    gaps = squares[:, None] + squares - 2 * images @ images.T
    near = gaps.fill_diagonal_(torch.inf).argsort(dim=1, stable=True)[:, :8]
    told = torch.rand(len(labels), 1, generator=torch.Generator().manual_seed(0)) < 0.05
    pixels = images.float() / 8 - 1
    content = dict(
        zip(MASKS, random_masks(len(labels), 0.3), strict=True),
        edge_index=torch.stack([torch.arange(len(near)).repeat_interleave(8), near.flatten()]),
        x=torch.cat([pixels * told, told.float()], dim=1),
        y=labels,
    )
    return node_task("digits-graph", content, dict(width=32, hidden=32), SMALL)


def own_graph(data: Path) -> Task:
    """A user's graph from one file."""
    import numpy as np

    if not data.is_file():
        raise UsageError(f"--data {data}: --task graph needs a file, .npz or .pt")
    try:
        if data.suffix == ".npz":
            with np.load(data, allow_pickle=False) as file:
                content = {key: torch.from_numpy(file[key]) for key in file.files}
        else:
            content = torch.load(data, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a foreign file makes a reader raise
        reason = str(error).split("\n")[0]
        raise UsageError(
            f"--data {data} is no .npz or .pt of a dict of arrays ({reason}); a PyG Data is saved "
            "by torch.save(data.to_dict(), FILE)"
        ) from error
    if not isinstance(content, dict):
        raise UsageError(f"--data {data} holds a {type(content).__name__}, not a dict of tensors")
    return node_task("graph", content, dict(width=64, hidden=128), SMALL)


TASKS = {
    "digits-graph": digits_graph,
    "ogbn-arxiv": ogbn_arxiv,
    "ogbn-products": ogbn_products,
    **{
        name.lower() + "-public" * public: functools.partial(planetoid, name, public)
        for name in ("Cora", "CiteSeer", "PubMed")
        for public in (False, True)
    },
    "graph": own_graph,
}
