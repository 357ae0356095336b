"""The student and its losses against the equations."""

import copy

import pytest
import torch

from anderson import Counter, anderson
from fpode import TimeMap
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
from student import Student, update_ema

from .conftest import TanhNet


def test_a_fresh_student_is_one_anderson_step_of_the_teacher(net, student, batch):
    """Eqs. 7, 8 with W = [I | 0] against Eqs. 3, 4 with two states."""
    u, _ = batch
    z = anderson(lambda z: net.f(z, u), net.initial(u), 2, m=2)
    t = student.times.t(torch.tensor([0, 1]))
    g, _ = student.step(z[1], t[1:], u, student.history(z[0], t[:1], u))
    c_skip = student.times.s(t[1:])
    assert torch.allclose(g, c_skip * z[1] + (1 - c_skip) * z[2], atol=1e-5)


def test_the_student_is_the_identity_at_the_terminal_time(net, student, batch):
    """Eq. 5: c_skip(T) = 1."""
    u, z = batch
    T = torch.full((4,), student.times.T)
    assert torch.allclose(student.g(z[3], z[2], T, T, u), z[3], atol=1e-6)


def test_boundary_coefficients_follow_gamma(net, batch):
    """Eq. 5: c_skip = s^gamma, c_out = 1 - s^gamma."""
    u, z = batch
    for gamma in (1.0, 2.0):
        student = Student(net, TimeMap(rho=0.3, K=6), gamma=gamma, anderson=False)
        t = student.times.t(torch.tensor([2]))
        s = student.times.s(t) ** gamma
        expected = s * z[2] + (1 - s) * net.f(z[2], u)
        assert torch.allclose(student.step(z[2], t, u)[0], expected, atol=1e-5)


def test_w_acts_on_channels_and_t_is_broadcast(net, student, batch):
    """Eq. 8 against a literal concatenation [f || t] for every branch."""
    u, z = batch
    torch.manual_seed(3)
    for p in (*student.W.parameters(), *student.w_t.parameters()):
        torch.nn.init.normal_(p)
    t = student.times.t(torch.tensor([0, 1, 2, 3]))
    s = student.times.s(t)
    expected = []
    for v, W, w_t in zip(net.features(net.f(z[1], u)), student.W, student.w_t, strict=True):
        both = torch.cat([v, s.view(4, 1, 1, 1).expand(*v.shape[:3], 1)], dim=3)
        expected.append(both @ torch.cat([W.weight, w_t[:, None]], 1).T + W.bias)
    assert torch.allclose(student.h(z[1], t, u), net.cell.join(expected), atol=1e-5)


def test_without_history_is_a_repeated_state(student, batch):
    """Alg. 1, l. 1: at k = 0, P = h; z_{-1} = z_0 gives the same."""
    u, z = batch
    t = torch.zeros(4) + student.times.eps
    assert torch.allclose(student.g(z[0], z[0], t, t, u), student.step(z[0], t, u)[0], atol=1e-6)


def test_features_and_join_are_inverse_views(net, batch):
    _, z = batch
    branches = net.features(z[2])
    assert [tuple(v.shape) for v in branches] == [(4, 8, 8, 8), (4, 4, 4, 8)]
    assert torch.equal(net.cell.join(branches), z[2])
    assert branches[0].data_ptr() == z[2].data_ptr()


def test_ema_moves_by_one_minus_mu(student):
    ema = copy.deepcopy(student)
    before = ema.W[0].weight.clone()
    torch.nn.init.ones_(student.W[0].weight)
    update_ema(ema, student, 0.9)
    assert torch.allclose(ema.W[0].weight, 0.9 * before + 0.1, atol=1e-6)


def test_distance_is_relative_per_sample_and_branch(net, batch):
    """A tenth of each state costs 0.01 in every branch, whatever the states' scales."""
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


@pytest.fixture
def richer(net):
    """A student with a start and an injection of its own."""
    return Student(net, TimeMap(rho=0.3, K=6), own_injection=True, start=True)


def test_a_fresh_student_is_the_same_with_every_option(net, student, richer):
    x, t = torch.randn(4, 1, 8, 8), student.times.t(torch.tensor([0, 1, 2, 0]))
    u = student.inject(x)
    z = torch.randn_like(net.initial(u))
    assert torch.allclose(richer.h(z, t, richer.inject(x)), student.h(z, t, u), atol=1e-5)
    z[t == student.times.eps] = 0  # a fresh start's guess
    same = zip(richer.history(z, t, u), student.history(z, t, u), strict=True)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in same)


def test_a_start_stands_in_for_z_0_alone(richer, batch):
    """At t_0 nothing is seen of the state; elsewhere nothing of the start."""
    u, z = batch
    t = richer.times.t(torch.tensor([0, 3, 0, 5]))
    fresh = richer.history(z[2], t, u)
    for p in richer.start.parameters():
        torch.nn.init.normal_(p, std=0.1)
    h, r = richer.history(z[2], t, u)
    assert torch.equal(h[1::2], fresh[0][1::2]) and torch.equal(r[1::2], fresh[1][1::2])
    guess = richer.guess(u)
    assert guess.abs().mean() > 0.01 and torch.allclose((h - r)[::2], guess[::2], atol=1e-5)
    alone = richer.step(z[3], richer.times.eps, u)[0]
    assert torch.allclose(alone[::2], h[::2], atol=1e-5)


def test_a_start_has_a_loss_of_its_own(net, richer, batch):
    """d(start(u), z_K): 1 for a fresh one, which is 0, and a gradient that f has no part in."""
    _, z = batch
    terms = OwnRun(net, richer)(
        OwnRunBatch(torch.randn(4, 1, 8, 8), z[6], richer.times.schedule(1, 0.8))
    )
    assert terms["start"].item() == pytest.approx(1)
    terms["start"].backward()
    assert all(out.bias.grad.abs().sum() > 0 for out in richer.start.out)
    assert all(p.grad is None for p in richer.cell.parameters())


def test_an_injection_of_its_own_leaves_the_teachers_alone(net, richer):
    before = net.injection[0].weight.clone()
    with torch.no_grad():
        richer.injection[0].weight.zero_()
    assert torch.equal(net.injection[0].weight, before)
    assert "shared" not in " ".join(richer.state_dict())


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
