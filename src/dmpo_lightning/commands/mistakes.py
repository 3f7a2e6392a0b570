"""What is wrong with a command line or its configurations and can be seen without torch, which takes seconds to import.

Less than the parser checks, in whose place nothing is done: only names and values of which `signatures` knows all.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_origin

import yaml  # type: ignore[import-untyped]
from jsonargparse import ArgumentParser

from dmpo_lightning import _HOMES
from dmpo_lightning.commands import signatures
from dmpo_lightning.commands.arguments import CONFIG, NULLS, YAML, merged_node, nearest, nested, pairs, text_of
from dmpo_lightning.commands.signatures import PACKAGE, ROOTS, TRAINER, Option, lines_of, options_of, public

LAST, OF_LIGHTNING = "last", ("best", "hpc")
FLAGS = ("-h", "--help", "--print_config", "--trust_checkpoint", "--json")
"""Options without a value."""
FILES = ("data.path", "data.task.path", "model.model", "model.model.model")
"""Options that name files."""
OPEN = Option("", (), None, "")


def check(command: str, arguments: Sequence[str], own: Iterable[str] = ()) -> None:
    """Raises ValueError for the first mistake in the options of a run, as `resolve_arguments` leaves them.

    Args:
        command: which reads them.
        arguments: the options.
        own: names of further options of the command, of which none is among them.
    """
    if any(each.partition("=")[0] in ("-h", "--help") or ".help" in each for each in arguments):
        return
    top = dict.fromkeys(("config", "trust_checkpoint", "print_config", *own), OPEN)
    top |= options_of(TRAINER, command if command != "plan" else "fit") or {}
    last, missing = "", ""
    # The last value of each option by its place, and the class that stands at each.
    stated: dict[str, Any] = {"trainer": TRAINER}
    for option, value, _ in pairs(arguments):
        if not option.startswith("-"):
            raise ValueError(
                f"`{option}` stands behind {last or 'the command'} and belongs to no option. A list is one value, such "
                "as --data.blanks='[3, 5]', and a configuration has --config before it."
            )
        if not option.startswith("--") and option not in ("-h", "-c"):
            raise ValueError(f"There is no option {option}. Did you mean -{option}?")
        if option in CONFIG and value is not None:
            _check_options(configuration(value), top | ROOTS, "", f"`{command}`", stated)
        elif option not in FLAGS:
            missing = option if value is None else missing
            _check_options(nested(option, _read(value or "")), top | ROOTS, "", f"`{command}`", stated)
        last = option
    asks = any(each.partition("=")[0] == "--print_config" for each in arguments)
    if "model" not in stated and not asks and missing not in CONFIG:
        raise ValueError(
            "No configuration states what is trained: pass --config NAME_OR_FILE, such as --config sudoku_tiny.yaml, "
            "and overlays behind it (`dmpo-lightning configs` lists both)."
        )
    _check_stated(stated, reads_files=command != "plan" and not asks)
    if missing:
        raise ValueError(f"`{missing}` must have a value behind it, got none.")


def _check_stated(stated: dict[str, Any], *, reads_files: bool) -> None:
    """Checks what is wrong with values themselves. Those that a later one replaces may be wrong."""
    seed = str(stated.get("seed_everything"))
    if re.fullmatch(r"[+-]?\d+", seed) and not 0 <= int(seed) < 2**32:
        raise ValueError(f"`--seed_everything` must be at least 0 and less than 2**32, got {seed}.")
    check_exists(stated.get("ckpt_path"))
    for place in FILES if reads_files else ():
        path = stated.get(place)
        # A model may be an id of the hub too.
        is_path = isinstance(path, str) and (place.startswith("data") or path.startswith(("/", "./", "../")))
        if is_path and not Path(str(path)).exists():
            raise ValueError(f"`{place}` must be a file or a folder that exists, got {path}.")


def configuration(source: str) -> dict[str, Any]:
    """What a configuration states, with the options of a class beside its ``class_path``."""
    return _plain(merged_node(text_of(source), source)) or {}


def _check_options(
    given: Mapping[str, Any], options: Mapping[str, Option] | None, place: str, owner: str, stated: dict[str, Any]
) -> None:
    """Checks what is given of the options of a class, which stand behind ``place``. None is any."""
    for name, value in given.items():
        option = (options or {}).get(name.removesuffix("+"), OPEN)
        if options is not None and option is OPEN and name not in ("class_path", *options):
            raise ValueError(_unknown(place + name, list(options), owner))
        if name != "class_path":
            _check_argument(value, place + name.removesuffix("+"), option, stated)


def _unknown(place: str, siblings: Sequence[str], owner: str) -> str:
    """The message for an option that does not exist: the nearest one beside it, or where one of that name is."""
    name = place.rpartition(".")[2]
    meant = nearest(name, siblings)
    if not meant:
        found = signatures.places(options_of(TRAINER) or {})
        known = {each: f"--{where}.{each}" for where, _, options in found for each in options}
        # Whoever leaves the place out, and whoever takes the wrong one, knows the name.
        near = nearest(name, known)[len(" Did you mean ") : -1] if name in known or "." not in place else None
        meant = f" Did you mean {known[near]}?" if near else ""
    listed = f" {owner} has: {', '.join(siblings)}." if not meant else ""
    return f"There is no option {place}.{meant}{listed} `dmpo-lightning options` lists all."


def _check_argument(value: Any, place: str, option: Option, stated: dict[str, Any]) -> None:
    """Checks the value of an option, and what is in it."""
    names: Sequence[str] = option.choices
    if value is None:
        is_nullable = any(kind.type is None or kind.words in ("Any", "anything") for kind in option.kinds)
        is_wrong = bool(option.kinds) and not is_nullable and option.default != "None"
    elif option.type is not Any:
        # The parser would import what objects are of.
        is_object = isinstance(value, dict | list) and ("class_path" in value or option.classes)
        is_wrong = not is_object and not _fits(value, option.type)
    else:
        names = _short_names(option) if isinstance(value, str) and value.isidentifier() else ()
        plain = (kind.type for kind in option.kinds if kind.type not in (Any, None) and not kind.classes)
        is_wrong = bool(names) and value not in names and not any(_fits(value, each) for each in plain)
    if is_wrong:
        got = "null" if value is None else str(value) or "nothing"
        raise ValueError(f"`{place}` must be {option.words}, got {got}.{nearest(got, names)}")
    _check_inside(value, place, option, stated)


def _check_inside(value: Any, place: str, option: Option, stated: dict[str, Any]) -> None:
    """Checks what is in a value: objects, and those in lists and by name."""
    is_mapping = any(get_origin(kind.type) is dict for kind in option.kinds)
    # Of an option with one class nothing else can be meant.
    only = [path for path in public(*option.classes).values() if lines_of(path)[0] in option.classes and not is_mapping]
    if isinstance(value, list):
        for each in value:
            _check_inside(each, place, option, {})
    elif isinstance(value, dict):
        named = value.get("class_path")
        path = _checked_class(str(named), place, option) if named else stated.get(place) or next(iter(only), None)
        if path is None and is_mapping:
            for name, each in value.items():
                _check_inside(each, f"{place}.{name}", option, stated)
        else:
            if path or named:
                _state(stated, place, path or named)
            _check_options(value, options_of(str(path)), f"{place}.", str(path), stated)
    else:
        is_class = option.kinds and not {kind.type for kind in option.kinds} & {str, bool, int}
        _state(stated, place, (isinstance(value, str) and is_class and _checked_class(value, place, option)) or value)


def _state(stated: dict[str, Any], place: str, value: Any) -> None:
    """Notes what stands at a place now. What an earlier class had there goes with it."""
    if stated.get(place) != value:
        for below in [each for each in stated if each.startswith(f"{place}.")]:
            del stated[below]
    stated[place] = value


def _short_names(option: Option) -> Sequence[str]:
    """What can stand there without a dot: choices, and classes where all that fit are known. Empty where any can."""
    packages = [path.rpartition(".")[0].rpartition(".")[0] for path in option.classes]
    is_known = all(kind.classes or kind.type is not Any for kind in option.kinds)
    is_fixed = all(f"{each}.".startswith((f"{PACKAGE}.", "lightning.")) for each in packages)
    if option.choices or not packages or not (is_known and is_fixed):
        # A function of one's own has a dotted path.
        return option.choices
    return (*public(*option.classes), *(name for each in packages for name in signatures.names_in(each) or ()))


def _checked_class(path: str, place: str, option: Option) -> str | None:
    """The dotted path of a class, None for one that nothing is known of.

    Raises:
        ValueError: there is no such class, or it is none of those that the option takes.
    """
    own, (module, _, name), top = public(*option.classes), path.rpartition("."), path.partition(".")[0]
    if path.endswith(YAML) or not path.replace(".", "").isidentifier():
        return None
    if not module:
        return own.get(name)
    if signatures.find(path) is not None:
        bases = {line for each in option.classes for line in lines_of(each)[:1]}
        takes_classes = bases and all(kind.classes or kind.type is None for kind in option.kinds)
        if top == PACKAGE and takes_classes and not bases & set(lines_of(path)):
            raise ValueError(f"`{place}` must be {option.words}, got {path}. There are: {', '.join(own.values())}.")
        return path
    spec, names = find_spec(top), signatures.names_in(module)
    if spec is None:
        raise ValueError(f"`{place}` names {path}, but {top} is neither installed nor a file {top}.py in this folder.")
    is_fixed = top in (PACKAGE, "lightning", "torch") or Path(spec.origin or "/").parent == Path.cwd()
    if is_fixed and names is not None and (top == PACKAGE or not {"__getattr__", "*"} & set(names)):
        hint = nearest(name, (own or _HOMES) if module == PACKAGE else names).replace("mean ", f"mean {module}.")
        raise ValueError(f"`{place}` names {path}, which {module} does not have.{hint}")
    return None


def _fits(value: Any, kind: Any) -> bool:
    """Whether the parser takes a value."""
    parser: Any = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    try:
        parser.parse_object({"value": value})
    except Exception:  # whatever it is, the parser does not take it
        return False
    return True


def _plain(node: Any) -> Any:
    """A YAML as texts, lists and dictionaries, with null alone as itself: what a text means depends on the option."""
    if node is None or node.tag.endswith(":null"):
        return None
    if node.id != "mapping":
        return [_plain(each) for each in node.value] if node.id == "sequence" else node.value
    value = {str(key.value): _plain(each) for key, each in node.value if key.value != "dict_kwargs"}
    inner = value.pop("init_args", None)
    return value | inner if isinstance(inner, dict) else value


def _read(value: str) -> Any:
    """The value of an option: text, but for null, lists and mappings."""
    if value in NULLS:
        return None
    try:
        return _plain(yaml.compose(value)) if value.lstrip().startswith(("{", "[")) else value
    except yaml.YAMLError:  # as the parser does it, a text
        return value


def check_exists(path: str | None) -> None:
    """Raises ValueError for a checkpoint that does not exist, so that a run ends before its model is loaded."""
    if path in (None, LAST) or is_elsewhere(path) or (Path(path).exists() and path not in OF_LIGHTNING):
        return
    # Lightning would look for the best one among those of this process, and for its own of SLURM or an error.
    why = f"has no meaning here (./{path} for a file of that name)" if path in OF_LIGHTNING else "does not exist"
    raise ValueError(
        f"`--ckpt_path {path}`: pass `last`, or a checkpoint of a run, a file or a folder; got {path}, which {why}."
    )


def is_elsewhere(path: str) -> bool:
    """Whether a checkpoint is named by an address, of the web or of a registry of models."""
    return "://" in path or path.startswith("registry")
