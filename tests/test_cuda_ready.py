"""CUDA correctness without CUDA: waits of the host counted, devices and dtypes checked.

If the host asks a GPU for a number, it waits until all earlier work is done, and the GPU is then
idle until new work arrives. Such questions can be counted on a CPU, too. Fake tensors, which have a
device but no numbers, also show what is copied between devices and what mixes them.
"""

import collections
import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import infer
import losses
import runs
import trajectories
from anderson import anderson, picard
from fpode import TimeMap
from models.ignn import IGNN, Graph
from models.mdeq import MDEQ
from models.transformer import DEQTransformer
from student import Student, per_sample, update_ema

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
B, WORDS, PAST = 2, 30, 4
TIMES = TimeMap(rho=0.3, K=6)
# Operations whose result has a size or a value that the host must know.
ASKS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount", "equal"}
ASKS |= {"repeat_interleave", "is_nonzero", "_pack_padded_sequence"}
OF_TENSORS = {torch.Tensor.tolist: "tolist", torch.Tensor.numpy: "numpy", torch.Tensor.cpu: "cpu"}


class Operations(TorchDispatchMode):
    """Counts what makes the host wait. It works below autograd, so it sees backward passes, too. A
    fake number is answered with a large one, which means that no step of a solve is bad."""

    def __init__(self, found: collections.Counter):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if name in ASKS:
            self.found[name] += 1
        if name in ("index", "index_put", "index_put_"):
            masks = [i for i in args[1] if i is not None and i.dtype == torch.bool]
            self.found["mask as index"] += len(masks)
        if name == "lift_fresh":  # torch.tensor, new_tensor, x[[0, 1]]: copied from the host
            self.found["numbers from the host"] += 1
        if name in ("_to_copy", "copy_"):
            there = kwargs.get("device") or args[0].device
            here = args[name == "copy_"].device
            waits = {here.type, there.type} == {"cpu", "cuda"} and not kwargs.get("non_blocking")
            self.found[f"{here.type} to {there.type}"] += waits
        if name == "_pin_memory":
            return args[0]
        if name == "_local_scalar_dense" and args[0].device.type == "cuda":
            return 10**6
        return func(*args, **kwargs)


class Methods(TorchFunctionMode):
    """Counts the methods that reach the host without an operation."""

    def __init__(self, found: collections.Counter):
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in OF_TENSORS:
            self.found[OF_TENSORS[func]] += 1
        return func(*args, **kwargs or {})


@contextlib.contextmanager
def counted():
    """Within it, a Counter of what made the host wait, by name."""
    found = collections.Counter()
    with Methods(found), Operations(found):
        yield found
    for name in [name for name, n in found.items() if not n]:
        del found[name]


def image() -> MDEQ:
    sizes = dict(channels=(8, 8), head=(4, 4), final=16, dropout=0.1)
    return MDEQ((1, 8, 8), 10, batch_norm=True, weighted=True, **sizes)


def text(cutoffs=()) -> DEQTransformer:
    sizes = dict(d=8, heads=2, inner=16, cutoffs=cutoffs, segment=PAST, memory=PAST, dropout=0.1)
    return DEQTransformer(WORDS, **sizes)


def example(net, device=CPU) -> tuple[torch.Tensor, torch.Tensor]:
    """An input and labels of a network."""
    if isinstance(net, MDEQ):
        return torch.randn(B, 1, 8, 8, device=device), torch.arange(B, device=device)
    words = torch.arange(B * 2 * PAST, device=device).view(B, -1) * 2 % WORDS
    return words, words.flip(0)


def on_gpu(*modules: nn.Module) -> None:
    """Puts fake parameters and buffers on a GPU that is not there; within a FakeTensorMode."""

    def fake(v):
        return v if v is None else torch.empty(v.shape, dtype=v.dtype, device=CUDA)

    for module in modules:
        for part in module.modules():
            part._buffers |= {name: fake(v) for name, v in part._buffers.items()}
            values = {name: fake(v) for name, v in part._parameters.items()}
            part._parameters |= {k: v if v is None else nn.Parameter(v) for k, v in values.items()}


