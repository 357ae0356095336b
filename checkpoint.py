"""Files that survive a crash: written whole or not at all, and loaded without running code.

Every result goes through `atomic`: it is written under a temporary name, synced to the disk, then
renamed over the old file, so that a reader sees the old contents or the new ones, never a mixture.
`UsageError` stands for all bad input: commands print it as a single line and exit with code 2.
"""

import glob
import hashlib
import io
import os
import pickle
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import torch


class UsageError(Exception):
    """Bad input, in one line: what was wrong, and what is allowed or what to do."""


@contextmanager
def plain_errors() -> Iterator[None]:
    """Around a command's main: bad input becomes one line on stderr and exit code 2."""
    program = Path(sys.argv[0]).name
    try:
        yield
    except (UsageError, FloatingPointError) as error:  # the latter: a solver met a diverged f
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the last flush
        sys.exit(141)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        print(f"{program}: {error.strerror or error}{where}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{program}: interrupted; the same command continues", file=sys.stderr)
        sys.exit(130)


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears under `path` only when it is complete and on the disk. Temporary
    files of writers that were killed are removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            left.unlink(missing_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {error.strerror or error}; what was saved before is untouched, "
            "make room or choose another folder and start again to continue"
        ) from error
    finally:
        with suppress(OSError):  # where nothing can be written, nothing can be removed
            temporary.unlink(missing_ok=True)


def save(path: Path, kind: str, **contents) -> None:
    """Writes a checkpoint of tensors, numbers, strings and containers of them, with a checksum."""
    buffer = io.BytesIO()
    torch.save({"kind": kind, "versions": versions(), **contents}, buffer)
    with atomic(path) as file:
        file.write(hashlib.sha256(buffer.getbuffer()).digest() + buffer.getbuffer())


def contents_of(path: Path, advice: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; {advice}") from error


def ours(raw: bytes) -> bool:
    """Whether these are the bytes of a whole checkpoint of `save`."""
    return hashlib.sha256(raw[32:]).digest() == raw[:32]


def load(path: Path, kind: str) -> dict:
    """Reads a checkpoint of `save` onto the CPU; UsageError names a damaged or foreign file."""
    advice = f"delete it and run train.py again, or name another {kind}"
    raw = contents_of(path, advice)
    if not ours(raw):
        raise UsageError(f"{path} is truncated, damaged or no checkpoint of this project; {advice}")
    try:
        contents = torch.load(io.BytesIO(raw[32:]), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UsageError(f"{path} holds more than tensors and numbers; {advice}") from error
    if contents.get("kind") != kind:
        raise UsageError(f"{path} is a {contents.get('kind')} checkpoint, not a {kind}; {advice}")
    if missing := {"config", "step", "model"} - contents.keys():
        raise UsageError(f"{path} lacks {', '.join(sorted(missing))}; {advice}")
    return contents


def load_weights(part, state: dict, path: Path) -> None:
    """part.load_state_dict(state); UsageError where the sizes are those of other data."""
    try:
        part.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{path} does not fit the data at hand (another vocabulary, other classes): {reason}"
        ) from error


def same_data(path: Path, checkpoint: dict, data: str) -> None:
    """UsageError where a checkpoint was trained on other data than those at hand."""
    if checkpoint.get("data", data) != data:
        raise UsageError(
            f"{path} was trained on other data than those at hand (fingerprint "
            f"{checkpoint['data']}, not {data}); name its own by --data, or choose another --out"
        )


def same_teacher(path: Path, checkpoint: dict, teacher: torch.nn.Module) -> None:
    """UsageError where a student or learned solver was trained with another teacher."""
    if checkpoint["teacher"] != fingerprint(teacher):
        raise UsageError(
            f"{path} was distilled from another teacher than the one beside it; delete it"
        )


def fingerprint(module: torch.nn.Module) -> str:
    """Sixteen hexadecimal digits that change with any weight of the module."""
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Software that a number depends on, the driver of a GPU among it."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    driver = Path("/proc/driver/nvidia/version")
    return found | ({"driver": driver.read_text().splitlines()[0]} if driver.exists() else {})


def provenance() -> dict:
    """The command and commit behind a result; a commit ending in '+' had uncommitted changes."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", here, *arguments], capture_output=True, text=True)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
    local, nodes = (os.environ.get(name) for name in ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"))
    many = f"--nnodes={nodes} " * (nodes not in (None, "1"))
    launcher = f"torchrun {many}--nproc_per_node={local}" if local else "python"
    script = Path(sys.argv[0])
    module = script.parent.name == "evidence"
    program = f"-m evidence.{script.stem}" if module else script.name
    command = " ".join([launcher, program, *sys.argv[1:]])
    return {"command": command, "commit": git("rev-parse", "HEAD") + ("+" if changed else "")}
