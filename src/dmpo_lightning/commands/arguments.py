"""Command lines as people write them, turned into what the parser merges as they mean it. Imports nothing heavy."""

import json
import math
import re
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dmpo_lightning.commands.configs import resolve_config

BACKBONE = "dmpo_lightning.Backbone"
MODEL_OPTIONS = ("--model.model", "--model.init_args.model")
"""The option that is a name or a `Backbone`."""
TEXTS = ("--prompt", "--prefill")
"""Options whose value is what somebody says, neither a path nor YAML."""
NULLS = ("null", "Null", "NULL", "~")
"""As YAML writes it."""
YAML = (".yaml", ".yml", ".json")
MOST_VALUES = 100_000
"""Of a configuration. Those shipped have less than two hundred."""


def resolve_arguments(arguments: Sequence[str]) -> list[str]:
    """Resolves names of configurations, and sees to it that a name and a `Backbone` are merged.

    The parser itself would replace one by the other: a file of one's own that says where the model lies would drop the
    adapter of the recipe before it, without a word. It also refuses null for an option of an object (``--model.sampler
    .denoising_steps null``), which it takes from a configuration.

    Raises:
        ValueError: a configuration that does not exist or cannot be read.
    """
    merger = _ModelMerger()
    resolved: list[str] = []
    for option, given, as_given in _pairs(arguments):
        value, written = _at_home(option, given, as_given)
        if option in ("--config", "-c") and value is not None:
            resolved += merger.config(resolve_config(value))
        elif option.startswith(("--model.", "--data.")) and value is not None:
            resolved += merger.option(option, value)
        else:
            resolved += written
    return resolved


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str | None, list[str]]]:
    """Options with their values, and both as they were written, with a blank or an equals sign between them."""
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        option, equals, value = argument.partition("=")
        if argument.startswith("-") and equals:
            yield option, value, [argument]
        # A single dash may begin a value, such as -1.
        elif argument.startswith("-") and rest and not rest[0].startswith("--"):
            yield argument, rest[0], [argument, rest.pop(0)]
        else:
            yield argument, None, [argument]


def _at_home(option: str, value: str | None, written: list[str]) -> tuple[str | None, list[str]]:
    """With the home folder in place of ``~/``, which shells leave alone behind an equals sign."""
    if value is None or not value.startswith("~/") or option in TEXTS:
        return value, written
    path = str(Path(value).expanduser())
    return path, [f"{option}={path}"] if len(written) == 1 else [option, path]


def at_home(value: Any) -> Any:
    """A parsed value with the home folder in place of ``~/`` at the start of each text in it."""
    if isinstance(value, str):
        return str(Path(value).expanduser()) if value.startswith("~/") else value
    if isinstance(value, list):
        return [at_home(each) for each in value]
    if isinstance(value, dict):
        return {name: at_home(each) for name, each in value.items()}
    if isinstance(value, Namespace):
        for name, each in vars(value).items():
            setattr(value, name, at_home(each))
    return value


def named_modules(arguments: Sequence[str]) -> set[str]:
    """The outermost modules of all dotted paths on a resolved command line and in its configurations."""
    paths: set[str] = set()
    for option, value, _ in _pairs(arguments):
        if option in ("--config", "-c") and value is not None:
            _collect(_load(value), paths, Path(value).parent if _is_file(value) else Path())
        # Of files only configurations are read: a checkpoint may be large.
        elif value is not None and option not in TEXTS and (value.endswith(YAML) or not _is_file(value)):
            # What cannot be read as YAML is text.
            with suppress(ValueError):
                _collect(_load(value), paths, Path())
    return {path.partition(".")[0] for path in paths}


def _collect(content: Any, paths: set[str], folder: Path) -> None:
    """Adds all texts that may be dotted paths, those in further files of the configuration included."""
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list):
        for each in content:
            _collect(each, paths, folder)
    elif isinstance(content, str) and content.endswith(YAML) and _is_file(str(folder / content)):
        _collect(_load(str(folder / content)), paths, (folder / content).parent)
    elif isinstance(content, str) and re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", content):
        paths.add(content)


