"""What people expect of any command: it speaks at once, one line for a mistake, exit statuses, folders found again."""

import logging
import os
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from cli_runs import KEEPS_LAST, tiny

from dmpo_lightning import __version__
from dmpo_lightning.__main__ import _announce, main
from dmpo_lightning.commands.fit import is_news, quiet

LOADING = "; loading torch and Lightning ...\n"
OWN = """
import signal

from lightning.pytorch import Callback

from dmpo_lightning import GSM8K

class Broken(Callback):
    def on_train_batch_start(self, *arguments):
        raise RuntimeError("mine")

class Pressed(Callback):
    def on_train_batch_end(self, trainer, *arguments):
        if trainer.global_step == 2:
            signal.raise_signal(signal.SIGINT)

class Impatient(GSM8K):
    def __init__(self, check):
        raise KeyboardInterrupt

def impatient(example, completion):
    signal.raise_signal(signal.SIGINT)

def wrong(example, completion):
    raise AssertionError("mine")
"""


@pytest.fixture
def with_own_code(workplace):
    Path("own_habits.py").write_text(OWN)
    return workplace


# What is said, and what is left out -----------------------------------------------------------------------------------


def test_a_command_says_what_it_loads_before_it_loads_it():
    arguments = ["--config", "/a/sudoku_tiny.yaml", "--config=b/x\x1b[2J.yaml", "--trainer.max_steps", "4"]
    code = f"import sys, dmpo_lightning.__main__ as entry; entry._announce('fit', {arguments}); "
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == f"dmpo-lightning {__version__}: fit, sudoku_tiny.yaml, x\\x1b[2J.yaml{LOADING}"
    assert done.stdout == "False\n"


@pytest.mark.parametrize("rank", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_the_first_of_several_ranks_says_it(rank, monkeypatch, capsys):
    for number, said in (("1", ""), ("0", f"dmpo-lightning {__version__}: fit{LOADING}")):
        monkeypatch.setenv(rank, number)
        _announce("fit", [])
        assert capsys.readouterr().err == said


@pytest.mark.parametrize("argument", ["--help", "-h", "--print_config", "--print_config=comments"])
def test_nothing_is_announced_that_does_not_run(argument, capsys):
    _announce("fit", ["--config", "a.yaml", argument])
    assert capsys.readouterr().err == ""


def test_advertisements_are_no_news():
    def record(text, *arguments):
        return logging.LogRecord("lightning.pytorch", logging.INFO, "", 0, text, arguments, None)

    assert not is_news(record("💡 Tip: For seamless cloud uploads"))
    assert not is_news(record("GPU available: %s, used: False", False))
    assert not is_news(record("`Trainer.fit` stopped: `max_steps=%d` reached.", 8))
    assert is_news(record("`Trainer.fit` stopped: No training batches."))


@pytest.mark.parametrize(("options", "shown"), [([], []), (["error::UserWarning"], ["old"])])
def test_deprecations_are_left_out_unless_python_was_told_to_show_some(monkeypatch, options, shown):
    monkeypatch.setattr("sys.warnoptions", options)
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "handlers", [])
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        quiet()
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        warnings.warn("of this package", UserWarning, stacklevel=1)
    assert [str(each.message) for each in given] == [*shown, "of this package"]


# How a command ends ---------------------------------------------------------------------------------------------------


def test_debug_shows_the_traceback_of_a_mistake(workplace, capsys):
    Path("bad.yaml").write_text("a: [1\nb: }\n")
    assert tiny("fit", "--config=bad.yaml", "--debug") == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.splitlines()[-1].startswith("dmpo-lightning: ")


@pytest.mark.slow
def test_an_error_of_ones_own_code_keeps_its_traceback(with_own_code):
    with pytest.raises(RuntimeError, match="The reward failed on 16 of 16"):
        tiny("fit", "--trainer.max_steps=2", "--model.reward=own_habits.wrong", "--trainer.logger=false")


def test_an_interrupted_command_ends_with_130(with_own_code, capsys):
    assert main(["score", "--task", "own_habits.Impatient", "--file", "x.jsonl"]) == 130
    assert capsys.readouterr().err == "dmpo-lightning: interrupted\n"


