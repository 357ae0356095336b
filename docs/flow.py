r"""The whole method in the plane: a DEQ of two numbers, its flow, its solvers and its student.

    python -m docs.flow [FILE]            -> docs/flow.png

f turns a state and shrinks it by a tenth; tanh and the input x bend that. Left: one input's FP-ODE
(Eq. 2) and its flow line, Picard's spiral, Anderson's shortcut and the student's jump from z_0 = 0.
Middle: where one evaluation takes other inputs, and their equilibria. Right: error by evaluation.
"""

import sys

import torch
from matplotlib import pyplot
from torch import nn

from anderson import anderson, picard
from fpode import TimeMap, contraction, field, propose_rho, rk4
from infer import cdeq
from losses import OwnRun, OwnRunBatch
from models import Cell, Equilibrium
from student import Student

K, DECAY = 20, 0.5
TURN = torch.matrix_exp(torch.tensor([[0.0, -1.2], [1.2, 0.0]]))  # by 1.2 radians


class PlaneCell(Cell):
    channels = (2,)  # one branch of two numbers

    def __init__(self):
        super().__init__()
        self.wide, self.out = nn.Linear(2, 16), nn.Linear(16, 2, bias=False)
        self.out.weight.data = 0.9 * TURN @ torch.linalg.pinv(self.wide.weight.data)

    def forward(self, z, u):
        return [self.out(torch.tanh(self.wide(z) + u))]


class Plane(Equilibrium):
    def __init__(self):
        super().__init__()
        self.cell, self.injection = PlaneCell(), nn.Linear(2, 16)

    def initial(self, u):
        return u.new_zeros(len(u), 2)

    def head(self, z):
        return z  # there is no task, and no prediction to be learned


class PlaneStart(nn.Linear):
    """A guess of z* from u."""

    def forward(self, u):
        return [super().forward(torch.tanh(u))]


def distil(net: Equilibrium, x: torch.Tensor, updates: int = 400) -> Student:
    """A student of its own states and where Anderson's iteration ends, its running average left
    out."""
    u = net.inject(x)
    states = anderson(lambda z: net.f(z, u), net.initial(u), K)
    student = Student(net, TimeMap(propose_rho(contraction(states), K), K), anderson=False)
    student.start = PlaneStart(16, 2)
    loss, adam = OwnRun(net, student), torch.optim.Adam(student.parameters(), 2e-3)
    for _ in range(updates):
        times = student.times.schedule(int(torch.randint(1, 9, ())), DECAY)
        adam.zero_grad()
        terms = loss(OwnRunBatch(x, states[-1], times))
        (terms["distance"] + terms["start"]).backward()
        adam.step()
    return student.requires_grad_(False)


def draw(net: Equilibrium, student: Student, u: torch.Tensor) -> pyplot.Figure:
    canvas, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    f, z0 = lambda z: net.f(z, u), net.initial(u)
    ends = picard(f, z0, 500)[-1]
    one = int((f(f(z0)) - ends).norm(dim=1).argmax())  # Picard's worst
    grid = 1.7 * float(ends[one].abs().max()) * torch.linspace(-1, 1, 24)
    v = field(lambda z: net.f(z, u[one : one + 1]))(torch.cartesian_prod(grid, grid))
    v = v.view(24, 24, 2).permute(2, 1, 0).numpy()
    left.streamplot(grid.numpy(), grid.numpy(), *v, color="lightgray")
    left.plot(*rk4(f, z0, 200, h=0.1)[:, one].T, color="gray", label="flow")
    found = dict(Picard=picard(f, z0, 12), Anderson=anderson(f, z0, 12))
    found["student"] = cdeq(student, z0, u, 12, DECAY)
    for i, (name, states) in enumerate(found.items()):
        style = dict(marker="o", markersize=4, color=f"C{i}", label=name)
        left.plot(*states[:, one].T, **style)
        if name != "Anderson":  # whose first evaluation is Picard's
            middle.scatter(*states[1].T, s=8, color=f"C{i}", label=name)
        right.semilogy(((states - ends).norm(dim=2) / ends.norm(dim=1)).median(dim=1)[0], **style)
    left.plot(*ends[one], "k*", markersize=12, label="z*")
    middle.scatter(*ends.T, s=8, color="black", marker="*", label="z*")
    left.set(xlim=grid[[0, -1]].tolist(), ylim=grid[[0, -1]].tolist())
    titles = "one input", f"{len(u)} inputs, one evaluation", "median |z - z*| / |z*| by NFE"
    for axis, title in zip((left, middle, right), titles, strict=True):
        axis.set_title(title)
        axis.legend()
    return canvas


if __name__ == "__main__":
    torch.manual_seed(0)
    net, path = Plane().requires_grad_(False), (sys.argv[1:] or ["docs/flow.png"])[0]
    student = distil(net, torch.randn(512, 2))
    draw(net, student, net.inject(torch.randn(300, 2))).savefig(path, dpi=100)
    print(path)