class _ModelMerger:
    """Follows, argument by argument, what the model is by now: a name, options of a `Backbone`, or something else."""

    def __init__(self) -> None:
        self.model: Any = None

    def config(self, source: str) -> list[str]:
        """The arguments for a configuration, a file or its text."""
        content = _load(source)
        given = _dig(content)
        if isinstance(given, str) and _is_backbone(self.model):
            # The parser takes the name in either place. From both it moves among the options of the Backbone.
            content["model"].setdefault("init_args", {}).pop("model", None)
            content["model"].pop("model", None)
            content["model"]["init_args"]["model"] = {"model": given}
            return [f"--config={json.dumps(content)}"]
        # Else the parser would put the options in the place of the name, which would be lost.
        arguments = self._promoted() if _is_backbone(given) else []
        self.model = self.model if given is None else given
        return [*arguments, f"--config={source}"]

    def option(self, option: str, value: str) -> list[str]:
        """The arguments for one option."""
        # A mapping is the options of a Backbone, any other value a name.
        if option in MODEL_OPTIONS and not value.lstrip().startswith("{"):
            if _is_backbone(self.model):
                return [f"{option}.model={value}"]
            self.model = value
        inside = next((option[len(name) + 1 :] for name in MODEL_OPTIONS if option.startswith(f"{name}.")), None)
        arguments = self._promoted() if inside else []
        # From a configuration the parser takes null for an option of an object, from the command line it does not.
        if value in NULLS and option.count(".") > 1:
            return [*arguments, _as_config(option, None)]
        return [*arguments, f"{option}={value}"]

    def _promoted(self) -> list[str]:
        """What makes a `Backbone` of a model that is only a name so far."""
        if not isinstance(self.model, str):
            return []
        name, self.model = self.model, {"model": self.model}
        return [_as_config("--model.model", {"model": name})]


def _load(source: str) -> Any:
    """The content of a file, or of a text.

    Raises:
        ValueError: no YAML, or one that repeats its parts until it is too large.
    """
    import yaml  # type: ignore[import-untyped]

    try:
        content = yaml.safe_load(Path(source).read_text(encoding="utf-8") if _is_file(source) else source)
        size = _size(content, {})
    # The reader goes down with the depth of a file.
    except (yaml.YAMLError, OSError, UnicodeDecodeError, RecursionError) as error:
        why = " ".join(str(error).split()) or "too deep"
        raise ValueError(f"The configuration {source[:200]!r} cannot be read: {why}") from error
    if size > MOST_VALUES:
        raise ValueError(
            f"The configuration {source[:200]!r} has more than {MOST_VALUES} values, or repeats them by aliases until "
            "it has; write out what is meant."
        )
    return content


def _size(content: Any, known: dict[int, float]) -> float:
    """How many values there are where each alias is written out, which is what the parser does. Infinite for a circle.

    A file of ten lines can have a billion, so that parts that are met again are not counted again.
    """
    if not isinstance(content, dict | list):
        return 1
    if id(content) not in known:
        known[id(content)] = math.inf
        parts = content.values() if isinstance(content, dict) else content
        known[id(content)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(content)]


def _is_file(source: str) -> bool:
    """Whether a text names a file. The text of a configuration may be too long to be asked for."""
    try:
        return Path(source).is_file()
    except (OSError, ValueError):
        return False


def _dig(content: Any) -> Any:
    """The model within a configuration, None where it says nothing of it."""
    model = content.get("model") if isinstance(content, dict) else None
    options = (model.get("init_args") or model) if isinstance(model, dict) else {}
    return options.get("model") if isinstance(options, dict) else None


def _is_backbone(model: Any) -> bool:
    """Whether a parsed value is the options of a `Backbone`, and no module by its class."""
    return isinstance(model, dict) and model.get("class_path", BACKBONE) == BACKBONE


def _as_config(option: str, value: Any) -> str:
    """One option as the text of a configuration, in which only the outermost object needs its ``init_args``."""
    top, *names = option.removeprefix("--").replace(".init_args", "").split(".")
    for name in reversed(names):
        value = {name: value}
    return f"--config={json.dumps({top: {'init_args': value}})}"
