"""What is wrong with a command line or its configurations and can be seen without torch, which takes seconds to import.

Less than the parser checks, in whose place nothing is done: only names and values of which `signatures` knows all.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_origin

from jsonargparse import ArgumentParser

from dmpo_lightning import _HOMES
from dmpo_lightning.commands.arguments import (
    YAML,
    config_directory,
    merged_text,
    nearest,
    pairs,
    resolve_config,
    shipped_configs,
    text_of,
)
from dmpo_lightning.commands.signatures import (
    PACKAGE,
    WORDS,
    Kind,
    Option,
    find,
    lines_of,
    names_in,
    options_of,
    public,
)

LAST, OF_LIGHTNING = "last", ("best", "hpc")
FLAGS = ("-h", "--help", "--print_config", "--trust_checkpoint", "--json")
"""Options without a value."""
TRAINER = "lightning.pytorch.Trainer"
ROOTS = {
    name: Option(name, (Kind(Any, f"a {path.rpartition('.')[2]}", (path,)),), None, "")
    for name, path in {
        "model": f"{PACKAGE}.modules.base.PolicyModule",
        "data": "lightning.pytorch.LightningDataModule",
    }.items()
}
"""What a configuration states beside the Trainer's options."""
SEED = Option("seed_everything", (Kind(int, WORDS[int]), Kind(bool, WORDS[bool]), Kind(None, WORDS[None])), None, "")
PLACES = re.compile(r"data(\.task)?\.path|model\.model(\.model)?")
"""Options that name files."""
OPEN = Option("", (), None, "")


def check(command: str, arguments: Sequence[str]) -> None:
    """Raises ValueError for the first mistake in the options of a run, as `resolve_arguments` leaves them."""
    if any(each.partition("=")[0] in ("-h", "--help") or ".help" in each for each in arguments):
        return
    given: dict[str, Any] = {}
    last, missing, files = "", "", list[str]()
    for option, value, _ in pairs(arguments):
        if not option.startswith("-"):
            raise ValueError(_alone(option, last))
        if option in ("--config", "-c") and value is not None:
            files.append(value)
            given = _merged(given, configuration(value))
        elif not option.startswith("--") and option not in ("-h", "-c"):
            raise ValueError(f"There is no option {option}. Did you mean -{option}?")
        elif option not in FLAGS:
            missing = option if value is None else missing
            given = _merged(given, _nested(option.removeprefix("--"), _read(value or "")))
        last = option
    asks = any(each.partition("=")[0] == "--print_config" for each in arguments)
    if "class_path" not in _fields(given.get("model")) and not asks and missing not in ("--config", "-c"):
        raise ValueError(_without_recipe(files))
    # A plan reads no data, and has options of its own.
    Checked(command, needs_files=command != "plan" and not asks).check(given)
    if missing and ("." in missing or command != "plan"):
        raise ValueError(f"`{missing}` must have a value behind it, got none.")


def configuration(source: str) -> dict[str, Any]:
    """What a configuration states, with the options of a class beside its ``class_path``."""
    return _plain(_compose(merged_text(text_of(source), source))) or {}


def unknown(place: str, known: Iterable[str], siblings: Sequence[str], owner: str) -> str:
    """The message for an option that does not exist: where one of that name is, or the nearest one beside it."""
    name, known = place.rpartition(".")[2], list(known)
    elsewhere = [each for each in known if each.rpartition(".")[2] == name]
    # Whoever leaves the place out, and whoever takes the wrong one, knows the name.
    meant = f" Did you mean --{elsewhere[0]}?" if elsewhere else nearest(name, siblings)
    if not meant and "." not in place:
        meant = nearest(name, [each.rpartition(".")[2] for each in known])
    listed = f" {owner} has: {', '.join(siblings)}." if not meant else ""
    return f"There is no option {place}.{meant}{listed} `dmpo-lightning options` lists all."


