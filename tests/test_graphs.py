"""Graph tasks and their files.

Nothing in a file is executed; whatever is wrong with a graph is named in one line.
Every kind of network trains, on one process and on two, and is refused on other data.
"""

import collections
import os
import pickle
from pathlib import Path

import pytest
import torch

import infer
import train
from checkpoint import UsageError
from config import parse
from evidence import rivals
from tasks import graphs

from .conftest import command

TINY = ["--task=digits-graph", "--teacher_steps=4", "--student_steps=4", "--K=5", "--device=cpu"]
TINY += ["--before=3", "--save_every=2"]


def good_graph():
    generator = torch.Generator().manual_seed(0)
    rank = torch.randperm(40, generator=generator)
    return dict(
        edge_index=torch.randint(40, (2, 90), generator=generator),
        x=torch.randn(40, 5, generator=generator),
        y=torch.randint(3, (40,), generator=generator),
        train_mask=rank < 20,
        valid_mask=(rank >= 20) & (rank < 30),
        test_mask=rank >= 30,
    )


def spoilt(key, value):
    data = good_graph()
    if value is None:
        del data[key]
    else:
        data[key] = value(data[key])
    return data


@pytest.mark.parametrize(
    "data, complaint",
    [
        (spoilt("edge_index", lambda e: e + 35), r"edge_index must be in 0 \.\. 39, has 35"),
        (spoilt("edge_index", lambda e: e - 1), r"edge_index must be in 0 \.\. 39, has -1"),
        (spoilt("edge_index", lambda e: e[0]), r"need x \(N, p\), p > 0, and edge_index"),
        (spoilt("x", lambda x: x.masked_fill(x > 2.2, torch.nan)), "not finite, first in row"),
        (spoilt("y", lambda y: y - 1), "labels must be 0, 1, ..., has -1"),
        (spoilt("y", lambda y: y * 100), "labels must be 0, 1, ..., has 0 .. 200"),
        (spoilt("y", lambda y: y[1:]), r"need y \(N,\) with N = 40, as x has; got \[39\]"),
        (spoilt("y", lambda y: y + 0.5), "y has numbers that are not whole"),
        (spoilt("y", lambda y: y.tolist()), "y must be a dense array of real numbers"),
        (spoilt("x", lambda x: x.to_sparse()), "x must be a dense array of real numbers"),
        (spoilt("x", lambda x: x[:, :0]), r"need x \(N, p\), p > 0"),
        (spoilt("test_mask", lambda m: m[:, None].expand(40, 10)), r"must be a mask \(40,\)"),
        (spoilt("test_mask", lambda m: torch.tensor([3, 40])), r"numbers of nodes in 0 \.\. 39"),
        (spoilt("train_mask", lambda m: m & False), "train_mask is empty"),
        (spoilt("test_mask", lambda m: m | True), "the masks overlap, first at node"),
        (spoilt("valid_mask", None), "no valid_mask in it"),
    ],
    ids=range(16),
)
def test_a_bad_graph_is_named(data, complaint, tmp_path):
    torch.save(data, tmp_path / "g.pt")
    with pytest.raises(UsageError, match=complaint):
        train.main(["--task=graph", f"--data={tmp_path / 'g.pt'}", f"--out={tmp_path / 'out'}"])


def test_the_embedded_graph_is_the_same_with_any_number_of_threads():
    """Many pictures are equally near, and the choice among them must not depend on the machine."""
    code = "from tasks.graphs import digits_graph; print(digits_graph(None).fingerprint())"
    one = command("-c", code).stdout.strip()  # a process of one thread
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert graphs.digits_graph(None).fingerprint() == one


def test_a_teacher_that_diverges_is_one_line(tmp_path):
    flags = ["--task=digits-graph", *TINY, f"--out={tmp_path}", "--teacher_lr=1e20"]
    with pytest.raises(UsageError, match=r"teacher: the .* is (nan|inf), at step"):
        train.main([*flags, "--teacher_steps=20", "--stage=teacher"])


