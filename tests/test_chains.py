"""The chains: a task that needs as many evaluations as a chain has nodes.

Only the first node shows the class. J evaluations see J hops, with any weights and either solver.
A far start sees the whole chain; with it, one evaluation is enough.
"""

import json

import pytest
import torch

import infer
import train
from anderson import anderson, picard
from checkpoint import UsageError
from config import parse
from evidence import chains as study
from evidence import tables
from evidence.evaluate import evaluate
from evidence.methods import methods
from fpode import TimeMap
from models.explicit import EXPLICIT
from models.graph import Graph
from models.ignn import IGNN
from student import Student
from tasks import chains

from .conftest import NONE

L = 12  # nodes of a test's chain


def line(preset="ignn", norm="into"):
    """A network of random weights on two chains, and the input with classes 0 and 1."""
    torch.manual_seed(0)
    nodes = torch.arange(2 * L).view(2, L)
    edges = torch.stack([nodes[:, :-1].flatten(), nodes[:, 1:].flatten()])
    options = chains.presets(L)[preset] | dict(width=8)
    net = IGNN(Graph(edges, 2 * L, norm), 2, 2, **options).eval()
    x = torch.zeros(1, 2 * L, 2)
    x[0, [0, L], [0, 1]] = 1.0
    return net, x


def reach(answer, x) -> int:
    """How many nodes of the first chain answer otherwise if its first node has the other class.
    Checks that they are the first ones."""
    other = x.clone()
    other[0, 0] = x[0, 0].flip(0)
    with torch.no_grad():
        changed = (answer(x) != answer(other)).any(-1)[0, :L]
    assert changed[: int(changed.sum())].all()
    return int(changed.sum())


@pytest.mark.parametrize("length, classes", [(10, 2), (50, 2), (100, 10)])
def test_the_class_stands_on_the_first_node_alone(length, classes):
    data = chains.content(length, classes)
    source, target = data["edge_index"]
    x, y = data["x"].view(-1, length, classes), data["y"].view(-1, length)
    assert torch.equal(target, source + 1) and (target % length > 0).all()
    assert len(source) == len(y) * (length - 1) and len(y) == chains.CHAINS * classes
    assert (y == y[:, :1]).all() and torch.equal(x[:, 0].argmax(1), y[:, 0])
    assert torch.equal(x[:, 0].sum(1), torch.ones(len(y))) and not x[:, 1:].any()
    masks = torch.stack([data[key] for key in chains.MASKS])
    assert (masks.sum(0) == 1).all()
    shares = masks.float().mean(1)
    assert torch.allclose(shares, torch.tensor([0.05, 0.1, 0.85]), atol=2 / y.numel())


def test_edges_have_one_direction():
    """Row i of D^-1 (A + I) is the mean of node i and of those that point at it."""
    graph = Graph(torch.tensor([[0, 1, 1, 0], [1, 2, 2, 2]]), 3, "into", torch.float64)
    A, A_t = (part.to_dense() for part in graph.matrices(torch.device("cpu")))
    half, third = 1 / 2, 1 / 3
    expected = torch.tensor([[1, 0, 0], [half, half, 0], [third] * 3], dtype=torch.float64)
    assert torch.equal(A, expected) and torch.equal(A_t, expected.T)
    z = torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(graph.product, z)


@pytest.mark.parametrize("preset", ["ignn", "eignn", "mignn"])
@pytest.mark.parametrize("J", [1, 2, 5])
def test_J_evaluations_see_J_hops(preset, J):
    """From z_0 = 0, the class reaches the node J hops away and none beyond it."""
    net, x = line(preset)
    for solver in (picard, anderson):

        def answer(x):
            u = net.inject(x)
            return net.head(solver(lambda z: net.f(z, u), net.initial(u), J, last=True))  # noqa: B023

        assert reach(answer, x) == J + 1


def student_of(preset):
    """A student whose start is no longer 0, and the input."""
    net, x = line(preset)
    student = Student(net, TimeMap(rho=0.1, K=9), anderson=False, start=True).eval()
    for p in student.start.parameters():
        torch.nn.init.uniform_(p, 0.1, 1.0)
    return net, student, x


@pytest.mark.parametrize("J", [1, 3])
def test_a_students_start_sees_five_hops_more(J):
    """Four by its jumps, and one by f, which is evaluated at a state that is not 0."""
    net, student, x = student_of("ignn")

    def answer(x):
        u = student.inject(x)
        return infer.cdeq(student, net.initial(u), u, J, decay=0.5, last=True)

    assert reach(answer, x) == J + 1 + 5


