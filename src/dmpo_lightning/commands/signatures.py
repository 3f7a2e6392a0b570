"""What classes can be told, read from their source: to import them would bring torch, which takes seconds.

It follows names through assignments and imports, and arguments through ``**options`` to base classes. What it cannot
follow is open: any value is right, and a class of which nothing is known is None.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from docstring_parser import parse

from dmpo_lightning import _HOMES

PACKAGE = __name__.partition(".")[0]
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", None: "null"}
"""The types of Python that a configuration can write, in words."""
PLAIN = {each.__name__: each for each in WORDS if each is not None}
COLLECTIONS: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("list", "List", "Sequence", "Iterable", "Collection"), (list, "[{0}, ...]")),
    **dict.fromkeys(("dict", "Dict", "Mapping"), (dict, "{{name: {1}}}")),
}


@dataclass(frozen=True)
class Kind:
    """One of the kinds of value that an option takes."""

    type: Any
    words: str
    classes: tuple[str, ...] = ()
    """Dotted paths of the classes whose objects it takes."""


@dataclass(frozen=True)
class Option:
    """An argument of a constructor."""

    name: str
    kinds: tuple[Kind, ...]
    default: str | None
    """As the source writes it, None where a value is needed."""
    text: str
    """What the docstring says of it."""

    @property
    def type(self) -> Any:
        """What a parser can check. `Any` where an object can be given that only an import would tell from others."""
        types = [kind.type for kind in self.kinds]
        return Any if Any in types or not types else Union[tuple(types)]  # noqa: UP007

    @property
    def words(self) -> str:
        """All kinds of value in words."""
        ordered = sorted(self.kinds, key=lambda kind: kind.type is None)
        words = [", ".join(self.choices), *(kind.words for kind in ordered)]
        return " or ".join(dict.fromkeys(filter(None, words)))

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of its literals."""
        values = (value for kind in self.kinds if get_origin(kind.type) is Literal for value in get_args(kind.type))
        return tuple(dict.fromkeys(map(str, values)))

    @property
    def classes(self) -> tuple[str, ...]:
        """Those of all kinds."""
        return tuple(dict.fromkeys(path for kind in self.kinds for path in kind.classes))

    @property
    def names(self) -> tuple[str, ...]:
        """All values that can be listed: of literals, true and false, and classes of this package."""
        truth = ("true", "false") if any(kind.type is bool for kind in self.kinds) else ()
        return (*self.choices, *truth, *public(*self.classes).values())


TRAINER = "lightning.pytorch.Trainer"
ROOTS = {
    name: Option(name, (Kind(Any, f"a {path.rpartition('.')[2]}", (path,)),), "None", "")
    for name, path in {
        "model": f"{PACKAGE}.modules.base.PolicyModule",
        "data": "lightning.pytorch.LightningDataModule",
        "trainer": TRAINER,
    }.items()
} | {
    # In Lightning true draws one, which hardly anybody means.
    "seed_everything": Option("seed_everything", (Kind(int, WORDS[int]), Kind(bool, ""), Kind(None, "null")), None, "")
}
"""The objects that a configuration states."""


@cache
def names_in(module: str) -> Mapping[str, ast.AST | None] | None:
    """What stands in a module by name: classes, functions, values and imports. None of one that is not found."""
    file = _file(module)
    if file is None:
        return None
    found: dict[str, ast.AST | None] = {}
    nodes = ast.parse(file.read_bytes()).body
    for node in nodes:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            names = [each for each in ast.walk(node) if isinstance(each, ast.Name)]
            found |= dict.fromkeys((each.id for each in names if isinstance(each.ctx, ast.Store)), node.value)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name: node for alias in node.names}
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.For):
            nodes += node.body + getattr(node, "orelse", [])
    return found


def _file(module: str) -> Path | None:
    """The source of a module, which is looked for without importing the packages that it is in."""
    top, *rest = module.split(".")
    try:
        spec = find_spec(top)
        for name in rest:
            spec = spec and PathFinder.find_spec(name, spec.submodule_search_locations or [])
    # Of a module that is there without having been looked for, such as `__main__`.
    except ValueError:
        return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


@cache
def find(path: str) -> tuple[str, ast.AST] | None:
    """The module in which a dotted path is defined, and its definition there."""
    module, _, name = path.rpartition(".")
    if module == PACKAGE and name in _HOMES:
        module = f"{PACKAGE}.{_HOMES[name]}"
    node = (names_in(module) or {}).get(name) if module else None
    if isinstance(node, ast.ImportFrom):
        package = module if (_file(module) or Path()).name == "__init__.py" else module.rpartition(".")[0]
        start = resolve_name("." * node.level + (node.module or ""), package)
        return find(f"{start}.{next(alias.name for alias in node.names if name in (alias.asname, alias.name))}")
    return None if node is None or isinstance(node, ast.Import) else (module, node)


def _class(path: str) -> tuple[str, ast.ClassDef | None]:
    module, node = find(path) or ("", None)
    return module, node if isinstance(node, ast.ClassDef) else None


@cache
def lines_of(path: str) -> tuple[str, ...]:
    """A class and those that it comes from, by the places where they are defined, itself first."""
    module, node = _class(path)
    if node is None:
        return ()
    bases = [f"{module}.{base.id}" for base in node.bases if isinstance(base, ast.Name)]
    return (f"{module}.{node.name}", *(each for base in bases for each in lines_of(base)))


