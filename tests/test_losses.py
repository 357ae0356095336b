"""The losses against Eqs. 9 to 11 and 14, and the gradients that they give.

d is relative, per sample and branch; each term is its equation written out.
No gradient reaches the teacher or the running average.
The default recipe's states are those that inference visits.
Many phantom steps give the implicit gradient; the Jacobian term estimates |J|_F^2.
"""

import copy
import math

import pytest
import torch

import losses
from anderson import Counter, anderson
from losses import (
    Distillation,
    OwnRun,
    OwnRunBatch,
    TeacherBatch,
    TeacherLoss,
    TrajectoryBatch,
    distance,
    divergence,
    weights,
)

from .conftest import TanhNet


def test_distance_is_relative_per_sample_and_branch(net, batch):
    """An error of a tenth of the state costs 0.01 in every branch, whatever its scale."""
    _, z = batch
    assert torch.allclose(distance(1.1 * z[6], z[6], net.cell), torch.full((4,), 0.01), atol=1e-5)
    scaled = net.cell.join([v * c for v, c in zip(net.features(z[6]), (1e3, 1e-3), strict=True)])
    assert torch.allclose(
        distance(1.1 * scaled, scaled, net.cell), torch.full((4,), 0.01), atol=1e-5
    )


def test_the_weights_of_the_terms():
    """Eq. 11 for the paper's terms; distance and prediction share the default recipe's loss."""
    options = dict(lam1=0.8, lam2=0.05, kl=0.25)
    paper, ours = (weights(recipe, **options) for recipe in ("paper", "own-run"))
    assert paper == {"global": 0.8, "local": pytest.approx(0.2), "task": 0.05}
    assert ours == {"distance": 0.75, "prediction": 0.25, "start": 1.0}


def test_loss_terms_are_the_equations(net, student, batch):
    """Eqs. 9, 10, 14 written out for one batch with mixed k."""
    u, z = batch
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        u = net.inject(x)
    k = torch.tensor([1, 2, 3, 6])
    ema = copy.deepcopy(student)
    torch.nn.init.normal_(ema.W[0].weight, std=0.3)
    pick = lambda steps: z[steps.clamp(min=0), torch.arange(4)]  # noqa: E731
    states = (pick(k - 2), pick(k - 1), pick(k), z[6])
    y = torch.tensor([1, 2, 3, 4])
    early = torch.tensor([2.0, 2.0, 0.0, 0.0])
    terms = Distillation(net, student, ema)(TrajectoryBatch(x, y, k, states, early))
    t = lambda k: student.times.t(k.clamp(min=0))  # noqa: E731
    g = student.g(pick(k), pick(k - 1), t(k), t(k - 1), u)
    target = ema.g(pick(k - 1), pick(k - 2), t(k - 1), t(k - 2), u)
    ce = torch.nn.functional.cross_entropy(net.head(student.h(pick(k), t(k), u))[:2], y[:2])
    assert terms["global"].item() == pytest.approx(distance(g, z[6], net.cell).mean().item())
    assert terms["local"].item() == pytest.approx(distance(g, target, net.cell).mean().item())
    assert terms["task"].item() == pytest.approx(ce.item(), rel=1e-5)


@pytest.mark.parametrize("recipe", ["own-run", "paper"])
def test_no_gradient_reaches_teacher_or_ema(net, student, batch, recipe):
    """Alg. 2: only phi is trained."""
    _, z = batch
    ema = copy.deepcopy(student).requires_grad_(False)
    net.requires_grad_(False)
    student.requires_grad_(True)
    x, k = torch.randn(4, 1, 8, 8), torch.tensor([1, 2, 3, 4])
    if recipe == "paper":
        terms = Distillation(net, student, ema)(
            TrajectoryBatch(x, k, k, (z[0], z[1], z[2], z[6]), torch.ones(4))
        )
    else:
        terms = OwnRun(net, student)(OwnRunBatch(x, z[6], student.times.schedule(4, 0.8)))
    sum(terms.values()).backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in (*net.parameters(), *ema.parameters()))


