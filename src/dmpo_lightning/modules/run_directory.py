"""Where a run writes its files, which no other run does."""

import contextlib
import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from dmpo_lightning.distributed.internals import continue_logger

LATEST = "latest"
"""The link beside the directories of runs that leads to that of the run that trained last."""


def run_directory(trainer: Trainer) -> Path:
    """The directory of this run, in whose ``checkpoints`` `ModelCheckpoint` writes by itself, and beside them all else.

    All ranks call it together. Lightning's ``log_dir`` is that of a version for its loggers of files alone. For any
    other, such as those of W&B and MLflow, it is the folder that all runs share. `ModelCheckpoint` adds name and
    version, and so does this.
    """
    logger: Any = trainer.logger
    own = Path(trainer.default_root_dir)
    if logger is not None:
        own = Path(logger.save_dir or own) / str(logger.name) / _version(logger)
    # The other ranks may not know what their logger's service has called the run.
    return Path(trainer.strategy.broadcast(str(own)))


def _version(logger: Any) -> str:
    return logger.version if isinstance(logger.version, str) else f"version_{logger.version}"


def continue_in_place(trainer: Trainer, checkpoint: str | Path) -> None:
    """A resumed run goes on in the directory of the run that wrote the checkpoint, under the same id.

    It does so where the checkpoint lies in a directory of this logger's runs, and the logger was given no version.
    """
    logger: Any = trainer.logger
    if logger is None:
        return
    runs = Path(logger.save_dir or trainer.default_root_dir) / str(logger.name or "")
    run = next((each for each in Path(checkpoint).resolve().parents if each.parent == runs.resolve()), None)
    if run is not None and continue_logger(logger, run):
        rank_zero_info(f"Continues in {run}.")


def link_latest(trainer: Trainer) -> None:
    """Has ``latest`` lead to the directory of this run, which is about to train. Evaluations leave it where it is.

    It is a link to a folder beside it, so that all of them can be moved together. A file system without links, and
    anything of that name that is none, are left alone.
    """
    logger: Any = trainer.logger
    if not trainer.is_global_zero or not isinstance(logger, TensorBoardLogger | CSVLogger):
        return
    run = _version(logger)
    link = Path(logger.root_dir) / LATEST
    partial = link.with_name(f".{LATEST}.{os.getpid()}")
    if link.exists() and not link.is_symlink():
        return
    with contextlib.suppress(OSError):
        partial.symlink_to(run, target_is_directory=True)
        # In one step, so that somebody who looks meets the old run or the new one.
        partial.replace(link)
