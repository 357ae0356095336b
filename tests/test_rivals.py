"""The rivals: direct networks, learned solvers, networks of finite depth.

A direct network is f cut off after J evaluations, with as many updates as teacher and student have.
A learned solver's evaluations are counted; rows of weights from elsewhere say so.
"""

import shutil
import sys

import pytest
import torch

import infer
import train
from checkpoint import UsageError
from evidence import rivals, tables
from evidence.evaluate import evaluate
from evidence.measure import measure, parameters
from evidence.merge import merge
from evidence.methods import methods
from losses import TeacherLoss
from models.explicit import EXPLICIT, TIMM
from models.ignn import Graph
from tasks import images

from .conftest import TINY
from .test_ignn import N, P, dense, random_graph
from .test_images import TINY as PICTURES
from .test_text import TINY as TEXT


def test_a_direct_network_is_cut_off_and_trained_from_z0(tiny_run, tmp_path, monkeypatch):
    """Every update has J layers, and there are as many as of teacher and student together. A second
    start trains nothing; another number of updates is refused; the table has its row at NFE J."""
    folder, seen, forward = tmp_path / "run", [], TeacherLoss.forward

    def watched(self, batch):
        seen.append((batch.steps, batch.layers))
        return forward(self, batch)

    monkeypatch.setattr(TeacherLoss, "forward", watched)
    shutil.copytree(tiny_run, folder)
    flags = ["direct-2", *TINY, f"--out={folder}"]
    rivals.main(flags)
    assert seen == [(0, 2)] * 12
    rivals.main(flags)
    assert len(seen) == 12
    with pytest.raises(UsageError, match="has updates 12, not 13; delete it"):
        rivals.main([*flags, "--student_steps=7"])

    run = infer.open_run(folder, device="cpu")
    found = rivals.open_rivals(run)
    assert [*found.direct] == [2]
    report = merge([measure(run, found)])
    assert "| direct |  | " in tables.write(report, tmp_path / "table")
    rows = {(row["method"], row["nfe"]): row for row in report["rows"]}
    x, y = run.task.test.batch(torch.arange(500))
    net = found.direct[2]
    u = net.inject(x)
    right = net.head(net.f(net.f(net.initial(u), u), u)).argmax(1) == y
    assert rows["direct", 2]["value"] == pytest.approx(100 * right.float().mean().item())
    assert "vs_direct" in rows["cdeq", 2] and "vs_direct" not in rows["cdeq", 1]
    assert "vs_direct" not in rows["direct", 2] and "vs_teacher" in rows["direct", 2]


def test_a_learned_solver_has_its_rows(tmp_path):
    """It is trained once, though started twice; its evaluations are counted like all others; one of
    another teacher, or of another number of updates, is refused."""
    flags = [*TINY, f"--out={tmp_path}", "--student_steps=3"]
    train.main([*flags, "--stage=teacher"])
    for _ in range(2):
        rivals.main(["hyperdeq", *flags])
    run = infer.open_run(tmp_path, device="cpu")
    found = rivals.open_rivals(run)
    table = methods(run, found)
    rows = evaluate(run, table, run.task.valid, (1, 3))["hyperdeq"]
    assert [row["nfe"] for row in rows] == [1, 3]
    assert parameters(run, found, "hyperdeq") > parameters(run, found, "anderson")
    with pytest.raises(UsageError, match="has updates 3, not 4; delete it"):
        rivals.main(["hyperdeq", *flags[:-1], "--student_steps=4"])
    with pytest.raises(UsageError, match="ignn-solver: ignn-solver needs a network of a"):
        rivals.main(["ignn-solver", *flags])
    (tmp_path / "teacher.pt").unlink()
    train.main([*flags, "--stage=teacher", "--seed=1"])
    with pytest.raises(UsageError, match="distilled from another teacher"):
        rivals.open_rivals(infer.open_run(tmp_path, device="cpu"))


@pytest.mark.parametrize("name", ["alexnet", "googlenet", "resnet34", "hrnet_w18"])
def test_references_classify_pictures(name, tree):
    if name in TIMM:
        pytest.importorskip("timm", reason='needs timm: pip install ".[references]"')
    task = images.imagenette(tree, image_size=64)
    net = task.explicit(name, {}).eval()
    x, y = task.test.batch(torch.arange(4))
    assert net(x).shape == (4, 2) and net.nll(x, y).shape == (4,)
    with pytest.raises(UsageError, match="no such network"):
        task.explicit("nonsense", {})


@pytest.mark.parametrize("name", ["hrnet_w18", "hrnet_w18-pretrained"])
def test_hrnet_without_timm_says_what_to_install(name, tree, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        UsageError, match=r'explicit-hrnet_w18 needs timm.*install "\.\[references]"'
    ):
        images.vision(name, {}, 1000)
    with pytest.raises(UsageError, match="its weights have 1000 classes, not 2"):
        images.imagenette(tree).explicit("hrnet_w18-pretrained", {})


def test_rows_of_downloaded_weights_say_so(tree, tmp_path, monkeypatch):
    """NAME-pretrained takes torchvision's weights as they are, and the table says so."""
    net = images.vision("alexnet", {}, 2)
    monkeypatch.setattr(images, "vision", lambda name, settings, classes: net)
    flags = ["--task=imagenette", f"--data={tree}", f"--out={tmp_path}", "--store=memory"]
    flags += ["--image_size=64", *(flag for flag in PICTURES if "image_size" not in flag)]
    rivals.main(["explicit-alexnet-pretrained", *flags])
    train.main(flags)
    assert "| alexnet-pretrained |" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("kind", EXPLICIT)
def test_explicit_networks_classify_every_node(kind):
    graph = Graph(torch.randint(N, (2, 30)), N)
    net = EXPLICIT[kind](graph, P, 3)
    logits = net(torch.randn(1, N, P))
    assert logits.shape == (1, N, 3)
    net.nll(torch.randn(1, N, P), torch.randint(3, (1, N))).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_gcn_propagates_as_kipf_and_welling_write_it():
    graph = random_graph()
    net = EXPLICIT["gcn"](graph, P, 3, d=5, layers=2).double().eval()
    x = torch.randn(1, N, P, dtype=torch.float64)
    A, (first, last) = dense(graph), net.convs
    h = net.norms[0](A @ x[0] @ first.lin.weight.T + first.bias).relu()
    assert torch.allclose(net(x)[0], A @ h @ last.lin.weight.T + last.bias)


def test_texts_have_no_pretrained_networks(tmp_path):
    with pytest.raises(UsageError, match="explicit-tcn-pretrained: allowed is explicit-transfor"):
        rivals.main(["explicit-tcn-pretrained", *TEXT, f"--out={tmp_path}"])
