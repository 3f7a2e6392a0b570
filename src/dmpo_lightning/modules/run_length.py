"""What the Trainer's flags make of a schedule, and what the schedule asks of the training loader."""

from dataclasses import replace
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler, LearningRateFinder

from dmpo_lightning.data.prompts import PromptLoader
from dmpo_lightning.distributed.internals import callbacks_of
from dmpo_lightning.schedule import RunLength, Schedule


def accumulations(trainer: Trainer) -> list[int]:
    """All values that accumulate_grad_batches takes in this run, the present one first."""
    scheduler = next(iter(callbacks_of(trainer, GradientAccumulationScheduler)), None)
    if scheduler is None:
        return [trainer.accumulate_grad_batches]
    return [scheduler.get_accumulate_grad_batches(trainer.current_epoch), *scheduler.scheduling.values()]


def refuse_finders(trainer: Trainer) -> None:
    """Raises ValueError where a learning rate or a batch size is to be searched for."""
    if callbacks_of(trainer, LearningRateFinder):
        raise ValueError(
            "The learning-rate finder follows the loss of one run over rising rates, but the losses of two rollout "
            "buffers do not compare; choose the rate in `optimizer`, by the rewards of short runs."
        )
    if callbacks_of(trainer, BatchSizeFinder):
        raise ValueError(
            "The batch-size finder tries sizes one by one, but here several must divide one another; choose "
            "`micro_batch_size` and `rows_per_forward`, for which `dmpo-lightning plan` says what memory they take."
        )


def refuse_rate_finder(trainer: Trainer) -> None:
    """Raises ValueError where a learning rate is to be searched for, which no attribute of a module holds."""
    if callbacks_of(trainer, LearningRateFinder):
        raise ValueError(
            "The learning-rate finder sets an attribute of the module, but the rate is an argument of `optimizer`; "
            "choose it there, by the validation losses of short runs."
        )


def check_training_loader(loader: Any) -> PromptLoader:
    """Returns the loader itself. Raises ValueError for a loader of another kind."""
    if not isinstance(loader, PromptLoader):
        raise ValueError(
            f"DMPO trains on a PromptLoader, got {type(loader).__name__}: a batch of prompts must be repeated while "
            "its rollouts are used, another loader would skip prompts. Wrap your data in "
            "dmpo_lightning.PromptLoader(dataset, tokenizer, batch_size=...)."
        )
    return loader


def bind(loader: PromptLoader, trainer: Trainer, schedule: Schedule, *, limit: int | None, seed: int) -> None:
    """Tells the training loader how often a batch of prompts is used, and how long prompts may be.

    Raises:
        ValueError: numbers that do not divide under one of the run's accumulations, or a prompt that is too long.
    """
    # Each value that the run will take is checked now. The later ones would be refused in the middle of the run.
    for accumulation in accumulations(trainer):
        if problem := replace(schedule, accumulation=accumulation).problem:
            raise ValueError(problem)
    if limit is not None:
        loader.limit_prompt_length(limit)
    loader.bind(
        repeats=schedule.training_steps,
        seed=seed,
        limit_batches=trainer.limit_train_batches,
        overfits=bool(trainer.overfit_batches),  # type: ignore[attr-defined]
        epoch=trainer.current_epoch,
    )


def run_length(trainer: Trainer, schedule: Schedule, *, prompts: int) -> RunLength:
    """What a started run consists of. Where the accumulation changes on the way, its end is left open."""
    changes = len(set(accumulations(trainer))) > 1
    return RunLength(
        schedule,
        prompts=prompts,
        batches_per_epoch=int(trainer.num_training_batches),
        max_steps=None if changes or trainer.max_steps == -1 else trainer.max_steps,
        max_epochs=None if changes or trainer.max_epochs in (None, -1) else trainer.max_epochs,
    )
