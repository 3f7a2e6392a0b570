"""Equality of LaTeX answers by computer algebra: `exact`, in a worker process that is killed if need be."""

import logging
import re
from importlib.util import find_spec

from dmpo_lightning.tasks.exact import equal
from dmpo_lightning.tasks.plain import plain
from dmpo_lightning.workers import CallError, TimeLimitError, WorkerPool

logger = logging.getLogger(__name__)

MAX_TEXT = 200
"""Characters of an answer. A longer one is not compared."""
REMEMBERED = 4096
"""Comparisons whose result is kept. Reward and answer check ask the same, and so do the rollouts of a group."""
_ALLOWED = re.compile(r"[A-Za-z0-9\s\\{}()\[\]^_+\-*/=<>|.,:;!'&~%$]+")


class AlgebraicEquality:
    """Whether two short LaTeX answers of plain characters are equal as mathematics.

    Args:
        time_limit: seconds per comparison. One that takes longer is logged and counts as not equal.

    Raises:
        ValueError: math-verify is not installed, or a time limit that is not positive.
    """

    def __init__(self, time_limit: float = 2.0) -> None:
        if find_spec("math_verify") is None:
            raise ValueError("`algebra` needs math-verify; install it with `pip install dmpo-lightning[math]`.")
        self._pool = WorkerPool(equal, workers=1, time_limit=time_limit, initializer=_import_math_verify)
        self._known: dict[tuple[str, str], bool] = {}

    def __call__(self, gold: str, answer: str) -> bool:
        """False too for an answer that is long, of other characters, or no mathematics that math-verify can read."""
        if max(len(gold), len(answer)) > MAX_TEXT:
            return False
        gold, answer = plain(gold), plain(answer)
        if not (_ALLOWED.fullmatch(gold) and _ALLOWED.fullmatch(answer)):
            return False
        if (gold, answer) not in self._known:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            self._known[gold, answer] = self._compare(gold, answer)
        return self._known[gold, answer]

    def _compare(self, gold: str, answer: str) -> bool:
        (result,) = self._pool.map([(gold, answer)])
        if isinstance(result, CallError):
            late = isinstance(result, TimeLimitError)
            logger.warning("%r was not compared with %r: %s", answer, gold, "time limit" if late else result)
        return result is True


def _import_math_verify() -> None:
    """Makes a worker ready.

    math-verify's own time limits are off, since the pool has one, and so are its warnings of that.
    """
    import math_verify  # noqa: F401

    logging.getLogger("math_verify").setLevel(logging.ERROR)
