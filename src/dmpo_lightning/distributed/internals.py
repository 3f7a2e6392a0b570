"""What Lightning and torch keep to themselves and this package relies on, each with the reason.

Everything private that is touched stands here, so that a new version of Lightning is checked in one place. The tests
of `DMPO` with a Trainer and of `Preemption` name the behaviour that is relied upon.
"""

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch.distributed import distributed_c10d

Kind = TypeVar("Kind")


def attached_trainer(module: LightningModule) -> Trainer | None:
    """The Trainer of a module, or None where it has none yet, at which the public property raises an error."""
    return module._trainer


def is_being_fitted(module: LightningModule) -> bool:
    """Whether a Trainer is training the module, rather than evaluating it, or nothing."""
    trainer = attached_trainer(module)
    return trainer is not None and trainer.state.fn == TrainerFn.FITTING


def callbacks_of(trainer: Trainer, kind: type[Kind]) -> list[Kind]:
    """The Trainer's callbacks of a class, in their order."""
    # Lightning does not declare the attribute.
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [each for each in callbacks if isinstance(each, kind)]


def prepare_training_loaders(trainer: Trainer, prepare: Callable[[Any], Any]) -> None:
    """Every training loader goes through ``prepare`` before the Trainer asks for its length, the first one now.

    Lightning has no public hook between creating a training loader and asking for its length, and `DMPO` must tell its
    loader in between how often a batch of prompts is used. The first one is taken now, so that what is wrong with it is
    an error before anything is computed.
    """
    # Of an earlier fit of this Trainer there is a source that would prepare loaders for another module.
    source = trainer.fit_loop._data_source
    prepared = _PreparedLoaders(source.instance, source.name, prepare)
    prepared.first = prepared.dataloader()
    trainer.fit_loop._data_source = prepared


@dataclass
class _PreparedLoaders(_DataLoaderSource):
    """Where Lightning gets training loaders from, with what `DMPO` has to tell each of them in between."""

    prepare: Callable[[Any], Any]
    first: Any = None

    def dataloader(self) -> Any:
        first, self.first = self.first, None
        return self.prepare(super().dataloader()) if first is None else first


def is_accumulating(trainer: Trainer) -> bool:
    """Whether the present batch ends without an optimizer step, which nothing public says before it has ended."""
    return bool(trainer.fit_loop.epoch_loop._should_accumulate())


def validates_now(trainer: Trainer) -> bool:
    """Whether Lightning is going to validate after the present batch.

    A callback that ends the run there must know, because nothing that Lightning saves says that a validation was due.
    """
    fetcher = trainer.fit_loop._data_fetcher
    assert fetcher is not None
    return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def validate_before_training(trainer: Trainer) -> None:
    """Makes a whole validation before the first training batch.

    Lightning validates in the middle of a training step only. Of a validation that a checkpoint has interrupted it
    would make the rest, so that its means are those of a part, or nothing.
    """
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False
    loop.reset_restart_stage()
    first_loop_iter = trainer._logger_connector._first_loop_iter
    trainer.validating = True
    loop.run()
    trainer.training = True
    trainer._logger_connector._first_loop_iter = first_loop_iter
    # Else an epoch that this validation ends is left before its end is noted, and is repeated without end.
    loop._has_run = False


def replace_original_handlers(trainer: Trainer, handlers: Mapping[Any, Any]) -> None:
    """Has Lightning put these handlers of signals back at the end.

    It keeps those that it finds shortly before training, a callback's, and would put them back behind the callback.
    """
    originals = trainer._signal_connector._original_handlers
    originals.update({number: each for number, each in handlers.items() if number in originals})


def divide_data_among_all_ranks(strategy: Any) -> None:
    """Gives `ModelParallelStrategy` its data-parallel size, which is public only at construction, when the number of
    ranks is not known yet.
    """
    if strategy._data_parallel_size == "auto":
        strategy._data_parallel_size = strategy.num_nodes * strategy.num_processes


def set_timeout_of_all_groups(strategy: Any) -> None:
    """Applies the strategy's timeout to every process group.

    DeepSpeed gives torch's own of half an hour to those that it adds, and torch has no public way to list the groups or
    to change their timeout.
    """
    timeout: timedelta | None = strategy._timeout
    if timeout is not None:
        for group in list(distributed_c10d._world.pg_map):
            distributed_c10d._set_pg_timeout(timeout, group)


def reserve_folders(trainer: Trainer) -> None:
    """Makes the run's folder at the moment it is named, by date and time, such as ``2026-11-26_21-55-03``.

    Lightning numbers its folders: it looks for the next number first and makes the folder later, so that two runs that
    start at once share one, and write into each other's files. Of two that start in the same second the later one has
    a number behind its time. A logger that was given a version keeps it.

    Raises:
        ValueError: the folder cannot be made, so that a run ends before it computes what it could not keep.
    """
    # Other ranks are told by rank 0.
    if not trainer.is_global_zero:
        return
    now, made = time.strftime("%Y-%m-%d_%H-%M-%S"), set[Path]()
    for logger in trainer.loggers:
        names = (f"{now}_{number}" if number > 1 else now for number in itertools.count(1))
        while isinstance(logger, CSVLogger | TensorBoardLogger) and logger._version is None:
            logger._version = next(names)
            folder = Path(logger.log_dir)
            # Loggers of one run share a folder if they write to the same place.
            if folder in made:
                continue
            if _make_folder(folder):
                made.add(folder)
            else:
                logger._version = None


def _make_folder(folder: Path) -> bool:
    """Whether a folder was made, rather than being there already."""
    try:
        # By itself, because a link that leads nowhere also "exists", and no other name would help.
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
    except OSError as error:
        if isinstance(error, FileExistsError) and folder.parent.is_dir():
            return False
        raise ValueError(
            f"The run directory {folder} cannot be made: {error.filename or folder}: {error.strerror}. Checkpoints and "
            "logs would go there; name a folder that can be written by --trainer.logger.save_dir, or by "
            "--trainer.default_root_dir where no logger is configured."
        ) from error
    return True


def averaged_module(callback: Any) -> Any:
    """The copy of the module in which one of Lightning's callbacks averages weights, or None before there is one."""
    average = callback._average_model
    # The one keeps a copy of the module itself, the other has torch keep it.
    return getattr(average, "module", average)


def continue_logger(logger: Any, run: Path) -> bool:
    """Has a logger that was given no version go on in the directory of an earlier run. Returns whether it does.

    Loggers take versions and ids at construction only, before it is known which checkpoint a run continues from. Called
    before the logger has begun its run.
    """
    number = run.name.removeprefix("version_")
    version: int | str = int(number) if number.isdecimal() and number != run.name else run.name
    if isinstance(logger, TensorBoardLogger | CSVLogger):
        if logger._version is not None:
            return False
        logger._version = version
        if isinstance(logger, CSVLogger):
            _keep_metrics(run)
        return True
    # By name, because W&B may not be installed.
    if type(logger).__name__ != "WandbLogger" or logger._id is not None:
        return False
    logger._id = logger._wandb_init["id"] = run.name
    return True


@rank_zero_only
def _keep_metrics(run: Path) -> None:
    """Lightning's logger of CSV files deletes those that it finds."""
    metrics = run / "metrics.csv"
    if metrics.is_file():
        earlier = len(list(run.glob("metrics_part*.csv")))
        metrics.rename(run / f"metrics_part{earlier + 1}.csv")
