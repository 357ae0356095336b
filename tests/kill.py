"""Starts train.py again and again, kills it at random moments, and at last lets it finish.

usage: kill.py KILLS SEED FLAGS...   FLAGS: of train.py

A kill comes up to 50 ms after 0 to 3 checkpoints more than the last one left, so that it hits the
middle of the work however fast the machine is. Prints how often it killed a living process, and at
how many different numbers of saved updates. The libraries are loaded once and every start is a fork
of this process: a start costs milliseconds.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import torch

import train
from checkpoint import load
from config import parse

STAGES = "teacher", "student"


def start(flags: list[str]) -> int:
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        train.main(flags)
        os._exit(0)
    return child


def saved(path: Path) -> int:
    """Updates in a checkpoint."""
    return load(path, path.stem)["step"] if path.exists() else 0


def main(kills: int, seed: int, flags: list[str]) -> None:
    random.seed(seed)
    config, _ = parse(flags)  # the task's libraries are loaded here, not in every fork
    files = [Path(config.out) / f"{stage}.pt" for stage in STAGES]
    killed, moments = 0, set()

    def stamps() -> list[int]:
        return [path.stat().st_mtime_ns if path.exists() else 0 for path in files]

    for _ in range(kills):
        before, saves = stamps(), random.randrange(4)
        child, ended = start(flags), (0, 0)
        while saves and not ended[0]:
            time.sleep(0.001)
            now = stamps()
            saves -= now != before
            before, ended = now, os.waitpid(child, os.WNOHANG)
        time.sleep(random.uniform(0, 0.05))
        if not ended[0]:
            os.kill(child, signal.SIGKILL)
            ended = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(ended[1])
        moments.add(tuple(map(saved, files)))
    _, status = os.waitpid(start(flags), 0)
    assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0, status
    print("killed", killed, len(moments))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
