"""The job scripts: bash reads them, and the commands in them parse."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from dmpo_lightning.__main__ import main

SCRIPTS = sorted((Path(__file__).parent.parent.parent / "examples" / "slurm").iterdir())
VARIABLES = {"SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8", "MODEL": "sudoku_tiny", "RUNS": "runs", "DATA": "data"}


def command_in(script: Path) -> list[str]:
    """What ``dmpo-lightning`` is called with."""
    text = script.read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^.*dmpo[-_]lightning (fit .*)$", text, flags=re.MULTILINE)
    return shlex.split(re.sub(r"\$\{?(\w+)(?::[-?]([^}]*))?\}?", lambda m: VARIABLES.get(m[1]) or m[2], line))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_command_parses_and_asks_for_all_ranks(script, capsys):
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    arguments = [each for each in command_in(script) if each != "last"]
    arguments.remove("--ckpt_path")
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config"])
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert int(config["trainer"]["devices"]) == 8
    assert config["trainer"]["num_nodes"] in (1, 2)
    assert "dmpo_lightning.Preemption" in [each["class_path"] for each in config["trainer"]["callbacks"]]


@pytest.mark.parametrize("script", [path for path in SCRIPTS if path.suffix == ".sbatch"], ids=lambda path: path.name)
def test_jobs_are_told_before_their_end_and_continue(script):
    text = script.read_text()
    assert re.search(r"#SBATCH --signal=SIGUSR1@\d+", text)
    assert "#SBATCH --requeue" in text
    assert "--ckpt_path last" in text


@pytest.mark.parametrize("script", [path for path in SCRIPTS if path.suffix == ".sbatch"], ids=lambda path: path.name)
def test_ranks_have_the_cores_that_were_asked_for(script):
    """srun takes --cpus-per-task from sbatch no longer."""
    text = script.read_text()
    (command,) = re.findall(r"^srun .*", text, flags=re.MULTILINE)
    assert '--cpus-per-task="$SLURM_CPUS_PER_TASK"' in command
    assert re.search(r"#SBATCH --cpus-per-task=\d+", text)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_jobs_find_their_environment_and_ask_no_hub(script):
    lines = script.read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(("srun", "torchrun")))
    before = "\n".join(lines[:start])
    assert re.search(r'^source "\$\{ENVIRONMENT:', before, flags=re.MULTILINE)
    assert re.search(r"^export HF_HUB_OFFLINE=1", before, flags=re.MULTILINE)
    assert command_in(script)[command_in(script).index("--data.path") + 1] == "data"
