"""What classes can be told, read from their source: to import them would bring torch, which takes seconds.

It follows names through assignments and imports, and arguments through ``**options`` to base classes. What it cannot
follow is open: any value is right, and a class of which nothing is known is None.
"""

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from docstring_parser import parse

from dmpo_lightning import _HOMES

PACKAGE = __name__.partition(".")[0]
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", None: "null"}
"""The types of Python that a configuration can write, in words."""
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
        words = [kind.words for kind in self.kinds if kind.type is not None]
        listed = [", ".join(self.choices)] if self.choices else []
        null = [WORDS[None]] * (len(words) < len(self.kinds))
        return " or ".join(dict.fromkeys([*listed, *filter(None, words), *null]))

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of its literals."""
        values = (value for kind in self.kinds if get_origin(kind.type) is Literal for value in get_args(kind.type))
        return tuple(dict.fromkeys(map(str, values)))

    @property
    def classes(self) -> tuple[str, ...]:
        """Those of all kinds."""
        return tuple(dict.fromkeys(path for kind in self.kinds for path in kind.classes))


@cache
def names_in(module: str) -> Mapping[str, ast.AST] | None:
    """What stands in a module by name: classes, functions, values and imports. None of one that is not found."""
    file = _file(module)
    if file is None:
        return None
    found: dict[str, ast.AST] = {}
    for node in _statements(ast.parse(file.read_bytes()).body):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            found |= {target.id: node.value for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            found[node.target.id] = node.value
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name: node for alias in node.names}
    return found


def _file(module: str) -> Path | None:
    """The source of a module, which is looked for without importing the packages that it is in."""
    top, *rest = module.split(".")
    try:
        spec = find_spec(top)
    except ValueError:
        return None
    if spec is None or spec.origin is None or (rest and not spec.submodule_search_locations):
        return None
    stem = Path(spec.origin).parent.joinpath(*rest)
    files = [stem / "__init__.py", stem.with_suffix(".py")] if rest else [Path(spec.origin)]
    return next((file for file in files if file.suffix == ".py" and file.is_file()), None)


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _statements(node.body + node.orelse)


@cache
def find(path: str) -> tuple[str, ast.AST] | None:
    """The module in which a dotted path is defined, and its definition there."""
    module, _, name = path.rpartition(".")
    if module == PACKAGE and name in _HOMES:
        module = f"{PACKAGE}.{_HOMES[name]}"
    node = (names_in(module) or {}).get(name) if module else None
    if isinstance(node, ast.ImportFrom):
        base = module.split(".") if (_file(module) or Path()).name == "__init__.py" else module.split(".")[:-1]
        start = (
            ".".join([*base[: len(base) - node.level + 1], *filter(None, [node.module])]) if node.level else node.module
        )
        original = next(alias.name for alias in node.names if name in (alias.asname, alias.name))
        return find(f"{start}.{original}")
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
    """The names of this package's classes that come from one of these classes, each with its dotted path."""
    wanted = {line for kind in kinds for line in lines_of(kind)[:1]}
    return {name: f"{PACKAGE}.{name}" for name in _HOMES if wanted & set(lines_of(f"{PACKAGE}.{name}"))}


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
    inherited: Mapping[str, Option] | None = {}
    for base in node.bases:
        above = options_of(f"{module}.{ast.unparse(base)}", method)
        inherited = None if above is None or inherited is None else {**above, **inherited}
    texts = _texts(node) | (_texts(own) if own else {})
    if own is None:
        fields = [each for each in node.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)]
        if not any("dataclass" in ast.unparse(each) for each in node.decorator_list):
            return inherited
        arguments: list[tuple[str, ast.expr | None, ast.expr | None]]
        arguments = [(each.target.id, each.annotation, each.value) for each in fields if each.target.id != "_"]  # type: ignore[union-attr]
    else:
        given = own.args
        names = [*given.posonlyargs, *given.args][1:]
        defaults = [None] * (len(names) - len(given.defaults)) + list(given.defaults)
        pairs = [*zip(names, defaults, strict=True), *zip(given.kwonlyargs, given.kw_defaults, strict=True)]
        arguments = [(each.arg, each.annotation, default) for each, default in pairs]
    options = {
        name: Option(
            name,
            tuple(_kinds(annotation, module)),
            None if default is None else ast.unparse(default),
            texts.get(name, ""),
        )
        for name, annotation, default in arguments
    }
    if own is not None and own.args.kwarg is not None:
        if inherited is None or not module.startswith(PACKAGE):
            return None
        # What it says itself to its base class, nobody else can.
        said = {each.arg for call in ast.walk(own) if isinstance(call, ast.Call) for each in call.keywords}
        return options | {name: each for name, each in inherited.items() if name not in {*options, *said}}
    return options


def _texts(node: ast.ClassDef | ast.FunctionDef) -> dict[str, str]:
    docstring = ast.get_docstring(node) or ""
    return {each.arg_name: " ".join((each.description or "").split()) for each in parse(docstring).params}


def _kinds(node: ast.AST | None, module: str) -> Iterator[Kind]:
    """What an annotation stands for."""
    plain = {each.__name__: each for each in WORDS if each is not None}
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        node = ast.parse(node.value, mode="eval").body
    if isinstance(node, ast.Constant) and node.value is None:
        yield Kind(None, WORDS[None])
    elif isinstance(node, ast.BinOp):
        yield from _kinds(node.left, module)
        yield from _kinds(node.right, module)
    elif isinstance(node, ast.Name) and node.id in plain:
        yield Kind(plain[node.id], WORDS[plain[node.id]])
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
        values = tuple(part.value for part in parts if isinstance(part, ast.Constant))
        yield Kind(Literal[values], "")
    elif name in ("Union", "Optional"):
        for part in parts:
            yield from _kinds(part, module)
        if name == "Optional":
            yield Kind(None, WORDS[None])
    elif name in COLLECTIONS or name == "tuple":
        each = [Option("", tuple(_kinds(part, module)), None, "") for part in parts if ast.unparse(part) != "..."]
        classes = tuple(path for part in each for path in part.classes)
        words = [part.words for part in each]
        if name == "tuple":
            kind: Any = Any if len(each) < len(parts) else tuple[tuple(part.type for part in each)]  # type: ignore[misc]
            yield Kind(kind, f"[{', '.join(words)}]", classes)
        else:
            collection, pattern = COLLECTIONS[name]
            yield Kind(collection[tuple(part.type for part in each)], pattern.format(*words), classes)
    elif name == "Callable":
        yield Kind(Any, "the dotted path of a function or class")
    else:
        yield Kind(Any, name)
