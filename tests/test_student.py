"""The student against Eqs. 5, 7 and 8.

A fresh student is one Anderson step of its teacher, with every option.
At the terminal time g is the identity; c_skip and c_out are those of Eq. 5.
W acts on channels and the time is broadcast, as Eq. 8 writes them.
A start stands in for z_0 and for no other state.
"""

import copy

import torch

from anderson import anderson
from fpode import TimeMap
from student import Student, update_ema


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


def test_a_fresh_student_is_the_same_with_every_option(net, student, richer):
    x, t = torch.randn(4, 1, 8, 8), student.times.t(torch.tensor([0, 1, 2, 0]))
    u = student.inject(x)
    z = torch.randn_like(net.initial(u))
    assert torch.allclose(richer.h(z, t, richer.inject(x)), student.h(z, t, u), atol=1e-5)
    z[t == student.times.eps] = 0  # a fresh start's guess
    same = zip(richer.history(z, t, u), student.history(z, t, u), strict=True)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in same)


def test_a_start_stands_in_for_z_0_alone(richer, batch):
    """At t_0 the state does not matter; at all other times the start does not."""
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


def test_an_injection_of_its_own_leaves_the_teachers_alone(net, richer):
    before = net.injection[0].weight.clone()
    with torch.no_grad():
        richer.injection[0].weight.zero_()
    assert torch.equal(net.injection[0].weight, before)
    assert "shared" not in " ".join(richer.state_dict())
