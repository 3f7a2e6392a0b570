"""Command lines as people write them, turned into what the parser merges as they mean it. Imports nothing heavy."""

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

LIGHT = ("generate", "export", "plan", "score", "report", "completion")
"""Commands that are not the Lightning CLI's."""
COMMANDS = ("fit", "validate", "test", "predict", *LIGHT, "configs")
CONFIG = ("--config", "-c")
MODEL_OPTIONS = ("--model.model", "--model.init_args.model")
"""The option that is a name or a `Backbone`."""
TEXTS = ("--prompt", "--prefill")
"""Options whose value is what somebody says, neither a path nor YAML."""
NULLS = ("null", "Null", "NULL", "~")
"""The ways in which YAML writes that there is no value."""
YAML = (".yaml", ".yml", ".json")


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
    if "\n" in name or "{" in name or Path(name).is_file():
        return name
    for candidate in (name, f"{name}.yaml"):
        if (path := config_directory() / candidate).is_file():
            return str(path)
    names = shipped_configs()
    close = difflib.get_close_matches(name.removesuffix(".yaml"), [n.removesuffix(".yaml") for n in names], n=1)
    hint = f" Did you mean {close[0]}.yaml?" if close else ""
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
            resolved.append(f"--config={_as_merged(resolve_config(home))}")
        elif option in MODEL_OPTIONS and not value.lstrip().startswith("{"):
            resolved.append(f"{option}.model={home}")
        elif value in NULLS and option.startswith(("--model.", "--data.")) and option.count(".") > 1:
            resolved.append(f"--config={_null(option)}")
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


def _as_merged(source: str) -> str:
    """A configuration as it is, or its text with home folders and the model's name as `resolve_arguments` writes them.

    Raises:
        ValueError: it is no YAML.
    """
    import yaml  # type: ignore[import-untyped]

    try:
        text = Path(source).read_text(encoding="utf-8") if _is_file(source) else source
        content = yaml.safe_load(text)
        merged = _at_home(content)
    # The reader goes down with the depth of a file.
    except (yaml.YAMLError, OSError, UnicodeDecodeError, RecursionError) as error:
        why = " ".join(str(error).split()) or "too deep"
        raise ValueError(f"The configuration {source[:200]!r} cannot be read: {why}") from error
    model = merged.get("model") if isinstance(merged, dict) else None
    options = (model.get("init_args") or model) if isinstance(model, dict) else {}
    if isinstance(options, dict) and isinstance(options.get("model"), str):
        options["model"] = {"model": options["model"]}
    return source if merged == content else json.dumps(merged)


def _at_home(value: Any) -> Any:
    """A value with the home folder in place of ``~/``, which shells leave alone in files and behind an equals sign."""
    if isinstance(value, dict):
        return {name: _at_home(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_at_home(each) for each in value]
    return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~/") else value


def _is_file(source: str) -> bool:
    """Whether a text names a file. The text of a configuration may be too long to be asked for."""
    try:
        return Path(source).is_file()
    except (OSError, ValueError):
        return False


def _null(option: str) -> str:
    """The text of a configuration that sets an option to null. Only its outermost object needs its ``init_args``."""
    top, *names = option.removeprefix("--").replace(".init_args", "").split(".")
    value: Any = None
    for name in reversed(names):
        value = {name: value}
    return json.dumps({top: {"init_args": value}})


def named_modules(arguments: Sequence[str]) -> set[str]:
    """The outermost modules of all dotted paths on a resolved command line and in its configurations."""
    names, known = set[str](), set[Path]()
    texts = [(each.removeprefix("--config="), Path()) for each in arguments]
    for text, folder in texts:
        for word in [text, *re.split(r"[\s\"'=,{}\[\]]+", re.sub(r"(^|\s)#.*", "", text))]:
            # A configuration may name further ones, which lie beside it.
            if word.endswith(YAML) and _is_file(str(folder / word)) and folder / word not in known:
                known.add(folder / word)
                texts.append(((folder / word).read_text(encoding="utf-8"), (folder / word).parent))
            elif re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", word):
                names.add(word.partition(".")[0])
    return names
