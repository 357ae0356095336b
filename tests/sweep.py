"""Tries bad and unusual values of every flag: each is taken, or refused in one line.

    python -m tests.sweep [RUN]      all of them, a minute or two; RUN: a finished run folder

A case fails where anything but UsageError is raised, where its message has more than one line, or
where a value is accepted and not what the settings hold.
"""

import dataclasses
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator

import infer
import runs
from checkpoint import UsageError
from config import Config, parse
from evidence import chains, compare, pages, rivals, speed

VALUES = ("", "-1", "0", "nan", "inf", "-inf", "1e23", "1" + "0" * 23, "abc", "é\n", "../x", "1 2")
INFER = "nfe batch decay tol max-nfe tokens temperature top-k seed student memory split data "
INFER += "device unreadable files prompt"
COMPARE = ("task", "part", "seeds", "results")


def settings(out: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every flag of train.py with every value, for a task of each kind."""
    for task, field, value in itertools.product(
        ("digits", "digits-graph", "imagenette"), dataclasses.fields(Config), VALUES
    ):
        if task != "digits" and field.name not in ("preset", "image_size", "width", "unreadable"):
            continue
        flags = [f"--task={task}", f"--out={out}", f"--{field.name}={value}"]

        def taken(flags=flags, name=field.name, value=value) -> None:
            config, task = parse(flags)
            held = getattr(config, name)
            if value and str(held) != value and float(value) != held:
                raise AssertionError(f"{name} is {held}")
            if name in ("batch", "accumulate", "device"):
                runs.begin(config, task)

        yield " ".join(["train.py", *flags]), taken


def answers(run: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every flag of infer.py with every value, beside one that ends it before it works."""
    for name, value in itertools.product(INFER.split(), VALUES):
        flags = [f"--run={run}", f"--{name}={value}"]
        stop = [] if name in ("tokens", "prompt") else ["--prompt=The"]
        yield " ".join(["infer.py", *flags]), lambda flags=[*flags, *stop]: infer.main(flags)


def comparisons(out: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Flags of compare.py and chains.py, with `--finished`, on runs that do not exist."""
    for name, value in itertools.product(COMPARE, VALUES):
        flags = [f"--results={out}", f"--{name}={value}", "--finished"]
        yield " ".join(["compare", *flags]), lambda flags=flags: compare.main(flags)
    for name, value in itertools.product(("tasks", "seeds", "results"), VALUES):
        flags = [f"--results={out}", f"--{name}={value}", "--finished"]
        yield " ".join(["chains", *flags]), lambda flags=flags: chains.main(flags)


def measurements(out: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Flags of the other commands of evidence/, beside one that ends them before they work."""
    for name, value in itertools.product(("only", "frobnicate"), VALUES):
        flags = [f"--{name}={value}", f"--results={out}"]
        yield " ".join(["speed", *flags]), lambda flags=flags: speed.main(flags)
        yield " ".join(["pages", *flags]), lambda flags=flags: pages.main(flags)
        yield " ".join(["rivals", *flags]), lambda flags=flags: rivals.main(flags)


def sweep(run: str, every: int = 1) -> tuple[int, list[str]]:
    """The number of cases tried, and those that failed, with what happened. every: 7 means that
    every seventh case is tried."""
    failed, count = [], 0
    with tempfile.TemporaryDirectory() as out:
        cases = itertools.chain(settings(out), answers(run), comparisons(out), measurements(out))
        for command, act in itertools.islice(cases, 0, None, every):
            count += 1
            try:
                act()
            except UsageError as error:
                if "\n" in " ".join(str(error).split()):
                    failed.append(f"{command}: several lines")
            except BaseException as error:
                failed.append(f"{command}: {type(error).__name__} {error}")
    return count, failed


if __name__ == "__main__":
    count, failed = sweep((sys.argv[1:] or ["runs/digits"])[0])
    print(*failed, f"{count} cases, {len(failed)} failed", sep="\n")
    sys.exit(bool(failed))
