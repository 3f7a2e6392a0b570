"""What a new user types wrong: one line that says what was meant, and status 2; and where options are found."""

import shlex
import subprocess
import sys

import pytest
from cli_runs import status

from dmpo_lightning.commands.arguments import LIGHT, config_directory
from dmpo_lightning.commands.signatures import options_of

SLIPS = [
    ("fit --config sudoku_tiny.yaml --group_size 3", "--group_size 3; `dmpo-lightning options WORD` finds options"),
    ("fit --config sudoku_tiny.yaml --model.grop_size=4", "no option DMPO.grop_size. Did you mean group_size?"),
    ("fit --config sudoku_tiny.yaml --model.group_size abc", "`model.group_size` cannot be read: Expected a int."),
    ("fit --config sudoku_tiny.yaml --data.blanks 3 5", "`data.blanks` cannot be read: Expected a tuple."),
    ("fit --config sudoku_tinny", "Did you mean sudoku_tiny.yaml?"),
    ("fti --config sudoku_tiny.yaml", "There is no command 'fti'. Did you mean fit?"),
    ("--config sudoku_tiny.yaml fit", "The command comes first."),
    ("plan", "pass --config NAME_OR_FILE, such as --config sudoku_tiny.yaml, and overlays behind it"),
    ("plan --config sudoku_tiny.yaml --gpu_memory 24", "unrecognized arguments: --gpu_memory 24"),
    ("score --task gsm8k --check publishd --file x", "Did you mean published?"),
    ("score --task gsm8k --file x --jsn", "Unrecognized arguments: --jsn. Did you mean --json?"),
    ("generate --comletions 3", "Unrecognized arguments: --comletions. Did you mean --completions?"),
    ("generate --samplr WinoSampler", "Did you mean --sampler?"),
    ("export --ckpt_path x --output y --megre", "Did you mean --merge?"),
    ("report runs --outptu x", "Did you mean --output?"),
    ("configs --cta gsm8k", "Did you mean --cat?"),
    ("report", "The following arguments are required: RUN."),
]


@pytest.mark.parametrize(("typed", "said"), SLIPS)
def test_a_slip_is_one_line(typed, said, capsys, workplace):
    assert status(*shlex.split(typed)) == 2
    # Behind the line that says what is being loaded.
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("dmpo-lightning: ")
    assert said in line


# Where options and configurations are found ---------------------------------------------------------------------------


def test_options_are_found_by_place_name_and_word(capsys):
    assert status("options") == 0
    overview = capsys.readouterr().out
    assert all(f"{place}: dmpo_lightning." in overview for place in ("model", "model.objective", "data", "data.task"))
    assert status("options", "model.objective") == 0
    shown = capsys.readouterr().out
    assert "--model.objective.negative_term: Literal['likelihood', 'log_likelihood']; default 'likelihood'" in shown
    assert "dmpo_lightning.WDDO" in shown
    assert status("options", "--data.blanks") == 0
    assert capsys.readouterr().out.splitlines()[-3:-1] == [
        "  --data.blanks: tuple[int, int]; default (8, 12)",
        "      least and most blank cells of a generated puzzle.",
    ]
    assert status("options", "temperature") == 0
    found = capsys.readouterr().out
    assert "--model.objective.reward_temperature: float; required" in found
    assert "--model.sampler.temperature: float; default 1.0" in found
    assert status("options", "tempratur") == 2
    assert capsys.readouterr().err.endswith("Did you mean temperature?\n")


def test_options_are_also_those_that_a_class_passes_on():
    options = options_of("dmpo_lightning.SudokuDataModule")
    # Its own, that of its base classes, and none that these say to each other.
    assert {"blanks", "sizes", "reward_weights", "prompts_per_buffer"} <= set(options)
    assert "task" not in options


def test_help_loads_no_torch():
    code = (
        "import sys; from dmpo_lightning.__main__ import main\n"
        f"for name in {LIGHT}:\n    try: main([name, '--help'])\n    except SystemExit: pass\n"
        "assert not {'torch', 'lightning', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_configurations_say_what_they_are_and_need(capsys):
    assert status("configs") == 0
    lines = capsys.readouterr().out.splitlines()
    said = lines[lines.index("  gsm8k.yaml") + 1]
    assert said == "      DMPO on GSM8K from LLaDA-8B-Instruct. Fits GPUs of 40 GB: about 27 GiB each."
    assert status("configs", "--cat", "gsm8k") == 0
    assert capsys.readouterr().out == (config_directory() / "gsm8k.yaml").read_text()
    assert status("configs", "--cat", "gsm9k") == 2
    assert "Did you mean gsm8k.yaml?" in capsys.readouterr().err


@pytest.mark.slow
def test_the_help_of_a_run_begins_with_where_options_are(capsys):
    assert status("fit", "--help") == 0
    assert "dmpo-lightning options" in "".join(capsys.readouterr().out.splitlines()[:4])
