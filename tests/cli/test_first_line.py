"""What the command line says at once, and what it leaves out."""

import logging
import subprocess
import sys
import warnings

import pytest

from dmpo_lightning import __version__
from dmpo_lightning.__main__ import _announce
from dmpo_lightning.commands.fit import is_news, quiet


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


LOADING = "; loading torch and Lightning ...\n"


def test_a_command_says_what_it_loads_before_it_loads_it():
    arguments = ["--config", "/a/sudoku_tiny.yaml", "--config=b/x\x1b[2J.yaml", "--trainer.max_steps", "4"]
    code = f"import sys, dmpo_lightning.__main__ as entry; entry._announce('fit', {arguments}); "
    done = run_python(code + "print('torch' in sys.modules)")
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
