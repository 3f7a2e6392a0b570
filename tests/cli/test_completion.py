"""The shells' own completion, asked as a key press asks it."""

import os
import pty
import select
import shutil
import subprocess
import sys

import pytest

from dmpo_lightning.commands.arguments import COMMANDS, LIGHT
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
zpty -n -w shell "$2"$'\\t'
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
        "dmpo-lightning fit --model.objective d": "dmpo_lightning.WDCE dmpo_lightning.WDDO",
        "dmpo-lightning fit --model.objective.baseline = n": "none negative",
        "dmpo-lightning fit --model.sample_merged t": "true",
        "dmpo-lightning plan --trainer.callbacks+ = dmpo_lightning.Pre": "dmpo_lightning.Preemption",
        "dmpo-lightning fit --model.objective.reward": "--model.objective.reward_temperature",
        "dmpo-lightning generate --sampler.cache p": "prefix",
        "dmpo-lightning fit --model dmpo": "dmpo_lightning.DMPO dmpo_lightning.MaskedSFT",
        "dmpo-lightning score --task math": "math500",
        # Files stand only where a file may.
        "dmpo-lightning score --check = p": "published",
        "dmpo-lightning score --check s": "",
        "dmpo-lightning report su": "sudoku_own.yaml",
    }
    command = ["bash", "-c", ASK, str(scripts / "bash"), *asked]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert dict(zip(asked, done.stdout.splitlines(), strict=True)) == asked
    assert all(f" {command} " in script("bash").replace('"', " ") for command in COMMANDS)


PRESSED = {
    "dmpo-lightning fit --ckpt_path my": r"--ckpt_path my\ runs/",
    r"dmpo-lightning fit --ckpt_path=my\ ru": r"--ckpt_path=my\ runs/",
    "dmpo-lightning fit --ckpt_path pl": "--ckpt_path plain/",
    "dmpo-lightning report plain/l": "report plain/last.ckpt ",
    "dmpo-lightning fit --config=sudoku_tiny_": "--config=sudoku_tiny_sft.yaml ",
    "dmpo-lightning repo": "dmpo-lightning report ",
}
"""What is typed, and how a key press completes it."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a folder that has the name of a command."""
    for name in ("my runs", "plain", "report"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "last.ckpt").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TERM", "dumb")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_quotes_blanks_and_goes_on_in_folders_at_a_key_press(scripts, folder):
    child, terminal = pty.fork()
    if child == 0:
        os.execlp("bash", "bash", "--norc", "--noprofile", "-i")
    os.write(terminal, f"source {scripts / 'bash'}\n".encode())
    for typed, completed in PRESSED.items():
        os.write(terminal, typed.encode() + b"\t")
        shown = b""
        while completed.encode() not in shown and select.select([terminal], [], [], 20)[0]:
            shown += os.read(terminal, 1024)
        assert completed.encode() in shown
        # Takes the line back without running it.
        os.write(terminal, b"\x15")
    os.close(terminal)
    os.waitpid(child, 0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
@pytest.mark.parametrize("typed", [*PRESSED, "dmpo-lightning fit --trainer.max_st"])
def test_zsh_completes_at_a_key_press(typed, scripts, folder):
    command = ["zsh", "-f", "-c", LIVE, "zsh", str(scripts / "zsh"), typed]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    # The blank or slash behind it may be in bold.
    assert PRESSED.get(typed, "--trainer.max_steps").rstrip("/ ") in done.stdout


@pytest.mark.parametrize("command", ["completion bash", *(f"{name} --help" for name in LIGHT)])
def test_scripts_and_help_load_no_torch(command):
    code = (
        "import sys; from dmpo_lightning.__main__ import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'lightning', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, *command.split()], capture_output=True, check=True)
