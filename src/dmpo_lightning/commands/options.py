"""``dmpo-lightning options``: what the classes of this package can be told. Imports no torch."""

import argparse
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence

from dmpo_lightning.commands.arguments import CommandParser, config_directory, nearest, shipped_configs
from dmpo_lightning.commands.mistakes import ROOTS, TRAINER, configuration
from dmpo_lightning.commands.signatures import Option, lines_of, options_of, public, summary

DESCRIPTION = """\
List the options of this package's classes, and those of the Trainer that its recipes set.

  dmpo-lightning options                      all places with the names of their options
  dmpo-lightning options model.objective      one place or one option: values, default and meaning
  dmpo-lightning options temperature          every option whose name or meaning has the word
"""
Group = tuple[str, str, Mapping[str, Option]]
"""A place, a class that stands there, and its options."""


def run(arguments: Sequence[str]) -> None:
    """Prints them. Raises ValueError where nothing is found."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = CommandParser("dmpo-lightning options", description=DESCRIPTION, formatter_class=formatter)
    parser.add_argument("what", nargs="?", default="", metavar="PLACE_OR_WORD")
    # As it is written on a command line.
    what = parser.parse_args([each.removeprefix("--") if "." in each else each for each in arguments]).what
    groups = list(_all())
    if not what:
        for place, path, options in groups:
            print(f"{place}: {path}\n{_wrapped(summary(path), 2)}\n{_wrapped(', '.join(options), 4)}\n")
        return
    found = [group for group in groups if group[0] == what] or [
        (place, path, chosen)
        for place, path, options in groups
        if (chosen := {name: each for name, each in options.items() if _has(f"{place}.{name}", each, what)})
    ]
    if not found:
        names = {each for place, _, options in groups for each in (place, *options)}
        raise ValueError(f"No option has {what!r} in its name or its meaning.{nearest(what, names)}")
    for place, path, options in found:
        print(f"{path}\n{_wrapped(summary(path), 2)}\n")
        for name, option in options.items():
            default = "required" if option.default is None else f"default {option.default.replace('None', 'null')}"
            text = _meaning(path, option)
            print(f"  --{place}.{name}: {option.words}; {default}" + (f"\n{_wrapped(text, 6)}" if text else ""))
        print()


def _has(place: str, option: Option, what: str) -> bool:
    is_there = what.lower() in f"{option.name} {option.text}".lower()
    return place == what if "." in what else is_there


def _meaning(path: str, option: Option) -> str:
    """What the docstring says, of a base class where it only points there."""
    pointed = re.search(r"see `(\w+)`", option.text)
    above = [each for each in lines_of(path)[1:] if pointed and each.endswith(f".{pointed[1]}")]
    options = options_of(above[0]) if above else None
    if not options or option.name not in options or pointed is None:
        return option.text
    return option.text.replace(pointed[0], options[option.name].text.removesuffix("."))


def _all() -> Iterator[Group]:
    """All places from the Trainer down, each with the classes of this package that may stand there."""
    folder = config_directory()
    stated = {name for each in shipped_configs() for name in configuration(str(folder / each)).get("trainer", {})}
    trainer = {name: each for name, each in (options_of(TRAINER) or {}).items() if name in stated}
    yield "trainer", TRAINER, trainer
    seen: set[str] = set()
    for root in ROOTS.values():
        yield from _below(root.name, root, seen)
    for option in trainer.values():
        yield from _below(f"trainer.{option.name}", option, seen)


def _below(place: str, option: Option, seen: set[str]) -> Iterator[Group]:
    own = [
        path for path in public(*option.classes).values() if lines_of(path)[0] not in option.classes or _is_only(path)
    ]
    fresh = [path for path in own if path not in seen]
    seen.update(fresh)
    for path in fresh:
        yield place, path, options_of(path) or {}
    for path in fresh:
        for each in (options_of(path) or {}).values():
            yield from _below(f"{place}.{each.name}", each, seen)


def _is_only(path: str) -> bool:
    return len(public(path)) == 1


def _wrapped(text: str, indent: int) -> str:
    return textwrap.fill(text, 100, initial_indent=" " * indent, subsequent_indent=" " * indent)
