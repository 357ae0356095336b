"""Files that survive a crash, and errors in one line.

A file is written whole or not at all; a damaged, foreign or incomplete one is named.
A full disk and a closed pipe end a command without a traceback.
"""

import os
import subprocess
import sys

import pytest

import train
from checkpoint import UsageError, atomic, load, save
from evidence import pages

from .conftest import ROOT, TINY


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    (tmp_path / ".a.json.123.tmp").write_text("half")
    (tmp_path / ".b.json.123.tmp").write_text("another file's")
    with atomic(tmp_path / "a.json") as file:
        file.write(b"whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.json.123.tmp", "a.json"]


def test_where_nothing_can_be_written_the_error_says_so(tmp_path):
    """The folder is a file, so that, as in a read-only folder, even the clean-up fails."""
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UsageError, match=r"cannot write .*what was saved before is untouched"),
        atomic(tmp_path / "file" / "a.json"),
    ):
        pass


def test_a_checkpoint_that_lacks_an_entry_is_named(tmp_path):
    save(tmp_path / "a.pt", "teacher", step=3, config={})
    with pytest.raises(UsageError, match=r"a\.pt lacks model; delete it"):
        load(tmp_path / "a.pt", "teacher")


@pytest.mark.parametrize("junk, complaint", [("{", "is no JSON"), ("[1]", "holds a list")])
def test_a_damaged_file_of_results_is_named(tmp_path, junk, complaint):
    (tmp_path / "digits.json").write_text(junk)
    with pytest.raises(UsageError, match=f"digits.json {complaint}"):
        pages.summary(tmp_path)


def test_a_closed_pipe_ends_a_command_quietly():
    code = "from checkpoint import plain_errors\nwith plain_errors():\n    print('x' * 10**6)"
    reader = subprocess.Popen(["head", "-c1"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=reader.stdin, stderr=subprocess.PIPE
    )
    reader.stdin.close()
    reader.wait()
    assert done.returncode == 141 and not done.stderr


def test_an_error_of_many_lines_is_one():
    code = "from checkpoint import *\nwith plain_errors():\n    raise UsageError('a\\n  b')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "-c: a b\n"


def spoilt_checkpoints(good: bytes):
    return {
        "empty": b"",
        "truncated": good[: len(good) // 2],
        "flipped": good[:-100] + bytes([good[-100] ^ 1]) + good[-99:],
        "foreign": b"PK\x03\x04 something else entirely, but long enough to have a checksum",
    }


@pytest.mark.parametrize("kind", ["empty", "truncated", "flipped", "foreign"])
def test_a_spoilt_checkpoint_is_named_with_what_to_do(kind, tiny_run, tmp_path):
    raw = spoilt_checkpoints((tiny_run / "teacher.pt").read_bytes())[kind]
    (tmp_path / "teacher.pt").write_bytes(raw)
    with pytest.raises(UsageError, match=r"teacher.pt is truncated, damaged.*delete it"):
        train.main([*TINY, f"--out={tmp_path}"])


def test_a_checkpoint_of_the_wrong_kind_is_named(tiny_run, tmp_path):
    (tmp_path / "teacher.pt").write_bytes((tiny_run / "student.pt").read_bytes())
    with pytest.raises(UsageError, match=r"is a student checkpoint, not a teacher"):
        train.main([*TINY, f"--out={tmp_path}"])


def test_a_full_disk_keeps_what_was_saved(tmp_path, monkeypatch):
    sync, calls = os.fsync, []

    def full(descriptor):
        calls.append(1)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UsageError, match=r"cannot write .*teacher.pt: No space left on device"):
        train.main([*TINY, f"--out={tmp_path}"])
    monkeypatch.undo()
    assert load(tmp_path / "teacher.pt", "teacher")["step"] == 2
    assert not list(tmp_path.glob(".*.tmp"))


def test_an_unwritable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match="cannot write there"):
        train.main([*TINY, f"--out={tmp_path / 'file' / 'run'}"])
