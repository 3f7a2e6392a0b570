"""What classes can be told, read from their source: to import them would bring torch, which takes seconds.

It follows names through assignments and imports, and arguments through ``**options`` to base classes. Of a
class that it cannot follow nothing is known.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from importlib.util import find_spec, resolve_name
from pathlib import Path

from docstring_parser import parse

from dmpo_lightning import _HOMES

PACKAGE = __name__.partition(".")[0]
NULL = "null"
WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}
"""The types of Python that a configuration can write, in words."""
COLLECTIONS = {
    **dict.fromkeys(("list", "List", "Sequence", "Iterable", "Collection"), "[{0}, ...]"),
    **dict.fromkeys(("dict", "Dict", "Mapping"), "{{name: {1}}}"),
}


@dataclass(frozen=True)
class Kind:
    """One of the kinds of value that an option takes."""

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
    def words(self) -> str:
        """All kinds of value in words."""
        ordered = sorted(self.kinds, key=lambda kind: kind.words == NULL)
        return " or ".join(dict.fromkeys(kind.words for kind in ordered))

    @property
    def classes(self) -> tuple[str, ...]:
        """Those of all kinds."""
        return tuple(dict.fromkeys(path for kind in self.kinds for path in kind.classes))


TRAINER = "lightning.pytorch.Trainer"
ROOTS = {
    name: Option(name, (Kind(f"a {path.rpartition('.')[2]}", (path,)),), "None", "")
    for name, path in {
        "model": f"{PACKAGE}.modules.base.PolicyModule",
        "data": "lightning.pytorch.LightningDataModule",
    }.items()
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
def options_of(path: str) -> Mapping[str, Option] | None:
    """The arguments of a class, those that it passes on to its base classes included. None where they are not known."""
    module, node = _class(path)
    if node is None:
        return None
    own = next((each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"), None)
    bases = [options_of(f"{module}.{ast.unparse(base)}") for base in node.bases]
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
        yield Kind(NULL)
    elif isinstance(node, ast.BinOp):
        yield from (*_kinds(node.left, module), *_kinds(node.right, module))
    elif isinstance(node, ast.Name) and node.id in WORDS:
        yield Kind(WORDS[node.id])
    elif isinstance(node, ast.Name) and node.id != "Any" and (found := find(f"{module}.{node.id}")):
        if isinstance(found[1], ast.ClassDef):
            yield Kind(node.id, (f"{found[0]}.{found[1].name}",))
        else:
            yield from _kinds(found[1], found[0])
    elif isinstance(node, ast.Subscript):
        yield from _subscripted(ast.unparse(node.value).rpartition(".")[2], node.slice, module)
    else:
        yield Kind("anything" if node is None else ast.unparse(node))


def _subscripted(name: str, inner: ast.expr, module: str) -> Iterator[Kind]:
    parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
    if name == "Literal":
        yield Kind(", ".join(str(part.value) for part in parts if isinstance(part, ast.Constant)))
    elif name in ("Union", "Optional"):
        for part in parts:
            yield from _kinds(part, module)
        yield from [Kind(NULL)] * (name == "Optional")
    elif name in COLLECTIONS or name == "tuple":
        each = [Option("", tuple(_kinds(part, module)), None, "") for part in parts if ast.unparse(part) != "..."]
        words, classes = [part.words for part in each], tuple(path for part in each for path in part.classes)
        pattern = COLLECTIONS.get(name, f"[{', '.join(words)}]")
        yield Kind(pattern.format(*words) if name in COLLECTIONS else pattern, classes)
    else:
        yield Kind("the dotted path of a function or class" if name == "Callable" else name)
