"""Modules of the working directory, without the working directory on the import path.

On the path, any file there could take the place of a package that is not installed: libraries look whether
``torchvision`` or ``triton`` exists, and would run a file of that name.
"""

import sys
from collections.abc import Iterable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any


class LocalModules(MetaPathFinder):
    """Finds in a folder the modules that were named, and those that these import themselves.

    It is asked after all others, so that it hides nothing that is installed.

    Args:
        folder: where to look.
        names: of modules and packages that may be found there.
    """

    def __init__(self, folder: Path, names: Iterable[str]) -> None:
        self.folder, self.names = folder, set(names)
        self._found: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # A package that was found here finds its own modules by itself.
        if path is not None or not (fullname in self.names or _importing_module() in self._found):
            return None
        spec = PathFinder.find_spec(fullname, [str(self.folder)])
        if spec is not None:
            self._found.add(fullname)
        return spec

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process may be sent an object of a neighbour's before it has imported the module that was named.
        return LocalModules, (self.folder, self.names | self._found)


def find_local_modules(folder: Path, names: Iterable[str]) -> None:
    """From now on finds the named modules in this folder, and in no other that was given before."""
    replace_local_modules([LocalModules(folder, names)])


def local_modules() -> list[LocalModules]:
    """What finds modules of the working directory in this process, for worker processes to do the same."""
    return [finder for finder in sys.meta_path if isinstance(finder, LocalModules)]


def replace_local_modules(finders: Iterable[LocalModules]) -> None:
    """Finds local modules by these alone."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, LocalModules)]
    sys.meta_path.extend(finders)


def _importing_module() -> str:
    """The outermost package of the code that imports, or that asks whether a module exists."""
    # The import system says what is imported and not by whom.
    frame = sys._getframe(2)
    while frame.f_back is not None and _is_machinery(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _is_machinery(module: str) -> bool:
    # In a worker process the clock stands between an import and the import system.
    return module.partition(".")[0] == "importlib" or module == "dmpo_lightning.workers.clock"
