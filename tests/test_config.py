"""Settings: flags, recipes and defaults, and the messages for bad ones.

Flags win over the recipe, the recipe over the task's defaults.
Bad values are one line with what is allowed, and exit code 2.
A folder of another configuration is refused.
"""

import pytest
import torch

import train
from checkpoint import UsageError
from config import parse

from .conftest import TINY, command
from .sweep import sweep


def test_flags_win_over_recipes_and_recipes_over_defaults():
    config, _ = parse(["--recipe=paper", "--student_lr=0.1"])
    assert (config.start, config.aa, config.student_lr) == (False, True, 0.1)
    assert (config.name, config.out, config.preset) == ("paper", "runs/digits", "digits")


@pytest.mark.parametrize(
    "flags, complaint",
    [
        ("--task imagenot", "--task imagenot: allowed is digits"),
        ("--recipe letter", "--recipe letter: allowed is own-run . paper"),
        ("--preset huge", "--preset huge: allowed is digits"),
        ("--frobnicate 3", "unrecognized arguments: --frobnicate 3"),
        ("--student_step 3", "unrecognized arguments: --student_step 3"),
        ("--batch many", "argument --batch: invalid int value"),
        ("--m 0", "--m 0: allowed is >= 1"),
        ("--clip 0", "--clip 0.0: allowed is > 0"),
        (f"--batch {10**23}", "--batch 100000000000000000000000: allowed is >= 1"),
        ("--workers 1000000000", "--workers 1000000000: allowed is >= 0 and <= 256"),
        ("--lam1 1.5", "--lam1 1.5: allowed is >= 0 and <= 1"),
        ("--K 1", "--K 1: allowed is >= 2"),
        ("--direct 2", "unrecognized arguments: --direct 2"),
        ("--layers 0", "--layers 0: allowed is >= 1 and <= 16"),
        ("--student_lr nan", "--student_lr nan: allowed is > 0"),
        ("--kl 2", "--kl 2.0: allowed is >= 0 and <= 1"),
        ("--name ../x", "--name .*allowed are letters"),
        ("--device gpu", "--device gpu: allowed is auto . cpu . cuda"),
        ("--device cuda", "no CUDA device is there"),
    ],
)
def test_bad_flags_say_what_is_allowed(flags, complaint, tmp_path):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("this machine has the device that the test misses")
    with pytest.raises(UsageError, match=complaint):
        train.main([*flags.split(), f"--out={tmp_path}"])


def test_a_batch_that_the_processes_cannot_share_is_refused(monkeypatch, tmp_path):
    for value in ("abc", "0"):
        monkeypatch.setenv("WORLD_SIZE", value)
        with pytest.raises(UsageError, match=f"WORLD_SIZE={value}: torchrun sets it to a number"):
            train.main([*TINY, f"--out={tmp_path}"])
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UsageError, match="--batch 16 is not divisible by 3 processes"):
        train.main([*TINY, f"--out={tmp_path}"])


@pytest.mark.parametrize(
    "flag, complaint",
    [
        ("--teacher_lr=0.5", "teacher.pt was made with --teacher_lr 0.003, not 0.5"),
        ("--seed=7", "teacher.pt was made with --seed 0, not 7"),
        ("--lam1=0.1", "student.pt was made with --lam1 0.8, not 0.1"),
    ],
)
def test_a_run_folder_of_another_configuration_is_refused(flag, complaint, tiny_run):
    with pytest.raises(UsageError, match=complaint):
        train.main([*TINY, f"--out={tiny_run}", flag])


def test_bad_input_is_one_line_and_exit_code_two():
    done = command("train.py", "--task", "imagenot")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("train.py: --task imagenot: allowed is digits | ")
    assert len(done.stderr.splitlines()) == 1


def test_a_bad_value_of_any_flag_is_one_line(tiny_run, capsys):
    """A seventh of the sweep over all flags of all commands; `python -m tests.sweep`: the rest."""
    count, failed = sweep(str(tiny_run), every=7)
    assert count > 100 and not failed
