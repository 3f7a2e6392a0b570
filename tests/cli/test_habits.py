"""What people expect of any command: one line for a mistake, exit statuses, and folders that are found again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dmpo_lightning.__main__ import USAGE, main

SAVE = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {"every_n_train_steps": 2, "save_top_k": -1, "save_last": True},
}
SMALL = {
    "trainer": {"enable_progress_bar": False, "val_check_interval": 100, "max_steps": 2, "callbacks": [SAVE]},
    "model": {"init_args": {"micro_batch_size": 16}},
    "data": {"init_args": {"sizes": {"train": 64, "validation": 8, "test": 8}, "prompts_per_buffer": 4}},
}
OWN = """
from dmpo_lightning import GSM8K

class Impatient(GSM8K):
    def __init__(self, check):
        raise KeyboardInterrupt

def impatient(example, completion):
    raise KeyboardInterrupt

def wrong(example, completion):
    raise AssertionError("mine")
"""


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    Path("home").mkdir()
    Path("small.yaml").write_text(yaml.safe_dump(SMALL))
    Path("own_habits.py").write_text(OWN)
    Path("bad.yaml").write_text("a: [1\nb: }\n")
    return tmp_path


def fit(*options, command="fit"):
    try:
        return main([command, "--config=sudoku_tiny.yaml", "--config=small.yaml", *options])
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--config=bad.yaml"], "'bad.yaml' cannot be read: "),
        (["--config=folder"], "No configuration 'folder'"),
        (["--ckpt_path=~/no.ckpt"], "home/no.ckpt, which does not exist"),
        (["--data=dmpo_lightning.GSM8KDataModule", "--data.path=~/no.jsonl"], "home/no.jsonl"),
        (["--trainer.logger.init_args.save_dir=small.yaml/x"], "small.yaml/x/sudoku_tiny"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(options, said, workplace, capsys):
    Path("folder").mkdir()
    assert fit(*options) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dmpo-lightning: ")]
    assert len(lines) == 1
    assert said in lines[0]


def test_debug_shows_the_traceback_of_a_mistake(workplace, capsys):
    assert fit("--config=bad.yaml", "--debug") == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.splitlines()[-1].startswith("dmpo-lightning: ")


@pytest.mark.slow
def test_an_error_of_ones_own_code_keeps_its_traceback(workplace):
    with pytest.raises(RuntimeError, match="The reward failed on 16 of 16"):
        fit("--model.reward=own_habits.wrong", "--trainer.logger=false")


def test_an_interrupted_command_ends_with_130(workplace, capsys):
    assert main(["score", "--task", "own_habits.Impatient", "--file", "x.jsonl"]) == 130
    assert capsys.readouterr().err == "dmpo-lightning: interrupted\n"


@pytest.mark.slow
def test_an_interrupted_run_ends_with_130(workplace):
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


@pytest.mark.slow
def test_the_home_folder_is_found_within_a_configuration(workplace, capsys):
    Path("more.yaml").write_text(
        "trainer: {default_root_dir: ~/root, callbacks: [{class_path: lightning.pytorch.callbacks.ModelCheckpoint, "
        "init_args: {dirpath: ~/kept}}]}\n"
    )
    assert fit("--config=more.yaml", "--trainer.logger=false") == 0
    assert list(Path("home/kept").iterdir())
    assert not Path("~").exists()


def test_a_run_is_found_by_its_name_and_continued_in_its_folder(workplace):
    assert fit() == 0
    runs = Path("runs/sudoku_tiny")
    (first,) = (each for each in runs.iterdir() if not each.is_symlink())
    last = "runs/sudoku_tiny/latest/checkpoints/last.ckpt"
    assert fit(f"--ckpt_path={last}", command="validate") == 0
    assert (runs / "latest").resolve() == first.resolve(), "evaluations leave it where it is"
    assert len(list(runs.iterdir())) == 3
    for checkpoint, steps in ((last, 4), ("last", 6)):
        assert fit(f"--ckpt_path={checkpoint}", f"--trainer.max_steps={steps}") == 0
        assert len(list(runs.iterdir())) == 3
        assert (first / f"checkpoints/epoch=0-step={steps}.ckpt").is_file()


def test_the_help_says_what_statuses_mean():
    for status in ("0 ", "1 ", "2 ", "130 ", "128+N "):
        assert f"\n  {status}" in USAGE