@cache
def public(*kinds: str) -> dict[str, str]:
    """The names of this package's classes that come from one of these classes, each with its dotted path.

    A base class itself is for those who write their own, unless it is the only one.
    """
    found: dict[str, str] = {}
    for base in {line for kind in kinds for line in lines_of(kind)[:1]}:
        own = {name: f"{PACKAGE}.{name}" for name in _HOMES if base in lines_of(f"{PACKAGE}.{name}")}
        found |= {name: path for name, path in own.items() if lines_of(path)[0] != base} or own
    return found


def summary(path: str) -> str:
    """The first sentence of a class's docstring."""
    node = _class(path)[1]
    return " ".join(((node and ast.get_docstring(node)) or "").partition("\n\n")[0].split())


@cache
def options_of(path: str, method: str = "__init__") -> Mapping[str, Option] | None:
    """The arguments of a class, those that it passes on to its base classes included. None where they are not known."""
    module, node = _class(path)
    if node is None:
        return None
    own = next((each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == method), None)
    bases = [options_of(f"{module}.{ast.unparse(base)}", method) for base in node.bases]
    inherited = {name: option for each in reversed(bases) for name, option in (each or {}).items()}
    texts = _texts(node) | (_texts(own) if own else {})
    for name in texts.keys() & inherited.keys():
        # What is left to a base class is said here.
        texts[name] = re.sub(r"see `\w+`\.?", inherited[name].text.replace("\\", r"\\"), texts[name])
    arguments: list[tuple[str, ast.expr | None, ast.expr | None]]
    if own is not None:
        names, given = own.args.args[1:], own.args
        defaults = [None] * (len(names) - len(given.defaults)) + list(given.defaults)
        pairs = [*zip(names, defaults, strict=True), *zip(given.kwonlyargs, given.kw_defaults, strict=True)]
        arguments = [(each.arg, each.annotation, default) for each, default in pairs]
    elif any("dataclass" in ast.unparse(each) for each in node.decorator_list):
        fields = [each for each in node.body if isinstance(each, ast.AnnAssign)]
        arguments = [(ast.unparse(each.target), each.annotation, each.value) for each in fields]
    else:
        return None if None in bases else inherited
    options = {
        name: Option(name, tuple(_kinds(annotation, module)), default, texts.get(name, ""))
        for name, annotation, node in arguments
        for default in [None if node is None else ast.unparse(node)]
        # By which a dataclass says that what follows is given by name.
        if name != "_"
    }
    if own is None or own.args.kwarg is None:
        return options
    # What it says itself to its base class, nobody else can.
    said = {each.arg for call in ast.walk(own) if isinstance(call, ast.Call) for each in call.keywords}
    passed = {name: each for name, each in inherited.items() if name not in {*options, *said}}
    return None if None in bases or not module.startswith(PACKAGE) else options | passed


def places(trainer: Mapping[str, Option]) -> Iterator[tuple[str, str, Mapping[str, Option]]]:
    """All places from these options of the Trainer down, classes of this package that may stand there, and theirs."""
    yield "trainer", TRAINER, trainer
    waiting, seen = [*ROOTS.items(), *((f"trainer.{name}", each) for name, each in trainer.items())], set[str]()
    while waiting:
        place, option = waiting.pop(0)
        fresh = {path: options_of(path) or {} for path in public(*option.classes).values() if path not in seen}
        seen.update(fresh)
        yield from ((place, path, options) for path, options in fresh.items())
        waiting[:0] = [(f"{place}.{name}", each) for options in fresh.values() for name, each in options.items()]


def _texts(node: ast.ClassDef | ast.FunctionDef) -> dict[str, str]:
    docstring = ast.get_docstring(node) or ""
    return {each.arg_name: " ".join((each.description or "").split()) for each in parse(docstring).params}


def _kinds(node: ast.AST | None, module: str) -> Iterator[Kind]:
    """What an annotation stands for."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        node = ast.parse(node.value, mode="eval").body
    if isinstance(node, ast.Constant) and node.value is None:
        yield Kind(None, WORDS[None])
    elif isinstance(node, ast.BinOp):
        yield from (*_kinds(node.left, module), *_kinds(node.right, module))
    elif isinstance(node, ast.Name) and node.id in PLAIN:
        yield Kind(PLAIN[node.id], WORDS[PLAIN[node.id]])
    elif isinstance(node, ast.Name) and node.id != "Any" and (found := find(f"{module}.{node.id}")):
        if isinstance(found[1], ast.ClassDef):
            yield Kind(Any, node.id, (f"{found[0]}.{found[1].name}",))
        else:
            yield from _kinds(found[1], found[0])
    elif isinstance(node, ast.Subscript):
        yield from _subscripted(ast.unparse(node.value).rpartition(".")[2], node.slice, module)
    else:
        yield Kind(Any, "anything" if node is None else ast.unparse(node))


def _subscripted(name: str, inner: ast.expr, module: str) -> Iterator[Kind]:
    parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
    if name == "Literal":
        yield Kind(Literal[tuple(part.value for part in parts if isinstance(part, ast.Constant))], "")
    elif name in ("Union", "Optional"):
        for part in parts:
            yield from _kinds(part, module)
        yield from [Kind(None, WORDS[None])] * (name == "Optional")
    elif name in COLLECTIONS or name == "tuple":
        each = [Option("", tuple(_kinds(part, module)), None, "") for part in parts if ast.unparse(part) != "..."]
        classes = tuple(path for part in each for path in part.classes)
        words, types = [part.words for part in each], tuple(part.type for part in each)
        if name == "tuple":
            yield Kind(Any if len(each) < len(parts) else tuple[types], f"[{', '.join(words)}]", classes)
        else:
            collection, pattern = COLLECTIONS[name]
            yield Kind(collection[types], pattern.format(*words), classes)
    else:
        yield Kind(Any, "the dotted path of a function or class" if name == "Callable" else name)
