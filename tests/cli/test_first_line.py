"""What the command line says at once, and what it leaves out."""

import logging
import subprocess
import sys
import time
import warnings

import pytest

from dmpo_lightning import __version__
from dmpo_lightning.commands.first_line import first_line
from dmpo_lightning.commands.quiet import is_news, quiet


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--config", "/a/sudoku_tiny.yaml"], "fit, sudoku_tiny.yaml"),
        (["--config", "a.yaml", "--config=b/c.yaml", "--trainer.max_steps", "4"], "fit, a.yaml, c.yaml"),
        ([], "fit"),
        (["--config", "x\x1b[2J.yaml"], "fit, x\\x1b[2J.yaml"),
    ],
)
def test_a_command_says_what_it_is_about_to_load(arguments, what):
    expected = f"dmpo-lightning {__version__}: {what}; loading torch and Lightning ..."
    assert first_line("fit", arguments, {}) == expected
    assert first_line("fit", arguments, {"RANK": "0", "SLURM_PROCID": "0"}) == expected


def test_it_is_said_within_five_seconds(tmp_path):
    """Before torch is imported, which takes longer by itself on a busy machine."""
    command = [sys.executable, "-m", "dmpo_lightning", "fit", "--config", "sudoku_tiny.yaml"]
    started = time.perf_counter()
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        line = process.stderr.readline()
        seconds = time.perf_counter() - started
        process.kill()
    assert line == f"dmpo-lightning {__version__}: fit, sudoku_tiny.yaml; loading torch and Lightning ...\n"
    assert seconds < 5


@pytest.mark.parametrize("rank", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_one_of_several_ranks_says_it(rank):
    assert first_line("fit", [], {rank: "1"}) is None


@pytest.mark.parametrize("argument", ["--help", "-h", "--print_config", "--print_config=comments"])
def test_nothing_is_announced_that_does_not_run(argument):
    assert first_line("fit", ["--config", "a.yaml", argument], {}) is None


def test_advertisements_are_no_news():
    def record(text, *arguments):
        return logging.LogRecord("lightning.pytorch", logging.INFO, "", 0, text, arguments, None)

    assert not is_news(record("💡 Tip: For seamless cloud uploads"))
    assert not is_news(record("GPU available: %s, used: False", False))
    assert is_news(record("`Trainer.fit` stopped: `max_steps=%d` reached.", 8))


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
