"""Compares eight processes, killed in every stage and followed by two nodes, with one process.

    python tests/eight.py [FOLDER]     twenty minutes of two busy cores; FOLDER: keeps both runs

A network of --task imagenet on small pictures, on the CPU. Eight processes under torchrun begin the
teacher, the student and the report; in the middle of each, SIGKILL ends them and their launcher,
and four finish it, on two nodes. Prints when they were killed, seconds, and the largest differences
from the same run by one process. Fails where the decay is another, or a number of the report
differs by more than 1e-4 of it. RESULTS.md says why the rates are small and there is no start.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch
from PIL import Image

from checkpoint import load

ROOT = Path(__file__).parents[1]
FLAGS = "--task=imagenet --preset=imagenet-single --image_size=32 --dtype=fp32 --cache_dtype=fp32"
FLAGS += " --batch=16 --chunk=8 --K=4 --before=3 --growing=0 --teacher_steps=6 --teacher_lr=1e-4"
FLAGS += " --student_steps=6 --student_lr=1e-5 --no-start --save_every=2 --workers=0 --device=cpu"
NODES = ("--nnodes=2", "--nproc_per_node=2", "--rdzv_endpoint=127.0.0.1:29517")
# What stands in log.jsonl behind a stage's name once it is well under way; of a report, nothing.
SIGNS = dict.fromkeys(("teacher", "student"), ', "student": "", "step": 4') | {"evaluate": ""}


def pictures(folder: Path) -> None:
    """Four classes of noise, each lighter than the last."""
    generator = torch.Generator().manual_seed(0)
    for i, label in (divmod(number, 4) for number in range(48)):
        place = folder / ("train" if i < 10 else "val") / f"n{label}"
        place.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(40 * label, 256, (40, 40, 3), generator=generator).byte().numpy()
        Image.fromarray(pixels).save(place / f"{i}.png")


def start(folder: Path, stage: str, *launcher: str) -> subprocess.Popen:
    """train.py, under torchrun if there are flags for it; its output goes beside the folder."""
    torchrun = ["-m", "torch.distributed.run", *launcher] if launcher else []
    where = [f"--data={folder.parent / 'pictures'}", f"--out={folder}", f"--stage={stage}"]
    command = [sys.executable, *torchrun, "train.py", *FLAGS.split(), *where]
    with open(folder.parent / "output.txt", "a") as output:
        options = dict(cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=output)
        return subprocess.Popen(command, stderr=output, **options)


def kill(launcher: subprocess.Popen) -> int:
    """SIGKILL to a launcher and its processes, each of which has a group of its own: how many."""
    pids = subprocess.getoutput(f"pgrep -P {launcher.pid}").split()
    for pid in (launcher.pid, *map(int, pids)):
        os.kill(pid, signal.SIGKILL)
    launcher.wait()
    return len(pids)


def broken(folder: Path) -> None:
    """A whole run: each stage begun by eight processes and finished by two nodes of two."""
    log = folder / "log.jsonl"
    for stage, more in SIGNS.items():
        launcher = start(folder, stage, "--standalone", "--nproc_per_node=8")
        sign = f'"stage": "{stage}"{more}'
        while launcher.poll() is None and not (log.exists() and sign in log.read_text()):
            time.sleep(0.01)
        time.sleep(0 if more else 5)
        killed, path = kill(launcher), folder / f"{stage}.pt"
        saved = f" after {load(path, stage)['step']} saved updates of 6" if path.exists() else ""
        print(f"{stage}: {killed} processes killed{saved}", flush=True)
        assert killed == 8 and not (folder / "report.json").exists()
        nodes = [start(folder, stage, *NODES, f"--node_rank={rank}") for rank in (0, 1)]
        assert [node.wait() for node in nodes] == [0, 0], f"see {folder.parent / 'output.txt'}"


def compared(one: Path, other: Path) -> None:
    """Prints the largest differences of two runs; of numbers below .01, shares of that."""
    for kind, part in (("teacher", "model"), ("student", "model"), ("student", "ema")):
        a, b = (load(run / f"{kind}.pt", kind) for run in (one, other))
        gaps = [(a[part][name] - b[part][name]).abs().max().item() for name in a[part]]
        print(f"{kind}, {part}: weights and statistics differ by {max(gaps):.1e} at most")
    print(f"decay: {a['decay']} and {b['decay']}")
    assert a["decay"] == b["decay"]
    rows = [json.loads((run / "report.json").read_text())["rows"] for run in (one, other)]
    for key in ("value", "nll", "residual", "distance"):
        pairs = [(x[key], y[key]) for x, y in zip(*rows, strict=True)]
        gap = max(abs(x - y) / max(abs(x), 0.01) for x, y in pairs)
        print(f"{key}: differs by {gap:.1e} of it at most")
        assert gap < 1e-4


def main(folder: Path) -> None:
    started = time.perf_counter()
    pictures(folder / "pictures")
    broken(folder / "broken")
    middle = time.perf_counter()
    assert start(folder / "one", "all").wait() == 0, f"see {folder / 'output.txt'}"
    print(f"{middle - started:.0f} seconds; one process, {time.perf_counter() - middle:.0f}")
    compared(folder / "one", folder / "broken")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path((sys.argv[1:] or [temporary])[0]).absolute())