class Checked:
    """A configuration on its way through `check`."""

    def __init__(self, command: str, *, needs_files: bool = False) -> None:
        self.command, self.needs_files = command, needs_files
        self.known: list[str] = []
        self.unknown: list[tuple[str, Sequence[str], str]] = []

    def check(self, given: Mapping[str, Any]) -> None:
        """Raises ValueError for the first mistake."""
        runs = options_of(TRAINER, self.command if self.command != "plan" else "fit") or {}
        top = [*ROOTS, "trainer", "config", "seed_everything", "trust_checkpoint", "print_config", *runs]
        for name, value in given.items():
            if name == "trainer":
                self._options(_fields(value), name, TRAINER)
            elif name == "seed_everything":
                self._argument(value, name, SEED)
                if re.fullmatch(r"[+-]?\d+", str(value)) and not 0 <= int(value) < 2**32:
                    raise ValueError(f"`--seed_everything` must be at least 0 and less than 2**32, got {value}.")
            elif name == "ckpt_path":
                check_exists(value)
            elif name in ROOTS:
                self._visit(value, name, ROOTS[name])
            elif name not in top:
                self.unknown.append((name, top, f"`{self.command}`"))
        for place, siblings, owner in self.unknown:
            is_own = self.command == "plan" and not any(each.endswith(f".{place}") for each in self.known)
            if "." in place or not is_own:
                raise ValueError(unknown(place, self.known, siblings, owner))

    def _options(self, given: Mapping[str, Any], place: str, path: str) -> None:
        options = options_of(path)
        self.known += [f"{place}.{name}" for name in options or {}]
        for name, value in given.items():
            if name == "class_path":
                continue
            if options is not None and name not in options:
                self.unknown.append((f"{place}.{name}", list(options), path))
            else:
                self._argument(value, f"{place}.{name}", options[name] if options else OPEN)

    def _argument(self, value: Any, place: str, option: Option) -> None:
        """Checks the value of an option, and what is in it."""
        # The parser would import what objects are of.
        is_object = isinstance(value, dict | list) and ("class_path" in value or option.classes)
        is_wrong = not is_object and option.type is not Any and not _fits(value, option.type)
        if value is None:
            is_nullable = any(kind.type is None or kind.words in ("Any", "anything") for kind in option.kinds)
            is_wrong = bool(option.kinds) and not is_nullable and option.default != "None"
        # A function of one's own has a dotted path.
        elif isinstance(value, str) and option.choices and option.type is Any:
            is_wrong = value not in option.choices and "." not in value
        if is_wrong:
            got = "null" if value is None else str(value) or "nothing"
            raise ValueError(f"`{place}` must be {option.words}, got {got}.{nearest(got, option.choices)}")
        # A model may be an id of the hub too.
        is_path = isinstance(value, str) and (not place.startswith("model") or value.startswith(("/", "./", "../")))
        if self.needs_files and PLACES.fullmatch(place) and is_path and not Path(value).exists():
            raise ValueError(f"`{place}` must be a file or a folder that exists, got {value}.")
        self._visit(value, place, option)

    def _visit(self, value: Any, place: str, option: Option) -> None:
        """Checks what is in a value: objects, and those in lists and by name."""
        is_mapping = any(get_origin(kind.type) is dict for kind in option.kinds)
        if isinstance(value, list):
            for each in value:
                self._visit(each, place, option)
        elif isinstance(value, dict) and "class_path" in value:
            path = str(value["class_path"])
            self._options(value, place, _checked_class(path, place, option) or "")
        elif isinstance(value, dict):
            # Of an option with one class nothing else can be meant.
            only = [] if is_mapping else [each for each in option.classes if len(public(each)) == 1]
            if only:
                self._options(value, place, only[0])
            for name, each in value.items() if not only else ():
                self._visit(each, f"{place}.{name}", option if is_mapping else OPEN)
        elif isinstance(value, str) and option.kinds and not {kind.type for kind in option.kinds} & {str, bool, int}:
            self._options({}, place, _checked_class(value, place, option) or "")


