"""The learned solvers, HyperDEQ and IGNN-Solver.

Before training they are Picard's iteration; K steps are K evaluations; problems do not mix.
A start costs at most a quarter of f; training brings start and path nearer to the equilibrium.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from anderson import Counter, picard
from evidence.rivals import EndsBatch, LearnedSolverLoss
from models import mdeq, transformer
from models.ignn import IGNN, Graph
from models.learned_solver import LearnedSolver, learned
from models.transformer import DEQTransformer


def problem(kind: str, net):
    """A network of this kind and an injection u for it."""
    torch.manual_seed(0)
    if kind == "image":
        return net, net.inject(torch.randn(3, 1, 8, 8)).detach()
    if kind == "text":
        net = DEQTransformer(40, 16, 2, 24, (20,), segment=5, memory=5).eval()
        return net, net.inject(torch.randint(40, (3, 7)))
    net = IGNN(Graph(torch.randint(9, (2, 20)), 9), 4, 3, width=8, hidden=8).eval()
    return net, net.inject(torch.randn(1, 9, 4)).detach()


@pytest.mark.parametrize("kind", ["image", "text", "graph"])
@torch.no_grad()
def test_a_fresh_solver_is_picard_from_its_own_start(kind, net):
    """Its weights are a = (0, .., 0, 1) and beta = 1."""
    net, u = problem(kind, net)
    solver = LearnedSolver(net, m=3)
    f = Counter(lambda z: net.f(z, u))
    z = learned(f, solver.initial(u), 5, solver=solver, sample_dims=net.sample_dims)
    expected = picard(lambda z: net.f(z, u), solver.initial(u), 5)
    assert f.nfe == 5 and torch.allclose(z, expected, atol=1e-5)
    assert z.shape[1:] == net.initial(u).shape


@pytest.mark.parametrize("kind", ["image", "text", "graph"])
@torch.no_grad()
def test_weights_sum_to_one_and_problems_do_not_mix(kind, net):
    net, _ = problem(kind, net)
    solver = LearnedSolver(net, m=3, graph_net=kind == "graph")
    for weight in solver.parameters():
        weight.copy_(torch.randn(weight.shape) * 0.2)
    window = [torch.randn(6, 20) for _ in range(3)]
    alpha, beta = solver.weights(window)
    assert torch.allclose(alpha.sum(1), torch.ones(6), atol=1e-5) and beta.shape == (6,)
    first = solver.weights([c[:1] for c in window])
    assert torch.allclose(first[0], alpha[:1], atol=1e-5)


@torch.no_grad()
def test_a_later_word_changes_nothing_before_it(net):
    net, _ = problem("text", net)
    solver = LearnedSolver(net, m=3)
    for weight in solver.parameters():
        weight.copy_(torch.randn(weight.shape) * 0.1)
    x = torch.randint(40, (2, 7))
    other = torch.cat([x[:, :4], (x[:, 4:] + 1) % 40], dim=1)

    def states(x):
        u = net.inject(x)
        f = lambda z: net.f(z, u)  # noqa: E731
        return learned(f, solver.initial(u), 4, solver=solver, sample_dims=2, last=True)

    a, b = states(x), states(other)
    assert torch.allclose(a[:, :4], b[:, :4], atol=1e-4) and not torch.allclose(a, b)


TEXTS = [name for name in transformer.PRESETS if not name.endswith("-far")]  # these cost more


@torch.no_grad()
@pytest.mark.parametrize(
    "preset", ["digits", "imagenette", "fashion-mnist", *TEXTS, "graph 32", "graph 64"]
)
def test_a_start_is_at_most_a_quarter_of_f(preset):
    """In FLOPs; on a graph, at most half. NFE does not count the start, hence this bound. f is
    evaluated at a state that is not 0, where it can skip nothing. The counter takes the sparse
    products of a graph for dense ones."""
    share = 1 / 4
    if preset in mdeq.PRESETS:
        net = mdeq.MDEQ(**mdeq.PRESETS[preset]).eval()
        u = net.inject(torch.randn(1, *mdeq.PRESETS[preset]["image"]))
    elif preset in transformer.PRESETS:
        options = transformer.PRESETS[preset] | dict(cutoffs=(20,))
        net = DEQTransformer(40, segment=5, memory=5, **options).eval()
        u = net.inject(torch.randint(40, (1, 5)))
    else:
        graph, share = Graph(torch.randint(90, (2, 200)), 90), 1 / 2
        net = IGNN(graph, 4, 3, width=int(preset.split()[1]), hidden=8).eval()
        u = net.inject(torch.randn(1, 90, 4))
    start, z, flops = net.cell.start(), torch.ones_like(net.initial(u)), []
    for part in (lambda: start(u), lambda: net.f(z, u)):
        with FlopCounterMode(display=False) as counter:
            part()
        flops.append(counter.get_total_flops())
    assert 0 < flops[0] <= share * flops[1]


def test_training_pulls_the_start_and_the_path_to_the_equilibrium(net):
    _, _ = net.requires_grad_(False), torch.manual_seed(0)
    x = torch.randn(16, 1, 8, 8)
    u = net.inject(x)
    z_K = picard(lambda z: net.f(z, u), net.initial(u), 40, last=True)
    solver = LearnedSolver(net)
    module, optimizer = LearnedSolverLoss(solver, 4), torch.optim.AdamW(solver.parameters(), 8e-3)
    history = []
    for step in range(40):
        terms = module(EndsBatch(x, z_K, step))
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        history.append({name: value.item() for name, value in terms.items()})
    assert history[-1]["start"] < 0.7 * history[0]["start"]
    assert history[-1]["path"] < 0.9 * history[0]["path"]
