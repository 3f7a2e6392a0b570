"""What Lightning and torch keep to themselves and this package relies on, each with the reason.

Everything private that is touched stands here, so that a new version of Lightning is checked in one place. The tests
of `DMPO` with a Trainer and of `Preemption` name the behaviour that is relied upon.
"""

from datetime import timedelta
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource
from torch.distributed import distributed_c10d


def training_loader(trainer: Trainer) -> Any:
    """The training loader, before the Trainer has asked for its length.

    Lightning has no public hook between creating a training loader and asking for its length, and `DMPO` must tell its
    loader in between how often a batch of prompts is used.
    """
    return trainer.fit_loop._data_source.dataloader()


def replace_training_loader(trainer: Trainer, loader: Any) -> None:
    """The Trainer takes this loader instead of asking a datamodule or module, which would make another one."""
    trainer.fit_loop._data_source = _DataLoaderSource(loader, "")


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


def divide_data_among_all_ranks(strategy: Any) -> None:
    """Gives `ModelParallelStrategy` its data-parallel size, which is public only at construction, when the number of
    ranks is not known yet.
    """
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


def averaged_module(callback: Any) -> Any:
    """The copy of the module in which one of Lightning's callbacks averages weights, or None before there is one."""
    average = callback._average_model
    # The one keeps a copy of the module itself, the other has torch keep it.
    return getattr(average, "module", average)
