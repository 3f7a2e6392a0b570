"""Functions of a user, named in a configuration: which of them are taken, and how they are called."""

import functools
import inspect
import pickle
import sys
from collections.abc import Callable
from typing import Any


def check_function(option: str, function: Callable[..., Any], takes: tuple[str, ...]) -> None:
    """Refuses what cannot be meant: a function of Python itself, or one that does not take what it will be given.

    A configuration names functions by dotted path. One that names ``os.system`` would hand it what a model wrote.

    Raises:
        ValueError: named by the option.
    """
    name = f"{_module(function)}.{getattr(function, '__qualname__', type(function).__name__)}"
    wanted = f"`{option}` must be a function of {' and '.join(takes) if len(takes) < 3 else ', '.join(takes)}"
    if _module(function).partition(".")[0] in sys.stdlib_module_names:
        raise ValueError(f"{wanted} of your own, got {name} of Python itself.")
    try:
        signature = inspect.signature(function)
    # Some functions of C extensions do not say what they take.
    except ValueError:
        return
    try:
        signature.bind(*takes)
    except TypeError as error:
        raise ValueError(f"{wanted}, got {name}{signature}: {error}.") from error


def _module(function: Callable[..., Any]) -> str:
    """Where the code lies that a call runs."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__module__", None) or type(function).__module__)


def attempt(function: Callable[..., Any], call: tuple[Any, ...]) -> Any:
    """The value of a call, or the exception that it raised."""
    try:
        return function(*call)
    # A foreign function on model output: one bad completion must not end a long run.
    except Exception as error:
        return error
    # Nor may a library that takes itself for a program.
    except SystemExit as error:
        return RuntimeError(f"it ended with SystemExit: {error}")


def check_picklable(call: Callable[..., Any]) -> None:
    """Raises ValueError for a score that cannot be handed to worker processes."""
    try:
        pickle.dumps(call)
    # Pickling runs foreign code, which may raise anything.
    except Exception as error:
        raise ValueError(
            f"`score` must be picklable to be called in worker processes: {error}. Define it at the top level of a "
            "module, or as a class with __call__."
        ) from error