def test_a_graph_that_was_replaced_is_refused(tmp_path):
    """The edges or the labels change after the teacher was trained: the student's training refuses
    them, and so does infer.py."""
    path, out = tmp_path / "g.pt", tmp_path / "run"
    flags = [*TINY, "--task=graph", f"--data={path}", f"--out={out}"]
    torch.save(good_graph(), path)
    train.main([*flags, "--stage=teacher"])
    for key, value in (("edge_index", lambda e: e.roll(1)), ("y", lambda y: (y + 1) % 3)):
        torch.save(spoilt(key, value), path)
        for act in (lambda: train.main([*flags, "--stage=student"]), lambda: infer.open_run(out)):
            with pytest.raises(UsageError, match="other data than those at hand"):
                act()


def test_masks_may_be_numbers_of_nodes():
    data = good_graph()
    numbers = {key: data[key].nonzero() for key in graphs.MASKS}
    masks = graphs.checked(data | numbers, "here")["masks"]
    assert torch.equal(masks, graphs.checked(data, "here")["masks"])


def test_files_that_are_no_graph_are_named(tmp_path):
    (tmp_path / "a.npz").write_text("no zip")
    torch.save([1, 2], tmp_path / "b.pt")
    for name, complaint in (("a.npz", "no .npz or .pt"), ("b.pt", "a list"), ("c.pt", "needs a")):
        with pytest.raises(UsageError, match=complaint):
            graphs.own_graph(tmp_path / name)


@pytest.mark.parametrize("suffix", ["pt", "npz"])
def test_a_users_own_graph_trains(suffix, tmp_path, capsys):
    import numpy as np

    path = tmp_path / f"own.{suffix}"
    data = good_graph()
    if suffix == "pt":
        torch.save(data, path)
    else:
        np.savez(path, **{key: value.numpy() for key, value in data.items()})
    train.main([*TINY, "--task=graph", f"--data={path}", f"--out={tmp_path / 'run'}"])
    assert "| cdeq |" in capsys.readouterr().out
    infer.main(["--run", str(tmp_path / "run"), "--nfe", "1", "2"])
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_an_incomplete_folder_names_what_is_missing(tmp_path):
    (tmp_path / "ogbn_arxiv" / "raw").mkdir(parents=True)
    (tmp_path / "planetoid" / "Cora" / "raw").mkdir(parents=True)
    for task, file in (("ogbn-arxiv", "edge.csv.gz"), ("cora", "ind.cora.tx")):
        with pytest.raises(UsageError, match=f"is incomplete, missing .*{file}"):
            graphs.TASKS[task](tmp_path)


def test_a_download_without_a_network_says_which_files_go_where(tmp_path, monkeypatch):
    import urllib.request

    def refused(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refused)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("torch_geometric.data.download_url", refused)
    for task, file in (("ogbn-products", "node-feat.csv.gz"), ("citeseer", "ind.citeseer.graph")):
        with pytest.raises(UsageError, match=f"cannot be downloaded.*{file}"):
            graphs.TASKS[task](tmp_path)


def planetoid_files(raw: Path, hostile: str = "", N: int = 520) -> None:
    """Writes a ring of N nodes in Planetoid's layout; the last ten are the test split. `hostile`
    names a file that makes a folder if it is unpickled without care."""
    import numpy as np
    from scipy.sparse import csr_matrix

    class Call:
        def __reduce__(self):
            return os.mkdir, (str(raw / "executed"),)

    raw.mkdir(parents=True)
    x, y = np.eye(6, dtype=np.float32)[np.arange(N) % 6], np.eye(2, dtype=int)[np.arange(N) % 2]
    contents = {"x": csr_matrix(x[:4]), "allx": csr_matrix(x[:-10]), "tx": csr_matrix(x[-10:])}
    contents |= {"y": y[:4], "ally": y[:-10], "ty": y[-10:]}
    contents["graph"] = collections.defaultdict(list, {i: [(i + 1) % N] for i in range(N)})
    for part, content in contents.items():
        file = raw / f"ind.cora.{part}"
        file.write_bytes(pickle.dumps([content, Call()] if part == hostile else content, 2))
    (raw / "ind.cora.test.index").write_text("\n".join(map(str, range(N - 10, N))))


