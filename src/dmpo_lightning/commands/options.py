"""``dmpo-lightning options``: what the classes of this package can be told. Imports no torch."""

import textwrap
from collections.abc import Sequence

from dmpo_lightning.commands.arguments import CommandParser, config_directory, nearest, shipped_configs
from dmpo_lightning.commands.mistakes import configuration
from dmpo_lightning.commands.signatures import TRAINER, Option, options_of, places, summary

DESCRIPTION = """\
List the options of this package's classes, and those of the Trainer that its recipes set.

  dmpo-lightning options                      all places with the names of their options
  dmpo-lightning options model.objective      one place or one option: values, default and meaning
  dmpo-lightning options temperature          every option whose name or meaning has the word
"""
PARSER = CommandParser("options", DESCRIPTION)
PARSER.add_argument("what", nargs="?", default="", metavar="PLACE_OR_WORD")


def run(arguments: Sequence[str]) -> None:
    """Prints them. Raises ValueError where nothing is found."""
    # As it is written on a command line.
    what = PARSER.parse_args([each.removeprefix("--") if "." in each else each for each in arguments]).what
    groups = list(places(stated_options()))
    if not what:
        for place, path, options in groups:
            print(f"{place}: {path}\n{_wrapped(summary(path), 2)}\n{_wrapped(', '.join(options), 4)}\n")
        return
    found = [group for group in groups if group[0] == what]
    for place, path, options in groups if not found else ():
        chosen = {
            name: each
            for name, each in options.items()
            if f"{place}.{name}" == what or ("." not in what and what.lower() in f"{name} {each.text}".lower())
        }
        found += [(place, path, chosen)] * bool(chosen)
    if not found:
        names = {each for place, _, options in groups for each in (place, *options)}
        raise ValueError(f"No option has {what!r} in its name or its meaning.{nearest(what, names)}")
    for place, path, options in found:
        print(f"{path}\n{_wrapped(summary(path), 2)}\n")
        for name, option in options.items():
            default = "required" if option.default is None else f"default {option.default.replace('None', 'null')}"
            text = f"\n{_wrapped(option.text, 6)}" if option.text else ""
            print(f"  --{place}.{name}: {option.words}; {default}{text}")
        print()


def stated_options() -> dict[str, Option]:
    """The options of the Trainer that shipped configurations state."""
    folder = config_directory()
    stated = {name for each in shipped_configs() for name in configuration(str(folder / each)).get("trainer", {})}
    return {name: each for name, each in (options_of(TRAINER) or {}).items() if name in stated}


def _wrapped(text: str, indent: int) -> str:
    return textwrap.fill(text, 100, initial_indent=" " * indent, subsequent_indent=" " * indent)