@pytest.mark.slow
def test_an_interrupted_run_ends_with_130(with_own_code):
    arguments = ["fit", "--config=sudoku_tiny.yaml", "--config=small.yaml", "--trainer.logger=false"]
    arguments.append("--model.reward=own_habits.impatient")
    command = [sys.executable, "-m", "dmpo_lightning", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 130, done.stderr


def test_a_reader_that_has_enough_ends_the_command_quietly():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "dmpo_lightning", "configs"], stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


# Folders --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_home_folder_is_found_within_a_configuration(workplace):
    Path("more.yaml").write_text(
        "trainer: {default_root_dir: ~/root, callbacks: [{class_path: lightning.pytorch.callbacks.ModelCheckpoint, "
        "init_args: {dirpath: ~/kept}}]}\n"
    )
    assert tiny("fit", "--config=more.yaml", "--trainer.logger=false", "--trainer.max_steps=2") == 0
    assert list(Path("home/kept").iterdir())
    assert not Path("~").exists()


def test_a_run_is_found_by_its_name_and_continued_in_its_folder(workplace):
    assert tiny("fit", "--trainer.max_steps=2", KEEPS_LAST) == 0
    runs = Path("runs/sudoku_tiny")
    (first,) = (each for each in runs.iterdir() if not each.is_symlink())
    last = "runs/sudoku_tiny/latest/checkpoints/last.ckpt"
    assert tiny("validate", f"--ckpt_path={last}") == 0
    assert (runs / "latest").resolve() == first.resolve(), "evaluations leave it where it is"
    (second,) = (each for each in runs.iterdir() if each.name.startswith("2") and each != first)
    assert second.name.endswith("_validate")
    assert (runs / "latest_validate").resolve() == second.resolve()
    for checkpoint, steps in ((last, 4), ("last", 6)):
        assert tiny("fit", f"--ckpt_path={checkpoint}", f"--trainer.max_steps={steps}", KEEPS_LAST) == 0
        assert len(list(runs.iterdir())) == 4
        assert (first / f"checkpoints/epoch=0-step={steps}.ckpt").is_file()


def test_an_interrupted_run_says_what_is_saved_and_the_command_that_goes_on(with_own_code, capsys):
    Path("own habits.yaml").write_text("trainer: {max_steps: 4}")
    assert tiny("fit", "--config", "own habits.yaml", "--trainer.callbacks+=own_habits.Pressed") == 130
    deed, place, saved, *rest = capsys.readouterr().out.strip().splitlines()
    (run,) = Path("runs/sudoku_tiny").glob("2*")
    assert deed.startswith("Interrupted, trained 2 of 4 steps on 16 rollouts in 00:0")
    assert place == f"  directory   {run}"
    assert saved == f"  checkpoint  {run}/checkpoints/preempted.ckpt, of step 2"
    assert rest[-2] == "Next:"
    _, *command = shlex.split(rest[-1])
    assert command[-2:] == ["--ckpt_path", "last"]
    # Without the one who presses.
    assert main([each for each in command if "Pressed" not in each]) == 0
    deed, _, saved, page, _, generate, export, report = capsys.readouterr().out.strip().splitlines()
    assert deed.startswith("Trained 4 of 4 steps on 32 rollouts")
    assert saved == f"  checkpoint  {run}/checkpoints/epoch=0-step=4.ckpt, of step 4"
    assert page == f"  page        {run}/report.html"
    assert (run / "report.html").is_file()
    for line in (generate, export, report):
        assert main(shlex.split(line)[1:]) == 0, line


def test_a_start_that_fails_leaves_no_folder_and_its_version_is_free(with_own_code):
    named = "--trainer.logger.version=exp1"
    with pytest.raises(RuntimeError, match="mine"):
        tiny("fit", named, "--trainer.callbacks+=own_habits.Broken")
    assert not Path("runs").exists()
    assert tiny("fit", named, "--trainer.max_steps=2") == 0
    assert sorted(each.name for each in Path("runs/sudoku_tiny").iterdir()) == ["exp1", "latest"]
