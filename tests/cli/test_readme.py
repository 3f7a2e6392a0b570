"""What README names is there."""

import re
from pathlib import Path

import pytest

from dmpo_lightning.__main__ import COMMANDS
from dmpo_lightning.commands.arguments import resolve_config

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_what_is_linked_exists(target):
    assert target.startswith("https://") or (REPOSITORY / target).exists()


def test_the_picture_is_small():
    (picture,) = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert (REPOSITORY / picture).read_bytes().startswith(b"\x89PNG")
    assert (REPOSITORY / picture).stat().st_size < 100_000


def test_commands_and_configurations_exist():
    commands = re.findall(r"dmpo-lightning (?!COMMAND)([a-z]+)", README)
    assert len(commands) > 15
    assert set(commands) <= set(COMMANDS)
    for name in set(re.findall(r"--config ((?!custom_task)\S+\.yaml)", README)):
        assert Path(resolve_config(name)).is_file()


def test_targets_of_make_exist():
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in set(re.findall(r"`?make ([a-z-]+)", README)):
        assert f"\n{target}:" in makefile, target


def test_lines_outside_of_tables_have_at_most_140_columns():
    long = [line for line in README.splitlines() if len(line) > 140 and not line.startswith("|")]
    assert long == []