def _checked_class(path: str, place: str, option: Option) -> str | None:
    """The dotted path of a class, None for one that nothing is known of.

    Raises:
        ValueError: there is no such class, or it is none of those that the option takes.
    """
    own = public(*option.classes)
    # The base class itself is for those who write their own.
    own = {name: each for name, each in own.items() if lines_of(each)[0] not in option.classes or len(own) == 1}
    module, _, name = path.rpartition(".")
    if path.endswith(YAML) or not path.replace(".", "").isidentifier():
        return None
    if not module:
        hint = "" if name in own else nearest(name, own)
        if hint:
            raise ValueError(f"`{place}` must be a class, got {path}, which does not exist.{hint}")
        return own.get(name)
    is_own = module == PACKAGE or path.startswith(f"{PACKAGE}.")
    found = find(path)
    if found is not None:
        bases = {line for each in option.classes for line in lines_of(each)[:1]}
        if (
            is_own
            and bases
            and not bases & set(lines_of(path))
            and all(k.classes or k.type is None for k in option.kinds)
        ):
            raise ValueError(f"`{place}` must be {option.words}, got {path}. There are: {', '.join(own.values())}.")
        return path
    top = path.partition(".")[0]
    spec = find_spec(top)
    if spec is None:
        raise ValueError(f"`{place}` names {path}, but {top} is neither installed nor a file {top}.py in this folder.")
    names = names_in(module)
    is_fixed = top in (PACKAGE, "lightning", "torch") or Path(spec.origin or "/").parent == Path.cwd()
    if is_fixed and names is not None and (is_own or not {"__getattr__", "*"} & set(names)):
        listed = own or _HOMES if module == PACKAGE else names
        hint = nearest(name, listed).replace("mean ", f"mean {module}.")
        raise ValueError(f"`{place}` names {path}, which {module} does not have.{hint}")
    return None


@cache
def _parser(kind: Any) -> Any:
    parser: Any = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    return parser


def _fits(value: Any, kind: Any) -> bool:
    """Whether the parser takes a value."""
    try:
        _parser(kind).parse_object({"value": value})
    except Exception:  # whatever it is, the parser does not take it
        return False
    return True


def _alone(argument: str, last: str) -> str:
    """The message for an argument that is no option and no value."""
    try:
        resolve_config(argument)
    except ValueError:
        return (
            f"`{argument}` stands behind {last or 'the command'} and belongs to no option. A list is written as one "
            f"value, such as {last or '--data.blanks'}='[3, 5]'."
        )
    return f"`{argument}` must have its option before it. Did you mean --config {argument}?"


def _without_recipe(files: Sequence[str]) -> str:
    """The message for configurations of which none says what is trained."""
    if not files:
        return (
            "A configuration is missing, which states the model: pass --config NAME_OR_FILE, such as --config "
            "sudoku_tiny.yaml (`dmpo-lightning configs` lists those shipped)."
        )
    folder, changes = config_directory(), dict[str, Any]()
    for each in files:
        changes = _merged(changes, configuration(each))
    recipes = [name for name in shipped_configs() if _takes(folder / name, changes)]
    shown = [Path(each).relative_to(folder) if Path(each).is_relative_to(folder) else each for each in files]
    options = "".join(f" --config {each if len(str(each)) < 200 else '...'}" for each in shown)
    return (
        f"An overlay needs a recipe before it, which states the model's class: --config RECIPE{options}, got the "
        f"overlay alone. It fits: {', '.join(recipes) or 'none that is shipped'}."
    )


def _takes(path: Path, changes: dict[str, Any]) -> bool:
    """Whether a shipped configuration is a recipe that has all options of an overlay."""
    recipe = _plain(_compose(path.read_text(encoding="utf-8")))
    try:
        Checked("fit").check(_merged(recipe, changes))
    except ValueError:
        return False
    return "class_path" in _fields(recipe.get("model"))


