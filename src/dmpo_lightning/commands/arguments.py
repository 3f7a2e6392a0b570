"""Command lines as people write them, turned into what the parser merges as they mean it. Imports nothing heavy."""

import argparse
import difflib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

LIGHT = ("generate", "adapt", "export", "plan", "score", "report", "configs", "options", "completion")
"""Commands that are not the Lightning CLI's."""
COMMANDS = ("fit", "validate", "test", "predict", *LIGHT)
CONFIG = ("--config", "-c")
MODEL_OPTIONS = ("--model.model", "--model.init_args.model")
"""The option that is a name or a `Backbone`."""
TEXTS = ("--prompt", "--prefill")
"""Options whose value is what somebody says, neither a path nor YAML."""
NULLS = ("null", "Null", "NULL", "~")
"""The ways in which YAML writes that there is no value."""
YAML = (".yaml", ".yml", ".json")


class CommandParser(argparse.ArgumentParser):
    """The options of a light command. A mistake is a ValueError of one line, with what was meant."""

    def __init__(self, command: str, description: str | None) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        program = f"dmpo-lightning {command}"
        super().__init__(program, description=description, formatter_class=layout, allow_abbrev=False)

    @property
    def names(self) -> dict[str, Sequence[str]]:
        """The options by name, without dashes, each with its choices."""
        found = [(each, action) for action in self._actions for each in action.option_strings]
        return {name[2:]: tuple(action.choices or ()) for name, action in found if name.startswith("--")}

    def error(self, message: str) -> NoReturn:
        hint = ""
        if wrong := re.search(r"unrecognized arguments: -*([^\s=]+)|invalid choice: '(.*?)' \((.*)\)", message):
            choices = re.findall(r"'(.*?)'", wrong[3] or "")
            hint = nearest(wrong[2], choices) if wrong[2] else nearest(wrong[1], self.names).replace("mean ", "mean --")
        raise ValueError(f"{message[0].upper()}{message[1:]}.{hint} `{self.prog} --help` lists all options.")


def nearest(name: str, names: Iterable[str]) -> str:
    """A question whether the nearest of some names was meant, empty where none is near."""
    # Upper and lower case are confused more often than letters.
    folded = {each.lower(): each for each in map(str, names)}
    close = difflib.get_close_matches(name.lower(), folded, n=1)
    close = close or [each for each in folded if each.startswith(name.lower())]
    return f" Did you mean {folded[close[0]]}?" if close else ""


def config_directory() -> Path:
    """The repository's ``configs`` in an editable install, else the copy inside the package."""
    repository = Path(__file__).parents[3]
    is_editable = (repository / "pyproject.toml").is_file() and (repository / "configs").is_dir()
    return repository / "configs" if is_editable else Path(__file__).parents[1] / "shipped_configs"


def shipped_configs() -> list[str]:
    """Names of the shipped configurations, as ``--config`` takes them."""
    root = config_directory()
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*.yaml"))


def resolve_config(name: str) -> str:
    """Returns a file, or the text of a configuration, as it is, and for the name of a shipped one its path.

    The name may be with or without ``.yaml``.

    Raises:
        ValueError: neither a file nor a shipped name. The message lists what exists.
    """
    if _is_text(name) or Path(name).is_file():
        return name
    names, wanted = shipped_configs(), name if name.endswith(".yaml") else f"{name}.yaml"
    if wanted in names:
        return str(config_directory() / wanted)
    hint = nearest(wanted, names)
    raise ValueError(f"No configuration {name!r}: it is neither a file nor shipped.{hint} Shipped: {', '.join(names)}.")


def resolve_arguments(arguments: Sequence[str]) -> list[str]:
    """Resolves names of configurations and ``~/``, and writes what the parser cannot merge in a way in which it can.

    The parser replaces a model's name by the options of a `Backbone`, or these by a name: a file of one's own that says
    where the model lies would drop the adapter of the recipe before it, without a word. So a name is always written as
    an option of a `Backbone`, and the parser merges these as it merges all else. It also refuses null for an option of
    an object (``--model.sampler.denoising_steps null``), which it takes from a configuration.

    Raises:
        ValueError: a configuration that does not exist or cannot be read.
    """
    resolved: list[str] = []
    for option, value, written in pairs(arguments):
        if value is None or option in TEXTS:
            resolved += written
            continue
        home = _at_home(value)
        if option in CONFIG:
            source = resolve_config(home)
            merged_node(text_of(source), source)
            resolved.append(f"--config={source}")
        elif option in MODEL_OPTIONS and not value.lstrip().startswith("{"):
            resolved.append(f"{option}.model={home}")
        elif value in NULLS and option.startswith(("--model.", "--data.")) and option.count(".") > 1:
            # Only its outermost object needs its `init_args`.
            ((root, inner),) = nested(option, None).items()
            resolved.append(f"--config={json.dumps({root: {'init_args': inner}})}")
        else:
            resolved += written if home == value else [f"{option}={home}"]
    return resolved


def pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str | None, list[str]]]:
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


def merged_node(text: str, name: str) -> Any:
    """A configuration as PyYAML reads it, with home folders and the model's name as `resolve_arguments` writes them.

    Everything else stays as it is written, because YAML leaves it to its readers what a date or 1e3 is.

    Raises:
        ValueError: it is no YAML, or does not state options by name and each of them once.
    """
    import yaml  # type: ignore[import-untyped]

    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        _check_options(root, "it")
        _resolve(root, loader)
        stated = _stated(root)
        _check_options(stated.get("trainer", root), "`trainer`")
        options: Any = _stated(stated.get("model")).get("init_args", stated.get("model"))
        chosen = _stated(options).get("model")
        if chosen is not None and chosen.id == "scalar" and not chosen.tag.endswith(":null"):
            backbone = yaml.compose("model: NAME")
            backbone.value = [(backbone.value[0][0], chosen)]
            options.value = [(key, backbone if value is chosen else value) for key, value in options.value]
    # The reader goes down with the depth of a file.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        why = " ".join(str(error).split()) or "too deep"
        raise ValueError(f"The configuration {name[:200]!r} cannot be read: {why}") from error
    return root


def _check_options(node: Any, what: str) -> None:
    if node is None or node.id != "mapping":
        got = "nothing" if node is None or not node.value else "a list" if node.id == "sequence" else node.value
        raise ValueError(f"{what} must state options by name, such as `max_steps: 100`, got {got}.")


def _stated(node: Any) -> dict[str, Any]:
    """What is stated in a mapping of a YAML by name, nothing in anything else."""
    pairs_of = node.value if node is not None and node.id == "mapping" else []
    return {key.value: value for key, value in pairs_of if key.id == "scalar"}


def _resolve(node: Any, loader: Any) -> None:
    """Writes home folders in the values of a YAML, and merges what it takes over by ``<<``."""
    if node.id == "scalar":
        node.value = _at_home(node.value)
    elif node.id == "sequence":
        for each in node.value:
            _resolve(each, loader)
    else:
        lines: dict[str, int] = {}
        for key, value in node.value:
            if (name := str(key.value)) in lines:
                raise ValueError(f"`{name}` is stated twice, in lines {lines[name]} and {key.start_mark.line + 1}.")
            lines[name] = key.start_mark.line + 1
            _resolve(value, loader)
        loader.flatten_mapping(node)
        # What is its own comes behind what it has taken over, and wins.
        node.value = list({str(key.value): (key, value) for key, value in node.value}.values())


def _at_home(text: str) -> str:
    """A text with the home folder in place of ``~/``, which shells leave alone in files and behind an equals sign."""
    return str(Path(text).expanduser()) if text.startswith("~/") else text


def text_of(source: str) -> str:
    """The text of a configuration, which is a file or a text already."""
    if _is_text(source):
        return source
    try:
        return Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The configuration {source!r} cannot be read: {error}") from error


def _is_text(source: str) -> bool:
    return "\n" in source or "{" in source


def nested(option: str, value: Any) -> Any:
    """An option and its value as a configuration that leaves out ``init_args``."""
    for name in reversed(option.lstrip("-").replace(".init_args", "").split(".")):
        value = {name: value}
    return value


def named_modules(arguments: Sequence[str]) -> set[str]:
    """The outermost modules of all dotted paths on a resolved command line and in its configurations."""
    texts = [text_of(value) if option in CONFIG else value for option, value, _ in pairs(arguments) if value]
    # Neither comments nor what is in other files.
    words = {word for text in texts for word in re.split(r"[\s\"'=,{}\[\]]+", re.sub(r"(^|\s)#.*", "", text))}
    paths = {word for word in words if re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", word)}
    return {path.partition(".")[0] for path in paths}
