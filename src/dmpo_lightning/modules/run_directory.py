"""Where a run writes its files, which no other run does."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from dmpo_lightning.distributed.internals import continue_logger


def run_directory(trainer: Trainer) -> Path:
    """The directory of this run, beside whose ``checkpoints`` its other files go. All ranks call it together.

    Lightning's ``log_dir`` is that of a version for its loggers of files alone. For any other, such as those of W&B and
    MLflow, it is the folder that all runs share. `ModelCheckpoint` adds name and version, and so does this.
    """
    logger: Any = trainer.logger
    if logger is None or isinstance(logger, TensorBoardLogger | CSVLogger):
        # A broadcast.
        return Path(trainer.log_dir or trainer.default_root_dir)
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    own = Path(logger.save_dir or trainer.default_root_dir) / str(logger.name) / version
    # The other ranks may not know what their logger's service has called the run.
    return Path(trainer.strategy.broadcast(str(own)))


def checkpoint_directory(trainer: Trainer) -> Path:
    """Where `ModelCheckpoint` writes by itself, and ``--ckpt_path last`` looks. All ranks call it together.

    It is that of the version and not of the logger's files, which may lie deeper (``sub_dir`` of TensorBoard).
    """
    logger: Any = trainer.logger
    own = Path(trainer.default_root_dir)
    if logger is not None:
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        own = Path(logger.save_dir or own) / str(logger.name) / version
    # The other ranks may not know what their logger's service has called the run.
    return Path(trainer.strategy.broadcast(str(own))) / "checkpoints"


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
