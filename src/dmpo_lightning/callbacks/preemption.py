"""Leaving in time: a signal makes the run save and end at the next optimizer step."""

import signal
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

FILE_NAME = "preempted.ckpt"


class Preemption(Callback):
    """After a signal to any rank, all ranks save a checkpoint at the end of the next optimizer step and exit.

    The checkpoint, ``preempted.ckpt`` beside those of `ModelCheckpoint`, continues the run bit for bit;
    ``--ckpt_path last`` finds it. The exit status is 128 and the signal's number, as of a process that the signal
    ended.

    Args:
        signals: by name.

    Raises:
        ValueError: a signal that does not exist here.
    """

    def __init__(self, signals: Sequence[str] = ("SIGTERM", "SIGUSR1")) -> None:
        unknown = [name for name in signals if name not in signal.Signals.__members__]
        if unknown or not signals:
            raise ValueError(f"`signals` must name signals such as SIGTERM, got {list(signals)}.")
        self.signals = [signal.Signals[name] for name in signals]
        self.received: int | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.received, self._step = None, trainer.global_step
        self._previous = {each: signal.signal(each, self._note) for each in self.signals}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return  # gradients are being accumulated, which no checkpoint holds
        self._step = trainer.global_step
        if not trainer.strategy.reduce_boolean_decision(self.received is not None, all=False):
            return
        path = self._path(trainer)
        trainer.save_checkpoint(path)
        rank_zero_info(f"Saved to {path} after a signal, at optimizer step {trainer.global_step}.")
        raise SystemExit(128 + (self.received or self.signals[0]))

    def _path(self, trainer: Trainer) -> str:
        directory = getattr(trainer.checkpoint_callback, "dirpath", None)
        if directory is None:
            directory = Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints"
        return str(Path(directory) / FILE_NAME)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        for each, previous in self._previous.items():
            signal.signal(each, previous)
        self._previous = {}
