"""How long a run will take yet: arithmetic on how long its parts took, without a look at any clock."""

import math
from dataclasses import dataclass, field

from lightning.pytorch import Trainer

MEMORY = 0.1
"""The share of a run's steps within which a duration loses half of its weight."""


@dataclass
class Average:
    """Seconds per unit of work. Recent work weighs more, and the first, which warms up, counts while it is alone."""

    seconds: float = 0.0
    units: float = 0.0
    entries: int = 0

    def add(self, seconds: float, units: float, kept: float) -> None:
        """Takes in a piece of work. What is known already keeps the share ``kept`` of its weight."""
        kept *= self.entries != 1
        self.seconds, self.units = kept * self.seconds + seconds, kept * self.units + units
        self.entries += 1

    def of(self, units: float) -> float | None:
        """Seconds for this much work. None where nothing is known."""
        return units * self.seconds / self.units if self.units else None


@dataclass
class Clock:
    """What is known of the durations of a run, which is optimizer steps, validations and perhaps an evaluation behind.

    Evaluations are counted by completions times denoising steps of one rank, so that the sampling of a buffer tells how
    long they will take. A validation that was made tells it better.

    Args:
        steps: optimizer steps of the whole run.
        validations: those to come.
        validation: the work of one of them.
        ending: the work of what is evaluated behind the last step.
    """

    steps: int
    validations: int = 0
    validation: float = 0.0
    ending: float = 0.0
    training: Average = field(default_factory=Average)
    """Per optimizer step, with its share of sampling and without validations."""
    sampling: Average = field(default_factory=Average)
    """Per completion and denoising step."""
    validating: Average = field(default_factory=Average)
    """Per validation."""

    def note_buffer(self, steps: int, seconds: float, *, sampled: float = 0.0, work: float = 0.0) -> None:
        """A buffer was used up, or optimizer steps of a run without buffers were made, in ``seconds`` of no validation.

        ``sampled`` of them went into sampling, whose ``work`` is completions times denoising steps.
        """
        kept = float(0.5 ** (steps / (MEMORY * self.steps)))
        self.training.add(seconds, steps, kept)
        if work:
            self.sampling.add(sampled, work, kept)

    def note_validation(self, seconds: float) -> None:
        """A validation was made."""
        self.validations = max(0, self.validations - 1)
        self.validating.add(seconds, 1, kept=0.4)

    def left(self, step: int) -> float | None:
        """Seconds from an optimizer step until the end. None before the first buffer is used up."""
        rest, sampling = self.training.of(self.steps - step), self.sampling.of(1) or 0.0
        if rest is None:
            return None
        each = self.validating.of(1)
        if each is None:
            each = sampling * self.validation
        # Where there is no validation, or none of completions, sampling has to tell.
        per_work = each / self.validation if self.validation else sampling
        return rest + each * self.validations + per_work * self.ending


def validations_to_come(trainer: Trainer, steps: int) -> int:
    """How many validations a run of so many optimizer steps has yet. Of an interval of time nobody can say."""
    interval, epoch = trainer.val_check_batch, trainer.num_training_batches
    if not trainer.enable_validation or interval in (None, math.inf) or not math.isfinite(epoch):
        return 0
    every = trainer.check_val_every_n_epoch

    def until(steps: int) -> int:
        batches = steps * trainer.accumulate_grad_batches
        if every is None:
            return int(batches // interval)
        return int(batches // int(epoch) // every * (epoch // interval))

    return until(steps) - until(trainer.global_step)
