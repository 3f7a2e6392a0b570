"""What the comments of the shipped configurations say that they need is what the command beside them says."""

import json
import re
import shlex
from pathlib import Path

import pytest

from dmpo_lightning.__main__ import main
from dmpo_lightning.commands.arguments import resolve_config, shipped_configs

SAID = re.compile(r"[Aa]bout (\d+) GiB[^,]*, by `dmpo-lightning (plan [^`]+)`")


def said_by(name: str) -> list[tuple[str, str, str]]:
    """Name, gibibytes and command of each such comment, lines joined."""
    text = Path(resolve_config(name)).read_text().replace("\n# ", " ")
    return [(name, *found) for found in SAID.findall(text)]


COMMENTS = [each for name in shipped_configs() for each in said_by(name)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "gibibytes", "command"), COMMENTS)
def test_a_comment_names_what_plan_prints(name, gibibytes, command, capsys):
    assert main([*shlex.split(command), "--json"]) in (0, None)
    required = json.loads(capsys.readouterr().out)["memory_per_gpu"]["required"]
    assert round(required / 2**30) == int(gibibytes)


def test_every_configuration_that_needs_a_gpu_says_how_much():
    names = {name for name, *_ in COMMENTS}
    assert {"gsm8k.yaml", "sft.yaml", "overlays/illada.yaml", "overlays/full_finetuning.yaml"} <= names
    assert len(COMMENTS) >= 13
