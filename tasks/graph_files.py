"""Files of graphs, read without running any code in them, and checked.

Every reader returns a dict of edge_index (2, E), x (N, p), y (N,) and three masks, each boolean
(N,) or a list of nodes; `checked` reports the first thing that is wrong with one.
"""

import pickle
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import UsageError

# Warnings that PyG and ogb cause themselves, at every start.
warnings.filterwarnings("ignore", r".*torch\.jit\.script.*deprecated", FutureWarning)
warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)

MASKS = ("train_mask", "valid_mask", "test_mask")
OGB_RAW = tuple(
    f"raw/{part}.csv.gz"
    for part in ("edge", "node-feat", "node-label", "num-node-list", "num-edge-list")
)
OGB_FILES = {
    name: (*OGB_RAW, *(f"split/{split}/{part}.csv.gz" for part in ("train", "valid", "test")))
    for name, split in (("ogbn-arxiv", "time"), ("ogbn-products", "sales_ranking"))
}


def checked(data: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """A graph's tensors, converted; UsageError for the first thing that is wrong with them."""
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
    """A boolean mask (N,), from a boolean one, from zeros and ones, or from a list of nodes."""
    if value.shape == (N,) and ((value == 0) | (value == 1)).all():
        return value.bool()
    whole = value.dim() == 1 and value.dtype != torch.bool and not (value != value.long()).any()
    if not whole or (value.numel() and (value.min() < 0 or value.max() >= N)):
        raise UsageError(f"{name} must be a mask ({N},), or numbers of nodes in 0 .. {N - 1}")
    return torch.zeros(N, dtype=torch.bool).index_fill_(0, value.long(), True)


def ogbn(name: str, data: Path) -> dict[str, Tensor]:
    """A node task of OGB from data/NAME; ogb downloads it if it is missing."""
    from ogb.nodeproppred import PygNodePropPredDataset

    folder, files = data / name.replace("-", "_"), OGB_FILES[name]
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
    return dict(edge_index=whole.edge_index, x=whole.x, y=whole.y, **masks)


@contextmanager
def pyg_pickles():
    """Allows torch.load's safe mode to build PyG's data classes, which files of ogb 1.3.6 hold."""
    from torch_geometric.data.data import Data, DataEdgeAttr, DataTensorAttr
    from torch_geometric.data.storage import GlobalStorage

    with torch.serialization.safe_globals([Data, DataEdgeAttr, DataTensorAttr, GlobalStorage]):
        yield


# Everything that Planetoid's pickles consist of, by the names of old and new libraries.
PLAIN = {
    *(("numpy", "dtype"), ("numpy", "ndarray"), ("collections", "defaultdict")),
    *(("__builtin__", "list"), ("builtins", "list"), ("_codecs", "encode")),
    *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
    *((f"scipy.sparse.{csr}", "csr_matrix") for csr in ("csr", "_csr")),
}


class PlainUnpickler(pickle.Unpickler):
    """Reads arrays, sparse matrices, dicts and lists, and refuses any other object that a file asks
    for: pickle would run its code."""

    def find_class(self, module: str, name: str):
        if (module, name) not in PLAIN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def planetoid(name: str, data: Path) -> dict[str, Tensor]:
    """Cora, CiteSeer or PubMed from data/planetoid, with the public split's masks."""
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
    masks = whole.train_mask, whole.val_mask, whole.test_mask
    parts = zip(MASKS, masks, strict=True)
    return dict(parts, edge_index=whole.edge_index, x=whole.x, y=whole.y)


def own(data: Path) -> dict[str, Tensor]:
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
    return content
