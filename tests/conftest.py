"""Shared by the tests: a tiny network, a tiny run, and commands as a user types them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import train
from evidence.rivals import Rivals
from fpode import TimeMap
from models import Cell, Equilibrium
from models.mdeq import MDEQ
from student import Student

NONE = Rivals({}, {}, {})
ROOT = Path(__file__).parents[1]
THREADS = min(2, int(os.environ.get("OMP_NUM_THREADS", "2")))
# A whole run in a second or two: every stage, every file, no quality.
TINY = ["--teacher_steps=6", "--student_steps=6", "--batch=16", "--K=5", "--before=3"]
TINY += ["--save_every=2", "--chunk=400", "--device=cpu"]


class TanhCell(Cell):
    """f(z, u) = tanh(A z + u) with |A| = 0.6: contracts, and everything about it is known."""

    def __init__(self, n: int):
        super().__init__()
        self.channels = (n,)
        A = torch.randn(n, n, generator=torch.Generator().manual_seed(0))
        self.A = torch.nn.Parameter(0.6 * A / torch.linalg.matrix_norm(A, 2))

    def forward(self, z, u):
        return [torch.tanh(z @ self.A.T + u)]


class TanhNet(Equilibrium):
    """The smallest equilibrium model: x is the injection, the state is the logits."""

    def __init__(self, n: int = 5):
        super().__init__()
        self.cell = TanhCell(n)

    def inject(self, x):
        return x

    def initial(self, u):
        return torch.zeros_like(u)

    def head(self, z):
        return z


@pytest.fixture(autouse=True)
def two_threads():
    torch.set_num_threads(THREADS)


@pytest.fixture
def net():
    """A two-branch MDEQ with random weights whose equilibrium is not trivial."""
    torch.manual_seed(0)
    return MDEQ((1, 8, 8), 10, channels=(8, 8), head=(4, 4), final=16).eval()


@pytest.fixture
def student(net):
    return Student(net, TimeMap(rho=0.3, K=6))


@pytest.fixture
def richer(net):
    """A student with a start and an injection of its own."""
    return Student(net, TimeMap(rho=0.3, K=6), own_injection=True, start=True)


@pytest.fixture
def batch(net):
    """u and a teacher trajectory (7, 4, n) of random images."""
    torch.manual_seed(1)
    u = net.inject(torch.randn(4, 1, 8, 8)).detach()
    z = train.trajectories.anderson(lambda z: net.f(z, u), net.initial(u), 6)
    return u, z


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """A finished run folder of the TINY settings with both recipes' students."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    torch.set_num_threads(THREADS)
    fit(folder, "--recipe", "paper")
    train.main([*TINY, "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Twenty random pictures of two classes to train on, four to test, of several sizes."""
    root = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for part, n in (("train", 10), ("val", 2)):
        for label in ("n01", "n02"):
            folder = root / part / label
            folder.mkdir(parents=True)
            for i in range(n):
                size = (40 + i, 36)
                pixels = torch.randint(256, (*size[::-1], 3), generator=generator).byte().numpy()
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def fit(folder: Path, *flags: str) -> None:
    """Teacher and student with the TINY settings, without the report."""
    for stage in ("teacher", "student"):
        train.main([*TINY, *flags, "--out", str(folder), "--stage", stage])


def command(*arguments: str, processes: int = 1, **options) -> subprocess.CompletedProcess:
    """Runs a script of the repository as a user would, on one process or under torchrun."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc_per_node={processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
        **options,
    )
