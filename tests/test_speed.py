"""The measurements of speed and memory, on a CPU with tiny sizes.

Every part is measured; what is there is not measured again; lack of memory is reported.
"""

import json

import pytest
import torch

from checkpoint import UsageError
from evidence import speed

from .conftest import command

PARTS = speed.PARTS.keys() | speed.CUDA.networks.keys()


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """The file of a dry run, and its contents."""
    folder = tmp_path_factory.mktemp("dry")
    done = command("-m", "evidence.speed", "--dry", "--results", str(folder))
    assert not done.returncode, done.stderr
    return folder / "speed-dry.json", done.stderr


def test_a_dry_run_measures_every_part(dry):
    found = json.loads(dry[0].read_text())
    assert found["measured"].keys() == PARTS
    for name in ("image_24_gb", "image_80_gb", "text_24_gb", "text_80_gb", "graph_fp32"):
        part = found[name]
        for job in ("teacher_update", "student_update", "solve", "answer"):
            assert part[job]["samples_per_second"] > 0
        assert [row["J"] for row in part["student_step"]] == [*speed.DRY.nfes]
        assert part["floor"]["ratio"] > 0
        asked = name.startswith("graph")  # whether its state is 0
        waits = part["host_waits_per_step"]
        assert waits.pop("anderson") == 2 + asked  # LAPACK's pivots
        assert {*waits.values()} == {asked}
    for name in ("image_compiled", "text_compiled"):
        assert found[name].keys() == {"preset", "batch", "teacher_update", "answer"}
    assert any("scaled_dot_product" in name for name in found["text_24_gb"]["floor"]["attention"])
    assert len(found["graph_scaling"]) == 2 and (dry[0].parent / "speed-graphs.png").exists()
    unknown = [name for name in PARTS - {"graph_bf16"} if "not_measured" in json.dumps(found[name])]
    assert not unknown  # a CPU may have no sparse product in bf16


def test_compiled_cells_have_room_for_all_their_variants(dry):
    assert "recompile_limit" not in dry[1]


def test_a_part_that_is_there_is_not_measured_again(dry, monkeypatch, capsys):
    path, _ = dry
    before = json.loads(path.read_text())
    here = before["measured"]["reading"]
    spoiled = {**here, "commit": "another"}
    path.write_text(json.dumps(before | {"measured": before["measured"] | {"reading": spoiled}}))
    monkeypatch.setattr(
        speed, "provenance", lambda: {key: here[key] for key in ("command", "commit")}
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: here["threads"])
    speed.main(["--dry", "--results", str(path.parent)])
    assert capsys.readouterr().err.split() == ["reading"]
    after = json.loads(path.read_text())
    assert after["measured"] == before["measured"]
    assert all(after[name] == before[name] for name in PARTS - {"reading"})


def test_only_one_part_is_measured_and_others_stay(tmp_path, capsys):
    """Parts of an older file have the command and commit at its top."""
    path = tmp_path / "speed-dry.json"
    path.write_text(json.dumps({"commit": "old", "solver_overhead": [1]}))
    speed.main(["--dry", "--only", "reading", "--results", str(tmp_path)])
    found = json.loads(path.read_text())
    assert found["commit"] == "old" and found["solver_overhead"] == [1]
    assert found["reading"]["per_second"] > 0 and found["measured"].keys() == {"reading"}
    with pytest.raises(UsageError, match="--only pictures: allowed is solver_overhead"):
        speed.main(["--dry", "--only", "pictures", "--results", str(tmp_path)])


def test_lack_of_memory_is_reported(capsys):
    def job(where):
        raise torch.OutOfMemoryError("out of memory\nand more")

    assert speed.attempt(job, speed.DRY) == {"not_measured": "out of memory"}


def test_without_cuda_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(UsageError, match="no CUDA device"):
        speed.main(["--device", "cuda"])
