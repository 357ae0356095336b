"""Sampling, augmentation and the three stores.

Every store serves the states that the solver made, and the same batch at the same step.
A damaged or foreign shard is named; Eq. 13 replaces as many states as it says.
"""

import pytest
import torch

import trajectories
from anderson import Counter
from checkpoint import UsageError
from tasks import Split, positions
from trajectories import Disk, Memory, Rolling, augment, plan, sample

SPLIT = Split(torch.arange(20.0)[:, None], torch.arange(20))


def solve(x):
    """A trajectory of 5 states, each of which tells its sample and its step: z_k = (x, k)."""
    k = torch.arange(5.0)[:, None].expand(5, len(x))
    return torch.stack([x[:, 0].expand(5, -1), k], dim=-1)


def make(kind, tmp_path, batch=6, **options):
    common = dict(chunk=8, dtype=torch.float32)
    if kind == "disk":
        common |= dict(folder=tmp_path, header={"teacher": "abc", "K": 4})
    if kind == "rolling":
        common |= dict(slots=6, reuse=3)
    classes = {"memory": Memory, "disk": Disk, "rolling": Rolling}
    return classes[kind](options.pop("solve", solve), SPLIT, batch, 0, **common | options)


@pytest.mark.parametrize("kind", ["memory", "disk", "rolling"])
def test_every_store_serves_the_states_of_the_samples_it_names(kind, tmp_path):
    store = make(kind, tmp_path)
    for step in range(20):
        x, y, rows = store.batch(step)
        ks = torch.tensor([[0, 2, 4]]).expand(len(rows), 3)
        for k, z in zip((0, 2, 4), store.states(rows, ks), strict=True):
            assert torch.equal(z[:, 0], y.float()) and (z[:, 1] == k).all()
        assert torch.equal(x[:, 0], y.float()) and torch.equal(store.ends(rows), z)


@pytest.mark.parametrize("kind", ["memory", "disk", "rolling"])
def test_batches_are_a_function_of_the_step_alone(kind, tmp_path):
    """So a resumed run sees what an uninterrupted one would have seen."""
    through, fresh = make(kind, tmp_path), make(kind, tmp_path)
    seen = [through.batch(step)[1] for step in range(12)]
    assert torch.equal(fresh.batch(11)[1], seen[11])


def test_memory_and_disk_serve_the_same(tmp_path):
    a, b = make("memory", tmp_path), make("disk", tmp_path)
    for step in range(7):
        assert torch.equal(a.batch(step)[2], b.batch(step)[2])


def test_a_pass_visits_every_sample_once():
    rows, passed = positions(20, 40, 20, seed=5)
    assert passed == 2 and sorted(rows.tolist()) == list(range(20))
    pieces = [positions(20, first, 7, seed=5)[0] for first in (40, 47, 54)]
    assert torch.equal(torch.cat(pieces)[:20], rows)


def test_rolling_solves_each_chunk_once_and_uses_it_reuse_times(tmp_path):
    """6 slots in 3 chunks of 2: every pass of 6 samples replaces one chunk of 2."""
    counter = Counter(solve)
    store = make("rolling", tmp_path, solve=counter)
    uses = torch.zeros(20, dtype=torch.long)
    for step in range(30):
        uses.index_add_(0, store.batch(step)[1], torch.ones(6, dtype=torch.long))
    assert counter.nfe == 3 + 29  # the first window, then one chunk a pass
    # The 20 samples share 180 uses evenly, but for the first and last passes.
    assert uses.sum() == 180 and uses.min() >= 6


def test_rolling_needs_room_for_reuse(tmp_path):
    with pytest.raises(UsageError, match="budget holds 2: raise --cache_gb"):
        make("rolling", tmp_path, slots=2)


def test_plan_picks_by_bytes_and_prints_the_arithmetic():
    kind = lambda cache, disk: plan(1000, 10, 250, torch.float32, cache, disk)  # noqa: E731
    assert kind(0.01, 1.0)[0] == "memory"  # 1000 x 10 x 250 x 4 bytes are 0.01 GB
    assert kind(0.005, 1.0)[0] == "disk"
    assert kind(0.005, 0.005)[0] == "rolling"
    assert "1,000 samples x 10 states x 250 numbers x 4 bytes = 0.01 GB" in kind(1.0, 1.0)[1]


