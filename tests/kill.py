"""Starts one command again and again, killing it at random moments, until it has finished.

usage: kill.py KILLS SEED LONGEST FLAGS...   FLAGS: of train.py; LONGEST: seconds until a kill

Prints how often it killed a living process. The libraries are loaded once and every start is a
fork of this process, so that a start costs milliseconds.
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


def start(flags: list[str]) -> int:
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        train.main(flags)
        os._exit(0)
    return child


def main(kills: int, seed: int, longest: float, flags: list[str]) -> None:
    random.seed(seed)
    killed = 0
    for _ in range(kills):
        child = start(flags)
        time.sleep(random.uniform(0.05, longest))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        killed += os.WIFSIGNALED(status)
    _, status = os.waitpid(start(flags), 0)
    assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0, status
    print("killed", killed)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4:])
