"""What a run consists of, in rollouts, optimizer steps, buffers and epochs."""

from dataclasses import dataclass

from dmpo_lightning.planning.schedule import Schedule
from dmpo_lightning.planning.settings import Workload


@dataclass(frozen=True)
class RunLength:
    """Counts over all ranks.

    Args:
        work: the sizes on one rank.
        ranks: processes in all.
        prompts: of the training data.
        batches_per_epoch: training steps of one rank, each a micro-batch, after which the Trainer ends an epoch.
        max_steps: optimizer steps; None is no limit.
        max_epochs: None is no limit.
    """

    work: Workload
    ranks: int
    prompts: int
    batches_per_epoch: int
    max_steps: int | None = None
    max_epochs: int | None = None

    @property
    def schedule(self) -> Schedule:
        return Schedule.of(self.work, ranks=self.ranks)

    @property
    def buffer_rollouts(self) -> int:
        return self.schedule.rollouts_per_buffer * self.ranks

    @property
    def buffers_per_epoch(self) -> int:
        """The last may be cut, by ``limit_train_batches``."""
        return -(-self.batches_per_epoch // self.schedule.training_forwards)

    @property
    def optimizer_steps(self) -> int | None:
        """Of the whole run; None without a limit."""
        limits = [self.max_steps, None if self.max_epochs is None else self.max_epochs * self._steps_per_epoch]
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def buffers(self) -> int | None:
        """Of the whole run; each epoch starts with a new one."""
        if self.optimizer_steps is None:
            return None
        epochs, steps = divmod(self.optimizer_steps, self._steps_per_epoch)
        return epochs * self.buffers_per_epoch - (-steps // self.schedule.optimizer_steps_per_buffer)

    @property
    def _steps_per_epoch(self) -> int:
        """The Trainer ends an epoch with an optimizer step, whatever is accumulated."""
        return -(-self.batches_per_epoch // self.work.accumulation)

    def to_text(self) -> str:
        """Two lines for people."""
        work, schedule = self.work, self.schedule
        lines = [
            f"One buffer: prompts {work.prompts_per_buffer} x ranks {self.ranks} x group {work.group_size} = "
            f"{self.buffer_rollouts} rollouts. One optimizer step: micro-batch {work.micro_batch_size} x accumulation "
            f"{work.accumulation} x ranks {self.ranks} = {schedule.step_rollouts} rollouts. Optimizer steps per "
            f"buffer: {schedule.optimizer_steps_per_buffer} (passes: {work.num_iterations}).",
            f"Prompts: {self.prompts}. Buffers per epoch: {self.buffers_per_epoch}.",
        ]
        if self.buffers is not None:
            total = self.buffers * self.buffer_rollouts
            lines[-1] += (
                f" Whole run: {self.optimizer_steps} optimizer steps, {self.buffers} buffers, {total} rollouts."
            )
        return "\n".join(lines)
