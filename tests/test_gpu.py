"""The measurements for a GPU, on a CPU with tiny sizes."""

import json

import pytest
import torch

from checkpoint import UsageError
from evidence import gpu

from .conftest import command


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """The file of a dry run, and what it told."""
    folder = tmp_path_factory.mktemp("dry")
    done = command("-m", "evidence.gpu", "--dry", "--results", str(folder))
    assert not done.returncode, done.stderr
    return folder / "speed-dry.json", done.stderr


def test_a_dry_run_measures_every_part(dry):
    result = json.loads(dry[0].read_text())
    found = {name: result[name]["found"] for name in gpu.PARTS}
    for kind, gb in (("image", 24), ("image", 80), ("text", 24), ("text", 80)):
        part = found[f"{kind}_{gb}_gb"]
        assert part["batch"] == gpu.DRY.batches[kind][gb]
        for name in ("teacher_update", "student_update", "solve", "answer"):
            assert part[name]["samples_per_second"] > 0
        assert [row["J"] for row in part["answers"]] == [*gpu.DRY.nfes]
    assert any("scaled_dot_product" in name for name in found["text_24_gb"]["attention"])
    assert found["graph_fp32"]["ratio"] > 0
    waits = found["host_waits_per_step"]
    assert waits.pop("anderson, image") == waits.pop("anderson, text") == 2  # LAPACK's pivots
    assert not any(waits.values())


def test_compiled_cells_have_room_for_all_their_variants(dry):
    assert "recompile_limit" not in dry[1]


def test_a_part_that_is_there_is_not_measured_again(dry, monkeypatch, capsys):
    path, _ = dry
    before = json.loads(path.read_text())
    spoiled = {**before, "graph_fp32": {**before["graph_fp32"], "commit": "another"}}
    path.write_text(json.dumps(spoiled))
    here = {key: before[key] for key in ("device", "driver", "versions", "commit")}
    monkeypatch.setattr(gpu, "machine", lambda device: here)
    gpu.main(["--dry", "--results", str(path.parent)])
    assert capsys.readouterr().err.split() == ["graph_fp32"]
    after = json.loads(path.read_text())
    assert after["graph_fp32"]["commit"] == before["commit"]
    assert all(after[name] == before[name] for name in gpu.PARTS if name != "graph_fp32")


def test_without_cuda_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(UsageError, match="no CUDA device"):
        gpu.main([])