def test_augmentation_replaces_with_its_probability_and_spares_the_ends():
    """Eq. 13, for 1 <= k <= K - 3 only."""
    torch.manual_seed(0)
    ks = torch.arange(11).expand(4000, -1)
    out = augment(ks, torch.rand(4000, 11))
    share = (out != ks).float().mean(0)
    assert (share[[0, 8, 9, 10]] == 0).all()
    assert torch.allclose(share[1:8], torch.tensor(0.1), atol=0.02)
    assert (out[out != ks] == 10).all()


def test_one_draw_replaces_a_state_wherever_it_is_looked_up():
    """z_k is the same state as z_k of one column and as z_{k-1} of another."""
    draws = torch.rand(50, 11) / 5
    out = augment(torch.tensor([[4, 5, 4]]).expand(50, 3), draws)
    assert torch.equal(out[:, 0], out[:, 2])


def test_sampled_trajectory_is_the_solvers_own(net):
    """Alg. 4: K + 1 states from z_0, or the last one alone."""
    x = torch.randn(3, 1, 8, 8)
    z = sample(net, x, 5, m=6)
    assert z.shape[:2] == (6, 3) and (z[0] == 0).all()
    assert torch.allclose(z[1], net.f(z[0], net.inject(x)), atol=1e-6)
    (end,) = sample(net, x, 5, ends=True, m=6)
    assert torch.equal(end, z[5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_disk_shards_are_made_once_and_kept(tmp_path, dtype):
    counter = Counter(solve)
    make("disk", tmp_path, solve=counter, dtype=dtype)
    store = make("disk", tmp_path, solve=counter, dtype=dtype)
    assert counter.nfe == 3 and len(list(tmp_path.iterdir())) == 3
    assert store.states(torch.tensor([19]), torch.tensor([[4]]))[0].tolist() == [[19.0, 4.0]]


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (lambda raw: raw[:-8], "is damaged"),
        (lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), "is damaged"),
        (lambda raw: raw[:40], "is truncated or unreadable"),
        (lambda raw: b"something else", "is not a trajectory shard"),
        (lambda raw: raw.replace(b'"abc"', b'"xyz"'), "is truncated or unreadable"),
    ],
    ids=["short", "flipped", "header", "foreign", "forged"],
)
def test_a_damaged_shard_is_named_with_what_to_do(tmp_path, spoil, complaint):
    make("disk", tmp_path)
    path = tmp_path / "shard-000001.traj"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(UsageError, match=f"shard-000001.traj {complaint}.*delete it"):
        make("disk", tmp_path)


def test_a_shard_of_another_teacher_is_named(tmp_path):
    make("disk", tmp_path)
    with pytest.raises(UsageError, match=r"shard-000000.traj has teacher abc, not xyz.*delete it"):
        make("disk", tmp_path, header={"teacher": "xyz", "K": 4})


def test_every_flipped_bit_of_a_header_is_noticed(tmp_path):
    make("disk", tmp_path)
    path = tmp_path / "shard-000000.traj"
    whole = path.read_bytes()
    for bit in range(8 * 250):
        raw = bytearray(whole)
        raw[bit // 8] ^= 1 << bit % 8
        path.write_bytes(raw)
        with pytest.raises(UsageError, match=r"shard-000000.traj is.*delete it"):
            make("disk", tmp_path)


def test_a_full_disk_leaves_the_finished_shards(tmp_path, monkeypatch):
    """The second shard fails with one line; the first one is kept, and the next start continues."""
    calls = Counter(trajectories.atomic.__globals__["os"].fsync)

    def full(descriptor):
        if calls.nfe == 1:
            raise OSError(28, "No space left on device")
        calls(descriptor)

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UsageError, match=r"shard-000001.*No space left on device"):
        make("disk", tmp_path)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["shard-000000.traj"]
    counter = Counter(solve)
    make("disk", tmp_path, solve=counter)
    assert counter.nfe == 2