def test_a_far_start_sees_the_whole_chain():
    """Jumps of 1, 2, 4 and 8 hops: 15, and the one of the injection; without the last one, 7."""
    _, student, x = student_of("ignn-far")

    def guess(x):
        return student.guess(student.inject(x))

    assert len(student.start.jumps) == 4 and reach(guess, x) == L
    student.start.jumps = student.start.jumps[:3]
    student.start.scales.data = student.start.scales.data[:3]
    assert reach(guess, x) == 1 + 7 + 1


def test_a_fresh_far_student_is_one_solver_step():
    net, x = line("ignn-far")
    student, u = Student(net, TimeMap(rho=0.1, K=9), start=True), net.inject(x)
    z = torch.randn_like(u)
    assert torch.allclose(student.h(z, 0.5, u), net.f(z, u))
    assert not student.guess(u).any() and student.cell.graph is net.cell.graph


@pytest.mark.parametrize("norm", ["into", "sym"])
def test_jumps_join_nodes_at_these_distances(norm):
    """Against distances by breadth-first search, on a random graph."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import shortest_path

    N = 40
    edges = torch.randint(N, (2, 60), generator=torch.Generator().manual_seed(0))
    ways = csr_array((torch.ones(60), edges.numpy()), shape=(N, N))
    hops = torch.from_numpy(shortest_path(ways, directed=norm == "into", unweighted=True))
    for i, jump in enumerate(Graph(edges, N, norm).jumps(4)):
        source, target = jump.edge_index(torch.device("cpu"))
        there = torch.zeros(N, N, dtype=torch.bool)
        there[source, target] = True
        assert torch.equal(there, (hops == 2**i) | torch.eye(N, dtype=torch.bool))


@pytest.mark.parametrize("kind, layers", [("gcn", 3), ("gat", 2), ("gcnii", 16)])
def test_a_network_of_finite_depth_sees_its_layers(kind, layers):
    net, x = line()
    explicit = EXPLICIT[kind](net.cell.graph, 2, 2).eval()
    assert reach(explicit, x) == min(layers + 1, L)


def test_a_node_without_features_has_no_state_of_its_own():
    """There is no bias anywhere, so the state of a distant node keeps its direction, however small
    it is, and the head looks at the direction alone."""
    net, x = line()
    assert not net.inject(torch.zeros_like(x)).any()
    z = torch.rand(1, 2 * L, 8)
    assert torch.allclose(net.head(z), net.head(1e-3 * z), atol=1e-5)
    assert torch.equal(net.head(z).argmax(-1), net.head(1e-30 * z).argmax(-1))
    state = torch.zeros_like(z).requires_grad_()
    net.head(state).sum().backward()
    assert state.grad.isfinite().all()


def test_the_equilibrium_and_the_far_start_tell_every_node(tmp_path):
    """The shortest chains with their own settings. After four evaluations, the solver is right on
    the nodes that it has reached and on half of the others, by chance."""
    out = ["--task=chains-10", f"--out={tmp_path}/near", "--device=cpu"]
    train.main([*out, "--stage=teacher"])
    out += ["--preset=ignn-far", f"--out={tmp_path}/far", f"--teacher={tmp_path}/near/teacher.pt"]
    for stage in ("teacher", "student"):
        train.main([*out, f"--stage={stage}"])
    run = infer.open_run(tmp_path / "far", device="cpu")
    table = {name: methods(run, NONE)[name] for name in ("picard", "cdeq")}
    rows = evaluate(run, table, run.task.test, (1, 4, 20), converge=False)
    values = {name: [row["value"] for row in found] for name, found in rows.items()}
    assert values["picard"][2] >= 95 and values["cdeq"][0] >= 95
    seen = (torch.arange(400) % 10 <= 4)[(run.task.test.y >= 0)[0]].float().mean().item()
    assert values["picard"][1] == pytest.approx(50 + 50 * seen, abs=4)


def test_a_studys_tables_are_its_cells():
    part = {"title": "accuracy", "columns": ["10", "20"], "digits": 1}
    part |= {"cells": {"gcn": [[50.0, 60.0], [51.0]], "gat": [[], [52.0]]}}
    result = {"study": "S", "seeds": [0, 1], "command": "c", "commit": "f" * 40, "device": "cpu"}
    text = tables.markdown(json.loads(json.dumps(result | {"parts": [part]})))
    assert "| gcn | 55.0 ± 7.1 | 51.0 |" in text and "| gat |  | 52.0 |" in text


def test_bad_input_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flags, complaint in (
        (["--seeds", "0", "0"], "--seeds 0 0: each once"),
        (["--tasks", "chains-11"], "invalid choice: 'chains-11'"),
        (["--tasks", "chains-10", "--finished"], "cannot read runs/chains-10-seed0/teacher.pt"),
    ):
        with pytest.raises(UsageError, match=complaint):
            study.main(flags)
    with pytest.raises(UsageError, match="--hidden: the networks of chains-10 have no such"):
        parse(["--task=chains-10", "--hidden=8"])
