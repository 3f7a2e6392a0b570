"""Loggers whose disk is full or gone do not end a run."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

METHODS = ("log_metrics", "log_hyperparams", "save", "finalize")
"""Through which Lightning writes to loggers."""


class ForgivingLoggers(Callback):
    """Lets a run go on without a logger that cannot write any more, and says what is lost.

    Only errors of files and connections are forgiven, and checkpoints never: those end a run as they always do. A
    logger that cannot begin ends it too, before anything was computed. The command line adds this callback by itself.
    """

    def __init__(self) -> None:
        self._lost: set[int] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for logger in trainer.loggers:
            for name in METHODS:
                method = getattr(logger, name)
                # `fit` and `test` of one Trainer set up twice.
                if not hasattr(method, "is_forgiving"):
                    setattr(logger, name, self._forgiving(logger, method))

    def _forgiving(self, logger: Any, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def attempt(*arguments: Any, **options: Any) -> Any:
            try:
                return method(*arguments, **options)
            except OSError as error:
                # Once, since it is asked at every step from now on.
                if id(logger) not in self._lost:
                    self._lost.add(id(logger))
                    rank_zero_warn(
                        f"{type(logger).__name__} cannot write: {error}. The run goes on; what is logged from here on "
                        "may be lost."
                    )
                return None

        attempt.is_forgiving = True  # type: ignore[attr-defined]
        return attempt
