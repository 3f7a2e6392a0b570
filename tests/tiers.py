"""Which cases of a parametrized test run in the fast tier."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def slow_unless(fast: Callable[..., bool], cases: Iterable[Any]) -> list[Any]:
    """The cases of ``pytest.mark.parametrize``, those of which ``fast`` is not true marked slow.

    A case that is a tuple is given to ``fast`` as its values.
    """
    return [
        case
        if fast(*(case if isinstance(case, tuple) else (case,)))
        else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for case in cases
    ]