def _compose(text: str) -> Any:
    import yaml  # type: ignore[import-untyped,unused-ignore]

    return yaml.compose(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _plain(node: Any) -> Any:
    """A YAML as texts, lists and dictionaries, with null alone as itself: what a text means depends on the option."""
    if node is None or node.tag.endswith(":null"):
        return None
    if node.id == "scalar":
        return node.value
    if node.id == "sequence":
        return [_plain(each) for each in node.value]
    value = {str(key.value): _plain(each) for key, each in node.value}
    inner = value.pop("init_args", None)
    value.pop("dict_kwargs", None)
    return value | inner if isinstance(inner, dict) else value


def _read(value: str) -> Any:
    """The value of an option: text, but for lists and mappings."""
    if not value.lstrip().startswith(("{", "[")):
        return value
    try:
        return _plain(_compose(value))
    except Exception:  # as the parser does it, a text
        return value


def _nested(option: str, value: Any) -> dict[str, Any]:
    for name in reversed(option.split(".")):
        value = value if name == "init_args" else {name: value}
    return value


def _fields(value: Any) -> Mapping[str, Any]:
    """A value as options, where it may be the path of a class alone."""
    return value if isinstance(value, dict) else {} if value is None else {"class_path": value}


def _merged(old: Any, new: Any) -> Any:
    """Two configurations, the later of which wins. Options of a class do not outlive it here."""
    if not isinstance(new, dict):
        return new
    if isinstance(old, list):
        return old
    old = dict(_fields(old))
    if {"class_path"} <= set(new) and new["class_path"] != old.get("class_path", new["class_path"]):
        return new
    for name, value in new.items():
        if name.endswith("+"):
            before = old.get(name[:-1]) or []
            old[name[:-1]] = [*(before if isinstance(before, list) else [before]), value]
        else:
            old[name] = _merged(old.get(name), value)
    return old


def check_exists(path: str | None) -> None:
    """Raises ValueError for a checkpoint that does not exist, so that a run ends before its model is loaded."""
    if path in OF_LIGHTNING:
        # Lightning would look for the best one among those of this process, and for its own of SLURM or an error.
        raise ValueError(
            f"`--ckpt_path {path}` has no meaning here: pass `last`, with which a first job starts and a later one "
            f"goes on, or the path of a checkpoint (./{path} for a file of that name)."
        )
    if path in (None, LAST) or is_elsewhere(path) or Path(path).exists():
        return
    raise ValueError(
        f"`--ckpt_path` must be a checkpoint of a run, a file or a folder, or `last`; got {path}, which does not exist."
    )


def is_elsewhere(path: str) -> bool:
    """Whether a checkpoint is named by an address, of the web or of a registry of models."""
    return "://" in path or path.startswith("registry")


def parser_line(message: str, given: Sequence[str]) -> str:
    """The innermost cause in a message of the parser, which has one part for each kind of value that it tried."""
    keys = re.findall(r'Parser key "([\w.]+)"', message)
    inner = message.rpartition("Parser key")[2]
    got = re.search(r"(?:Got value|Given value): (.*?)(?:\. Got value|$)", inner, re.MULTILINE)
    place = next(
        (option.strip("-+") for option, value, _ in pairs(given) if keys and option.strip("-+").endswith(keys[-1])),
        ".".join(keys),
    )
    cause = re.search(r"(module '[\w.]+' has no .*|No module named .*|Import path.* does not correspond .*)", inner)
    expected = re.findall(r"Expected an? (?!path but|dot import)(.*?)(?:\. Got value|; got|$)", inner, re.MULTILINE)
    words = [
        re.sub(r"<class '(?:\w+\.)*(\w+)'>|typing\.", r"\1", each).replace("NoneType", "null") for each in expected
    ]
    if "dot import path" in inner:
        words.insert(0, "a dotted path")
    if not keys or not (cause or words):
        return " ".join(message.split())[:500]
    if cause:
        return f"`{place}` cannot be read: {cause[1]}"
    return f"`{place}` must be {' or '.join(dict.fromkeys(words))}, got {got[1] if got else 'something else'}."