def test_own_states_are_those_of_inference(net, student, batch):
    """The default recipe trains where Alg. 1 stands after each of J steps, with J evaluations."""
    from infer import cdeq

    _, z = batch
    x = torch.randn(4, 1, 8, 8)
    u = student.inject(x).detach()
    student.h = counter = Counter(student.h)
    times = student.times.schedule(5, 0.8)
    terms = OwnRun(net, student)(OwnRunBatch(x, z[6], times))
    assert counter.nfe == 5
    own = cdeq(student, net.initial(u), u, 5, 0.8)[1:]
    expected = torch.stack([distance(v, z[6], net.cell).mean() for v in own]).mean()
    assert terms["distance"].item() == pytest.approx(expected.item(), rel=1e-4)
    p, q = net.head(z[6]).softmax(-1), torch.stack([net.head(v) for v in own]).softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean()
    assert terms["prediction"].item() == pytest.approx(expected.item(), rel=1e-3)


def test_the_divergence_is_zero_for_the_same_prediction_alone():
    p, q = torch.randn(2, 6, 4).log_softmax(-1)
    assert divergence(p, p).item() == 0 and divergence(p, q).item() > 0
    expected = torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
    assert divergence(p, q).item() == pytest.approx(expected.item())


def test_a_start_has_a_loss_of_its_own(net, richer, batch):
    """d(start(u), z_K) is 1 before training, when the start is 0; its gradient does not go through
    f."""
    _, z = batch
    terms = OwnRun(net, richer)(
        OwnRunBatch(torch.randn(4, 1, 8, 8), z[6], richer.times.schedule(1, 0.8))
    )
    assert terms["start"].item() == pytest.approx(1)
    terms["start"].backward()
    assert all(out.bias.grad.abs().sum() > 0 for out in richer.start.out)
    assert all(p.grad is None for p in richer.cell.parameters())


def test_phantom_gradient_is_the_implicit_gradient_in_the_limit():
    """Many steps from the equilibrium are the Neumann series of the implicit-function theorem,
    dz*/dA = (I - J)^{-1} df/dA, here against the dense inverse."""
    net = TanhNet().double()
    x, y = torch.randn(1, 5, dtype=torch.float64), torch.tensor([2])
    loss = TeacherLoss(net)(TeacherBatch(x, y, steps=80, layers=60))["task"]
    (phantom,) = torch.autograd.grad(loss, net.cell.A)
    z = anderson(lambda z: net.f(z, x), torch.zeros_like(x), 80, last=True).requires_grad_(True)
    (dz,) = torch.autograd.grad(net.nll(z, y).mean(), z)
    J = torch.autograd.functional.jacobian(lambda z: net.f(z, x)[0], z)[:, 0]
    adjoint = torch.linalg.solve(torch.eye(5, dtype=torch.float64) - J.T, dz[0])
    (implicit,) = torch.autograd.grad(net.f(z.detach(), x), net.cell.A, adjoint[None])
    assert torch.allclose(phantom, implicit, atol=1e-8)


def test_jacobian_term_estimates_the_squared_norm():
    """E |v^T J|^2 / n over Gaussian v is |J|_F^2 / n, here against the full Jacobian."""
    net = TanhNet()
    x, y = torch.randn(1, 5), torch.tensor([3])
    z = anderson(lambda z: net.f(z, x), torch.zeros_like(x), 40, last=True)
    J = torch.autograd.functional.jacobian(lambda z: net.f(z, x)[0], z)[:, 0]
    module = TeacherLoss(net)
    many, labels = x.expand(4000, -1), y.expand(4000)
    estimate = module(TeacherBatch(many, labels, 40, 1, torch.randn(4000, 5)))["jacobian"]
    assert estimate.item() == pytest.approx((J.square().sum() / 5).item(), rel=0.1)


def test_the_task_loss_weighs_one_on_average():
    """App. B.4: it applies to early steps only, for any K."""
    for K in (5, 20):
        k = torch.arange(1, K + 1)
        weights = losses.early(K, k)
        assert weights.mean().item() == pytest.approx(1)
        assert (weights > 0).sum() == math.ceil(K / 4) and (weights.diff() <= 0).all()