def networks(make, aa: bool = False) -> tuple:
    """A teacher in training and the same one frozen, a student and its running average."""
    net, option = make().eval(), dict(anderson=aa, own_injection=True)
    student, ema = Student(net, TIMES, start=not aa, **option), Student(net, TIMES, **option)
    return copy.deepcopy(net).train(), net.requires_grad_(False), student, ema


def training(pupil, net, student, ema, device=CPU) -> dict:
    """Loss modules with their batches by name: a teacher's, those of a student's two recipes."""
    x, y = example(net, device)
    past, times = PAST if net.memory else 0, TIMES.schedule(3, 0.8)
    with torch.no_grad():
        u = net.inject(x)
        z = net.initial(u).float() + 1
    k, early = torch.ones(B, device=device).long(), torch.ones(B, device=device)
    trajectory = losses.TrajectoryBatch(x, y, k, (z, z + 1, z + 2, z + 3), early, past)
    probe = torch.ones_like(z) if device == CPU else None  # no fake tensor has a backward pass
    return {
        "teacher": (losses.TeacherLoss(pupil), losses.TeacherBatch(x, y, 2, 2, probe)),
        "own-run": (
            losses.OwnRun(net, student),
            losses.OwnRunBatch(x, z, times, past, own=True),
        ),
        "paper": (losses.Distillation(net, student, ema), trajectory),
    }


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: (x > 0).nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.new_tensor([1.0, 2.0]),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
    ],
)
def test_the_counter_sees(ask):
    x = torch.randn(5)
    with counted() as found:
        ask(x)
    assert found.total() == 1


def test_the_counter_sees_copies_and_mixtures_of_devices():
    with FakeTensorMode(), counted() as found:
        x = torch.randn(5).to(CUDA)
        x.to(CUDA, torch.float64)
        x.to("cpu")
        torch.randn(5).pin_memory().to(CUDA, non_blocking=True)
        with pytest.raises(RuntimeError, match=r"two .*devices"):
            x + torch.randn(5)
    assert found == {"cpu to cuda": 1, "cuda to cpu": 1}


def solve(net, solver, u, K: int):
    return solver(lambda z: net.f(z, u), net.initial(u), K, sample_dims=net.sample_dims)


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize("make", [image, text])
@pytest.mark.parametrize("solver", [anderson, picard])
def test_a_solve_waits_once_at_its_end(solver, make, device):
    """However many steps it has."""
    net = make().eval()
    with FakeTensorMode() if device == CUDA else contextlib.nullcontext():
        if device == CUDA:
            on_gpu(net)
        u = net.inject(example(net, device)[0])
        for K in (2, 7):
            with counted() as found:
                z = solve(net, solver, u, K)
            assert found == {"_local_scalar_dense": 1}
            assert z.device.type == device.type


@pytest.mark.parametrize("solver", [anderson, picard])
def test_a_solve_on_a_graph_waits_once_at_its_end(solver, monkeypatch):
    """On a GPU; a CPU asks at every step whether the state is zero. Sparse tensors are never fake:
    a copy stands for the product."""
    monkeypatch.setattr(Graph, "product", lambda graph, z: z.clone())
    net = IGNN(Graph(torch.tensor([[0], [1]]), 2), features=3, classes=4, width=8, hidden=8).eval()
    with FakeTensorMode():
        on_gpu(net)
        u = net.inject(torch.randn(1, 2, 3, device=CUDA))
        for K in (2, 7):
            with counted() as found:
                solve(net, solver, u, K)
            assert found == {"_local_scalar_dense": 1}


def test_a_tolerance_waits_at_every_step():
    net = image().eval()
    u = net.inject(example(net)[0])
    with counted() as found:
        anderson(lambda z: net.f(z, u), net.initial(u), 5, tol=1e-12)
    assert found == {"_local_scalar_dense": 5 + 1}


@pytest.mark.parametrize("make", [image, text])
@pytest.mark.parametrize("aa", [False, True])
def test_a_student_never_waits(make, aa):
    """Alg. 1 with any number of steps, and a step at times of its own for each sample."""
    net = make().eval()
    student = Student(net, TIMES, anderson=aa, start=not aa)
    x, _ = example(net)
    t = TIMES.t(torch.arange(B))
    u = student.inject(x)
    with counted() as found:
        z = infer.cdeq(student, net.initial(u), u, 4, 0.8, last=True)
        _, history = student.step(z, t, u)
        student.step(z, t, u, history)
    assert not found


