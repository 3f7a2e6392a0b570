"""``dmpo-lightning configs``: the shipped configurations, with what each is for and what it needs."""

import re
from collections.abc import Sequence
from pathlib import Path

from dmpo_lightning.commands.arguments import CommandParser, config_directory, resolve_config, shipped_configs

DESCRIPTION = """\
List the configurations that --config takes by name, each with what it is and needs, as its first lines say it.

  dmpo-lightning configs --cat gsm8k.yaml > own.yaml      a copy of one to change
"""
NEEDS = re.compile(r"[^.]*(?:GiB|pip install)[^,.]*")
"""What a comment says of the room that is needed."""
PARSER = CommandParser("configs", DESCRIPTION)
PARSER.add_argument("--cat", metavar="NAME", help="print this one")


def run(arguments: Sequence[str]) -> None:
    """Prints them. Raises ValueError for a name that is not there."""
    name = PARSER.parse_args(arguments).cat
    if name is not None:
        print(Path(resolve_config(name)).read_text(encoding="utf-8"), end="")
        return
    print(f"in {config_directory()}:")
    for each in shipped_configs():
        print(f"  {each}\n      {described((config_directory() / each).read_text(encoding='utf-8'))}")


def described(text: str) -> str:
    """The first sentence of a configuration's comment, and what it says of the room that is needed."""
    comment = " ".join(line.lstrip("# ") for line in text.partition("\n\n")[0].splitlines() if line.startswith("#"))
    first = re.split(r"(?<=[^.])[.;:](?= |$)", comment)[0]
    needs = NEEDS.search(comment)
    return f"{first}.{f' {needs[0].strip()}.' if needs and needs[0].strip() not in first else ''}"
