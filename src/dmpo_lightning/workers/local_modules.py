"""Modules of the working directory, without the working directory on the import path.

On the path, any file there could take the place of a package that is not installed: libraries look whether
``torchvision`` or ``triton`` exists, and would run a file of that name.
"""

import ast
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType


@dataclass(frozen=True)
class LocalModules(MetaPathFinder):
    """Finds in a folder the modules that were named. It is asked last, so that it hides nothing that is installed."""

    folder: Path
    names: frozenset[str]

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # A package that was found here finds its own modules by itself.
        if path is not None or fullname not in self.names:
            return None
        return PathFinder.find_spec(fullname, [str(self.folder)])


def find_local_modules(folder: Path, names: Iterable[str]) -> None:
    """From now on finds in this folder, and in no other that was given before, the named modules and packages and those
    that the text of these imports.
    """
    found: set[str] = set()
    waiting = set(names)
    while waiting:
        name = waiting.pop()
        found.add(name)
        for file in (folder / f"{name}.py", *(folder / name).glob("**/*.py")):
            if file.is_file():
                waiting |= _imported(file) - found
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, LocalModules)]
    sys.meta_path.append(LocalModules(folder, frozenset(found)))


def local_modules() -> list[LocalModules]:
    """What finds modules of the working directory in this process, for worker processes to do the same."""
    return [finder for finder in sys.meta_path if isinstance(finder, LocalModules)]


def _imported(file: Path) -> set[str]:
    """The outermost packages that a file imports anywhere. None of a file that Python cannot read."""
    try:
        nodes = list(ast.walk(ast.parse(file.read_bytes())))
    except (SyntaxError, ValueError):
        return set()
    imported = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    imported += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level]
    return {name.partition(".")[0] for name in imported}
