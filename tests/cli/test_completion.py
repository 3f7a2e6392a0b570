"""The shells' own completion, asked as a key press asks it."""

import shutil
import subprocess

import pytest

from dmpo_lightning.commands.arguments import COMMANDS
from dmpo_lightning.commands.completion import script

ASK = """
source "$0"
for line in "$@"; do
  COMP_WORDS=($line); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=()
  _dmpo_lightning
  echo "${COMPREPLY[*]}"
done
"""
LIVE = """
zmodload zsh/zpty
zpty shell 'zsh -f -i'
zpty -w shell "PS1='> '; source $1"
sleep 3
zpty -n -w shell 'dmpo-lightning fit --trainer.max_st'$'\\t'
sleep 3
while zpty -r -t shell chunk; do print -r -- $chunk; done
zpty -d shell
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("completion")
    for shell in ("bash", "zsh"):
        (folder / shell).write_text(script(shell))
    return folder


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_options_and_names(scripts, tmp_path):
    (tmp_path / "sudoku_own.yaml").write_text("")
    asked = {
        "dmpo-lightning gene": "generate",
        "dmpo-lightning fit --trainer.max_st": "--trainer.max_steps",
        "dmpo-lightning fit --model.group": "--model.group_size",
        "dmpo-lightning test --config sudoku_": "sudoku_tiny.yaml sudoku_tiny_sft.yaml sudoku_own.yaml",
        "dmpo-lightning fit --config = sudoku_tiny_": "sudoku_tiny_sft.yaml",
        "dmpo-lightning generate --comp": "--completions --completion_length",
        "dmpo-lightning generate --sampler.temp": "--sampler.temperature",
        "dmpo-lightning plan --gpu": "--gpu_memory_gb",
        "dmpo-lightning export --mer": "--merge",
        "dmpo-lightning score --task math": "math500",
    }
    command = ["bash", "-c", ASK, str(scripts / "bash"), *asked]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert dict(zip(asked, done.stdout.splitlines(), strict=True)) == asked
    assert all(f" {command} " in script("bash").replace('"', " ") for command in COMMANDS)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_zsh_completes_at_a_key_press(scripts):
    command = ["zsh", "-f", "-c", LIVE, "zsh", str(scripts / "zsh")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "--trainer.max_steps" in done.stdout
