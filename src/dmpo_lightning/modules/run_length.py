"""What the Trainer's flags make of a schedule."""

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from dmpo_lightning.schedule import RunLength, Schedule


def accumulations(trainer: Trainer) -> list[int]:
    """All values that accumulate_grad_batches takes in this run, the present one first."""
    for each in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(each, GradientAccumulationScheduler):
            return [each.get_accumulate_grad_batches(trainer.current_epoch), *each.scheduling.values()]
    return [trainer.accumulate_grad_batches]


def run_length(trainer: Trainer, schedule: Schedule, *, prompts: int) -> RunLength:
    """Of a started run; without its end where the accumulation changes on the way."""
    changes = len(set(accumulations(trainer))) > 1
    return RunLength(
        schedule,
        prompts=prompts,
        batches_per_epoch=int(trainer.num_training_batches),
        max_steps=None if changes or trainer.max_steps == -1 else trainer.max_steps,
        max_epochs=None if changes or trainer.max_epochs in (None, -1) else trainer.max_epochs,
    )
