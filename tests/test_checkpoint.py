"""Files are whole or absent; errors are one line, whatever else goes wrong beside them."""

import subprocess
import sys

import pytest

from checkpoint import UsageError, atomic, load, save
from evidence import tables

from .conftest import ROOT
from .sweep import sweep


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    (tmp_path / ".a.json.123.tmp").write_text("half")
    (tmp_path / ".b.json.123.tmp").write_text("another file's")
    with atomic(tmp_path / "a.json") as file:
        file.write(b"whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".b.json.123.tmp", "a.json"]


def test_where_nothing_can_be_written_the_error_says_so(tmp_path):
    """A folder that is a file, as a read-only one, fails at the clean-up, too."""
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UsageError, match=r"cannot write .*what was saved before is untouched"),
        atomic(tmp_path / "file" / "a.json"),
    ):
        pass


def test_a_sealed_file_that_lacks_something_is_named(tmp_path):
    save(tmp_path / "a.pt", "teacher", step=3, config={})
    with pytest.raises(UsageError, match=r"a\.pt lacks model; delete it"):
        load(tmp_path / "a.pt", "teacher")


@pytest.mark.parametrize("junk, complaint", [("{", "is no JSON"), ("[1]", "holds a list")])
def test_a_file_of_results_that_is_none_is_named(tmp_path, junk, complaint):
    (tmp_path / "digits.json").write_text(junk)
    with pytest.raises(UsageError, match=f"digits.json {complaint}"):
        tables.summary(tmp_path)


def test_a_bad_value_of_any_flag_is_one_line(tiny_run, capsys):
    """A seventh of the sweep over all flags of all commands; `python -m tests.sweep`: the rest."""
    count, failed = sweep(str(tiny_run), every=7)
    assert count > 100 and not failed


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