@pytest.mark.parametrize("make", [image, text])
@pytest.mark.parametrize("name", ["teacher", "own-run", "paper"])
def test_an_update_never_waits(make, name):
    """Forward and backward pass, clipping and running average; the words of the text are all in the
    first cluster."""
    loss, batch = training(*networks(make))[name]
    with counted() as found:
        sum(loss(batch).values()).backward()
        nn.utils.clip_grad_norm_(loss.parameters(), 1.0)
        update_ema(copy.deepcopy(loss), loss, 0.98)
    assert not found


@pytest.mark.parametrize("name, waits", [("teacher", 2), ("own-run", 2), ("paper", 4)])
def test_a_text_with_rare_words_waits_once_for_each_embedding_and_each_likelihood(name, waits):
    """This cannot be avoided: the number of words in each cluster decides the sizes of tensors."""
    loss, batch = training(*networks(lambda: text((10, 20))))[name]
    with counted() as found:
        sum(loss(batch).values()).backward()
    assert found == {"tolist": waits}


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("aa", [False, True])
@pytest.mark.parametrize("make", [image, text])
def test_losses_stay_on_the_gpu_in_fp32(make, aa, half):
    """Devices and dtypes do not mix, and no copy is waited for. Autocast is that of a GPU, which
    keeps other operations in fp32 than that of a CPU."""
    modules = networks(make, aa)
    with FakeTensorMode():
        on_gpu(*modules)
        for loss, batch in training(*modules, CUDA).values():
            torch.set_autocast_dtype("cuda", torch.bfloat16)
            torch.set_autocast_enabled("cuda", half)
            try:
                with counted() as found:
                    terms = loss(batch)
            finally:
                torch.set_autocast_enabled("cuda", False)
            assert not found
            for term in terms.values():
                assert (term.device.type, term.dtype) == ("cuda", torch.float32)


def test_autocast_is_for_f_alone():
    """Anderson's window and weights stay fp32: if autocast does not change f, it does not change a
    bit of the solve."""
    torch.manual_seed(0)
    A, b = torch.randn(5, 5) / 5, torch.randn(3, 5)
    f = lambda z: (z[:, None] * A).sum(-1) + b  # noqa: E731
    for options in (dict(), dict(beta=0.8), dict(tol=1e-6)):
        plain = anderson(f, torch.zeros(3, 5), 8, **options)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(anderson(f, torch.zeros(3, 5), 8, **options), plain)


@pytest.mark.parametrize("make", [image, text])
def test_losses_and_times_are_fp32_under_autocast(make):
    with torch.autocast("cpu", torch.bfloat16):
        for loss, batch in training(*networks(make)).values():
            assert all(term.dtype == torch.float32 for term in loss(batch).values())
        t = TIMES.t(torch.arange(7))
        spread = per_sample(TIMES.s(t), torch.zeros(7, 3, dtype=torch.bfloat16))
    assert t.dtype == spread.dtype == torch.float32
    late = TimeMap(rho=0.5, K=20)  # its last two times are equal in bf16
    s = per_sample(late.s(late.t(torch.arange(21))), torch.zeros(21, 3, dtype=torch.bfloat16))
    assert s.unique().numel() == 21 > s.bfloat16().unique().numel()


@pytest.mark.parametrize("ends", [False, True])
def test_a_trajectory_under_autocast_has_the_dtype_of_its_injection(ends):
    """This is how it is stored."""
    net = image().eval()
    with torch.autocast("cpu", torch.bfloat16):
        states = trajectories.sample(net, example(net)[0], 3, ends)
    assert states.dtype == torch.bfloat16 and states.isfinite().all()


def test_moving_to_a_gpu_is_pinned_and_not_waited_for():
    v = torch.randn(3, 4).mT
    assert runs.moved(SimpleNamespace(device=CPU), v) is v
    with FakeTensorMode(), counted() as found:
        there = runs.moved(SimpleNamespace(device=CUDA), torch.randn(3, 4).mT)
    assert there.device.type == "cuda" and there.is_contiguous() and not found