def test_planetoid_files_are_read(tmp_path):
    planetoid_files(tmp_path / "planetoid/Cora/raw")
    task = graphs.TASKS["cora"](tmp_path)
    assert task.train.x.shape == (1, 520, 6) and task.train.x.sum(-1).allclose(torch.ones(520))
    assert int((task.train.y >= 0).sum()) == 312  # .6 of them


@pytest.mark.parametrize("part", ["x", "graph", "ty"])
def test_nothing_in_a_planetoid_file_is_executed(part, tmp_path):
    raw = tmp_path / "planetoid/Cora/raw"
    planetoid_files(raw, hostile=part)
    with pytest.raises(UsageError, match=rf"ind.cora.{part} .*it asks for posix.mkdir"):
        graphs.TASKS["cora"](tmp_path)
    assert not (raw / "executed").exists()
    (raw / f"ind.cora.{part}").write_bytes(b"damaged")
    with pytest.raises(UsageError, match=f"ind.cora.{part} is damaged"):
        graphs.TASKS["cora"](tmp_path)


def test_ogb_files_load_without_running_code(tmp_path):
    """A small graph in OGB's raw layout, opened twice: first parsed, then read from ogb's cache."""
    import gzip

    folder, data = tmp_path / "ogbn_arxiv", good_graph()
    index = {key: data[key].nonzero() for key in graphs.MASKS}
    tables = {
        "raw/edge": data["edge_index"].T,
        "raw/node-feat": data["x"],
        "raw/node-label": data["y"][:, None],
        "raw/num-node-list": [[40]],
        "raw/num-edge-list": [[90]],
        "raw/node_year": [[2000]] * 40,
        "split/time/train": index["train_mask"],
        "split/time/valid": index["valid_mask"],
        "split/time/test": index["test_mask"],
    }
    for name, rows in tables.items():
        path = folder / f"{name}.csv.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = rows.tolist() if isinstance(rows, torch.Tensor) else rows
        with gzip.open(path, "wt") as file:
            file.write("".join(",".join(map(str, row)) + "\n" for row in rows))
    (folder / "RELEASE_v1.txt").touch()
    for _ in range(2):
        task = graphs.ogbn("ogbn-arxiv", tmp_path)
        assert torch.allclose(task.train.x[0], data["x"])
        assert torch.equal(task.test.y[0] >= 0, data["test_mask"])
        assert task.note == "ogbn-arxiv graph, structural features"
        net = task.network(parse(["--task=digits-graph"])[0].__dict__).eval()
        logits = net.head(net.initial(net.inject(task.test.x)))
        assert torch.allclose(
            task.score(logits, task.test.y).float(), graphs.accuracy(logits, task.test.y)
        )


def test_kappa_outside_the_unit_interval_is_refused(tmp_path):
    for kappa in ("0", "1", "1.5"):
        with pytest.raises(UsageError, match=r"--kappa .*: allowed is > 0 and < 1"):
            train.main([*TINY, f"--kappa={kappa}", f"--out={tmp_path}"])


@pytest.mark.parametrize("flags", [[], ["--preset=eignn"], ["--preset=mignn"]], ids=str)
def test_every_preset_trains_and_resumes(flags, tmp_path, capsys):
    rivals.main(["explicit-gcn", *TINY, *flags, f"--out={tmp_path}"])
    train.main([*TINY, *flags, f"--out={tmp_path}"])
    first = capsys.readouterr().out
    assert "| cdeq |" in first and "| gcn |" in first
    train.main([*TINY, *flags, f"--out={tmp_path}"])
    assert "student 3/4" not in capsys.readouterr().out


def test_two_processes_share_one_graph(tmp_path):
    """Each rank draws its own states of the trajectory; the evaluation counts the graph once."""
    done = command("train.py", *TINY, f"--out={tmp_path}", processes=2)
    assert done.returncode == 0, done.stderr
    run = infer.open_run(tmp_path, device="cpu")
    assert run.config["batch"] == 2 and "" in run.students
