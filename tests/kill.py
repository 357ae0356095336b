"""Starts one command again and again, killing it at random moments, until it has finished.

usage: kill.py KILLS SEED LONGEST FLAGS...   FLAGS: of train.py; LONGEST: seconds until a kill

Prints how often it killed a living process, and at how many different numbers of saved updates. The
libraries are loaded once and every start is a fork of this process: a start costs milliseconds.
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


def main(kills: int, seed: int, longest: float, flags: list[str]) -> None:
    random.seed(seed)
    config, _ = parse(flags)  # the task's libraries are loaded here, not in every fork
    killed, moments = 0, set()
    for _ in range(kills):
        child = start(flags)
        time.sleep(random.uniform(0.05, longest))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
        moments.add(tuple(saved(Path(config.out) / f"{stage}.pt") for stage in STAGES))
    _, status = os.waitpid(start(flags), 0)
    assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0, status
    print("killed", killed, len(moments))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])
