"""Command-line options that the benchmarks share."""

import argparse
import importlib
from collections.abc import Callable
from typing import Any


def function_named(text: str) -> Callable[..., Any]:
    """``module:function``, imported."""
    module, _, function = text.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"must be an importable module:function, got {text!r}: {error}") from error


def at_least_three(text: str) -> int:
    """An integer of which a median can be taken."""
    if not text.isdecimal() or int(text) < 3:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 3, got {text!r}")
    return int(text)


def check_quarters(parser: argparse.ArgumentParser, rollouts: int) -> None:
    """Ends with a message unless a buffer can be trained on in four equal micro-batches."""
    if rollouts < 4 or rollouts % 4:
        parser.error(f"prompts times group size must be a multiple of 4, got {rollouts}")
