"""What classes can be told, as jsonargparse reads it from their signatures and docstrings."""

import argparse
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any, get_args

from jsonargparse import ArgumentParser

import dmpo_lightning

TRAINER = "lightning.pytorch.Trainer"
ROOTS = {"model": "dmpo_lightning.modules.base.PolicyModule", "data": "lightning.pytorch.LightningDataModule"}
"""The objects that a configuration states."""


@dataclass(frozen=True)
class Option:
    """An argument of a constructor."""

    words: str
    """The values that it takes."""
    default: str | None
    """None where a value is needed."""
    text: str
    """What the docstring says of it."""
    classes: tuple[str, ...]
    """Dotted paths of the classes of this package whose objects it takes."""


def options_of(path: str) -> dict[str, Option]:
    """The arguments of a class, those that it passes on to its base classes included."""
    parser: Any = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(resolve_name(path))
    found = {}
    for action in parser._actions:
        # Those that print help.
        if action.default != argparse.SUPPRESS:
            kind = getattr(action, "_typehint", action.type)
            words = re.sub(r"(?:\w+\.)+|\bNoneType\b", lambda part: "" if "." in part[0] else "None", _written(kind))
            # Earlier versions have a set of the required ones.
            is_required = action.required or action.dest in getattr(parser, "required_args", ())
            default = None if is_required else repr(action.default)
            found[action.dest] = Option(words, default, " ".join((action.help or "").split()), _classes(kind))
    return found


def places(trainer: Mapping[str, Option]) -> Iterator[tuple[str, str, Mapping[str, Option]]]:
    """All places from these options of the Trainer down, classes of this package that may stand there, and theirs."""
    yield "trainer", TRAINER, trainer
    waiting = [*((name, _public(resolve_name(path))) for name, path in ROOTS.items())]
    waiting += ((f"trainer.{name}", option.classes) for name, option in trainer.items())
    seen = set[str]()
    while waiting:
        place, classes = waiting.pop(0)
        fresh = {path: options_of(path) for path in classes if path not in seen}
        seen.update(fresh)
        yield from ((place, path, options) for path, options in fresh.items())
        waiting[:0] = [
            (f"{place}.{name}", each.classes) for options in fresh.values() for name, each in options.items()
        ]


def summary(path: str) -> str:
    """The first sentence of a class's docstring."""
    return " ".join((inspect.getdoc(resolve_name(path)) or "").partition("\n\n")[0].split())


def _written(kind: Any) -> str:
    return "any" if kind is None else inspect.formatannotation(kind)


def _classes(kind: Any) -> tuple[str, ...]:
    """The classes of this package that fit into a type, however deep they are in it."""
    if isinstance(kind, type) and kind.__module__.startswith(("dmpo_lightning.", "lightning.")):
        return _public(kind)
    return tuple(dict.fromkeys(path for part in get_args(kind) for path in _classes(part)))


def _public(base: type) -> tuple[str, ...]:
    """The classes of this package that come from a base, which itself is for those who write their own."""
    named = {name: getattr(dmpo_lightning, name) for name in dmpo_lightning._HOMES}
    own = {name: each for name, each in named.items() if isinstance(each, type) and issubclass(each, base)}
    chosen = [name for name, each in own.items() if each is not base] or own
    return tuple(f"dmpo_lightning.{name}" for name in chosen)
