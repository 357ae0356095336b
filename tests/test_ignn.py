"""Implicit graph networks against dense linear algebra.

The sparse product and its gradient equal the dense ones; equilibria solve their linear systems.
IGNN contracts at rate kappa; relabelling the nodes permutes the answer.
"""

import pytest
import torch

from anderson import anderson
from losses import TeacherBatch, TeacherLoss
from models.ignn import CELLS, IGNN, Graph, project_rows
from student import Student
from tasks import graphs

N, P, D = 12, 4, 3


def random_graph(norm="sym", n=N, edges=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Graph(torch.randint(n, (2, edges), generator=generator), n, norm, torch.float64)


def network(kind, norm="sym", kappa=0.9):
    """A small network in fp64 and its injection."""
    torch.manual_seed(0)
    net = IGNN(random_graph(norm), P, 2, kind, D, hidden=5, kappa=kappa).double().eval()
    x = torch.randn(1, N, P, dtype=torch.float64)
    return net, net.inject(x).detach()


def dense(graph):
    return graph.matrices(torch.device("cpu"))[0].to_dense()


@pytest.mark.parametrize("norm", ["sym", "row"])
def test_adjacency_is_the_normalised_one(norm):
    """D^-1/2 (A + I) D^-1/2 or D^-1 (A + I), of the symmetrised graph without repetitions."""
    graph = Graph(torch.tensor([[0, 1, 1, 2, 2], [1, 0, 2, 2, 3]]), 4, norm, torch.float64)
    A = torch.eye(4, dtype=torch.float64)
    for a, b in ((0, 1), (1, 2), (2, 3)):
        A[a, b] = A[b, a] = 1
    D = A.sum(1)
    expected = A / D[:, None] if norm == "row" else A / (D[:, None] * D).sqrt()
    assert torch.allclose(dense(graph), expected)
    assert torch.linalg.eigvals(dense(graph)).abs().max().item() == pytest.approx(1)


@pytest.mark.parametrize("norm", ["sym", "row"])
def test_gradient_of_the_sparse_product_is_that_of_the_dense_one(norm):
    graph = random_graph(norm)
    z = torch.randn(2, N, D, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(graph.product(z), dense(graph) @ z)
    assert torch.autograd.gradcheck(graph.product, z)
    assert torch.autograd.gradgradcheck(graph.product, z)


@pytest.mark.parametrize("radius", [0.3, 1.0, 20.0])
def test_projection_is_the_nearest_point_of_the_ball(radius):
    """Against bisection on the threshold: sum max(|w| - theta, 0) = radius."""
    W = torch.randn(6, 9, dtype=torch.float64)
    got = project_rows(W, radius)
    for w, p in zip(W, got, strict=True):
        low, high = 0.0, w.abs().max().item()
        for _ in range(100):
            theta = (low + high) / 2
            size = (w.abs() - theta).clamp(min=0).sum()
            low, high = (theta, high) if size > radius else (low, theta)
        expected = w if w.abs().sum() <= radius else w.sign() * (w.abs() - high).clamp(min=0)
        assert torch.allclose(p, expected, atol=1e-9)


def test_the_linear_equilibrium_solves_the_linear_system():
    """EIGNN: (I - W . A) vec(Z) = vec(u), compared with a dense solve, to 1e-8."""
    net, u = network("eignn")
    A, W = dense(net.cell.graph), net.cell.W.detach().contiguous()
    system = torch.eye(N * D, dtype=torch.float64) - torch.kron(A, W)
    expected = torch.linalg.solve(system, u.flatten()).view_as(u)
    z = anderson(lambda z: net.f(z, u), net.initial(u), 60, last=True)
    assert (z - expected).abs().max() < 1e-8


@pytest.mark.parametrize("kind", ["ignn", "mignn"])
def test_the_nonlinear_equilibrium_solves_its_dense_system(kind):
    """Where ReLU is active, (I - P (W . A)) z = P u: compared with a dense solve, to 1e-8."""
    net, u = network(kind)
    A, W = dense(net.cell.graph), net.cell.W.detach().contiguous()
    z = anderson(lambda z: net.f(z, u), net.initial(u), 200, last=True)
    on = (z > 0).flatten().double()
    system = torch.eye(N * D, dtype=torch.float64) - on[:, None] * torch.kron(A, W)
    expected = torch.linalg.solve(system, on * u.flatten())
    assert 0 < on.mean() < 1
    assert (z.flatten() - expected).abs().max() < 1e-8
    assert ((torch.kron(A, W) @ expected + u.flatten())[on == 0] <= 1e-8).all()


@pytest.mark.parametrize("norm", ["sym", "row"])
def test_ignn_contracts_at_rate_kappa(norm):
    """|f(a) - f(b)| <= kappa |a - b| in the infinity norm: over rows of A normalised by rows, over
    D^-1/2-scaled nodes where A is symmetric."""
    net, u = network("ignn", norm)
    degree = 1 / dense(net.cell.graph).diagonal()  # 1 / d on the diagonal, either way
    scale = degree.rsqrt()[:, None] if norm == "sym" else 1.0
    a, b = (10 * torch.randn_like(u) for _ in range(2))
    before, after = (scale * (a - b)).abs().max(), (scale * (net.f(a, u) - net.f(b, u))).abs().max()
    assert net.cell.W.abs().sum(1).max() <= 0.9 + 1e-6  # projected in fp32
    assert after <= (0.9 + 1e-6) * before


@pytest.mark.parametrize("kind", CELLS)
def test_relabelling_the_nodes_permutes_the_answer(kind):
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    edges = torch.randint(N, (2, 30), generator=torch.Generator().manual_seed(0))
    x = torch.randn(1, N, P, dtype=torch.float64)
    place = order.argsort()
    logits = []
    for index, features in ((edges, x), (place[edges], x[:, order])):
        torch.manual_seed(0)
        graph = Graph(index, N, dtype=torch.float64)
        net = IGNN(graph, P, 2, kind, D, hidden=5).double().eval()
        u = net.inject(features)
        logits.append(net.head(anderson(lambda z: net.f(z, u), net.initial(u), 50, last=True)))  # noqa: B023
    assert torch.allclose(logits[0][:, order], logits[1], atol=1e-8)


@pytest.mark.parametrize("kind", CELLS)
def test_skipping_the_products_at_zero_changes_nothing(kind):
    net, u = network(kind)
    z = torch.zeros_like(u)
    with torch.no_grad():
        quick = net.f(z, u)
        z[:, 1] = 1  # a state with zeros in it is not skipped
        assert not torch.equal(net.f(z, u), quick)
    assert torch.allclose(net.f(torch.zeros_like(u), u), quick)


@pytest.mark.parametrize("kind", ["ignn", "eignn", "mignn"])
def test_many_phantom_steps_are_implicit_differentiation(kind):
    """The gradient through many unrolled steps, against that of the implicit function theorem."""
    net, u = network(kind)
    x = torch.randn(1, N, P, dtype=torch.float64)
    y = torch.randint(2, (1, N))
    loss = TeacherLoss(net)
    net.zero_grad()
    loss(TeacherBatch(x, y, 100, 150))["task"].backward()
    unrolled = {name: p.grad.clone() for name, p in net.named_parameters()}

    net.zero_grad()
    u = net.inject(x)
    z = anderson(lambda z: net.f(z, u), net.initial(u), 100, last=True).requires_grad_()
    net.nll(z, y).mean().backward()
    J = torch.autograd.functional.jacobian(lambda z: net.f(z, u.detach()).flatten(), z.detach())
    eye = torch.eye(N * D, dtype=torch.float64)
    v = torch.linalg.solve((eye - J.view(N * D, N * D)).T, z.grad.flatten())
    net.f(z.detach(), u).backward(v.view_as(z))
    for name, parameter in net.named_parameters():
        assert torch.allclose(unrolled[name], parameter.grad, atol=1e-7), name


@pytest.mark.parametrize("kind", CELLS)
def test_a_fresh_student_is_one_solver_step(kind):
    """Weights that the teacher computes from others are plain ones in the student."""
    net, u = network(kind)
    student = Student(net, train_times()).double()
    z = torch.randn_like(u)
    assert torch.allclose(student.h(z, 0.5, u), net.f(z, u))
    assert "cell.W" in dict(student.named_parameters())
    assert student.cell.graph is net.cell.graph


def train_times():
    from fpode import TimeMap

    return TimeMap(rho=0.3, K=6)


@pytest.mark.parametrize("name, features, classes, size", [
    ("ogbn-arxiv", 128, 40, 0.15e6), ("ogbn-products", 100, 47, 0.17e6)
])  # fmt: skip
def test_the_papers_sizes(name, features, classes, size):
    """Table 3: 0.15 M and 0.17 M; a student that shares the injection adds 0.01 M."""
    net = IGNN(random_graph(), features, classes, **graphs.PAPER[name])
    student = Student(net, train_times())
    count = [sum(p.numel() for p in module.parameters()) for module in (net, student)]
    assert count[0] == pytest.approx(size, rel=0.01) and round(count[1], -4) == 1e4
