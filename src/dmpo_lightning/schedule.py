"""How a run cuts its rollouts: into buffers, micro-batches and optimizer steps, and how many of each there will be.

Plain arithmetic, which `DMPO` obeys, says at its start and refuses by, and which `plan` prints.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """One rollout buffer of one rank, and what an optimizer step takes from it.

    Args:
        group_size: rollouts per prompt (paper: N).
        prompts_per_buffer: prompts of one buffer on one rank.
        micro_batch_size: rollouts per training step and rank.
        num_iterations: passes over one buffer (paper: F).
        accumulation: micro-batches per optimizer step.
        ranks: processes in all.
        sampling_rounds: how many times as many prompts may be sampled as the buffer holds.
    """

    group_size: int
    prompts_per_buffer: int
    micro_batch_size: int
    num_iterations: int = 1
    accumulation: int = 1
    ranks: int = 1
    sampling_rounds: int = 1

    @property
    def buffer_rollouts(self) -> int:
        """Rollouts of one buffer on one rank."""
        return self.prompts_per_buffer * self.group_size

    @property
    def micro_batches(self) -> int:
        """Micro-batches in one pass over the buffer."""
        return self.buffer_rollouts // self.micro_batch_size

    @property
    def training_steps(self) -> int:
        """Training steps of one buffer, each a micro-batch: how often its batch of prompts is handed out."""
        return self.num_iterations * self.micro_batches

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of one buffer."""
        return self.training_steps // self.accumulation

    @property
    def step_rollouts(self) -> int:
        """Rollouts of one optimizer step, over all ranks."""
        return self.micro_batch_size * self.accumulation * self.ranks

    @property
    def step_prompts(self) -> float:
        """Prompts of one optimizer step, over all ranks."""
        return self.step_rollouts / self.group_size

    @property
    def problem(self) -> str | None:
        """What does not divide, with the numbers it concerns. None where all does."""
        rollouts = self.buffer_rollouts
        if rollouts % self.micro_batch_size:
            return (
                f"`micro_batch_size` must divide the buffer of {rollouts} rollouts ({self.prompts_per_buffer} prompts "
                f"x group_size {self.group_size}), got {self.micro_batch_size}."
            )
        if self.micro_batches % self.accumulation:
            return (
                f"A pass over the buffer has {self.micro_batches} micro-batches ({rollouts} rollouts / "
                f"micro_batch_size {self.micro_batch_size}), which must be a multiple of accumulate_grad_batches, got "
                f"{self.accumulation}: else an optimizer step would straddle two buffers."
            )
        return None


@dataclass(frozen=True)
class RunLength:
    """What a whole run consists of, over all ranks.

    Args:
        schedule: of one buffer.
        prompts: of the training data.
        batches_per_epoch: training steps of one rank after which the Trainer ends an epoch.
        max_steps: optimizer steps. None is no limit.
        max_epochs: None is no limit.
    """

    schedule: Schedule
    prompts: int
    batches_per_epoch: int
    max_steps: int | None = None
    max_epochs: int | None = None

    @property
    def buffers_per_epoch(self) -> int:
        """Buffers of an epoch. The last may be cut, by ``limit_train_batches``."""
        # Rounded up: a cut buffer has been sampled whole.
        return -(-self.batches_per_epoch // self.schedule.training_steps)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch. The Trainer ends it with one, whatever is accumulated by then."""
        return -(-self.batches_per_epoch // self.schedule.accumulation)

    @property
    def optimizer_steps(self) -> int | None:
        """Optimizer steps of the whole run, None without a limit. The Trainer ends at whichever comes first."""
        limits = [self.max_steps, None if self.max_epochs is None else self.max_epochs * self.steps_per_epoch]
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def buffers(self) -> int | None:
        """Buffers of the whole run, None without a limit. Each epoch starts with a new one."""
        if self.optimizer_steps is None:
            return None
        # No buffer runs on into the next epoch: whole epochs count by themselves, and the rest is rounded up.
        epochs, steps = divmod(self.optimizer_steps, self.steps_per_epoch)
        return epochs * self.buffers_per_epoch - (-steps // self.schedule.optimizer_steps)

    def to_text(self) -> str:
        """Some lines for people, which a terminal of 80 columns does not wrap."""
        one, whole = self.schedule, self.schedule.buffer_rollouts * self.schedule.ranks
        lines = [
            f"One buffer: prompts {one.prompts_per_buffer} x ranks {one.ranks} x group {one.group_size} = "
            f"{whole} rollouts.",
            f"One optimizer step: micro-batch {one.micro_batch_size} x accumulation {one.accumulation} x ranks "
            f"{one.ranks} = {one.step_rollouts} rollouts.",
            f"Optimizer steps per buffer: {one.optimizer_steps} (passes: {one.num_iterations}).",
            f"Prompts: {self.prompts}. Buffers per epoch: {self.buffers_per_epoch}.",
        ]
        if one.sampling_rounds > 1:
            lines.append(f"Rounds of sampling: up to {one.sampling_rounds} per buffer, for groups that differ.")
        if (buffers := self.buffers) is not None:
            steps = self.optimizer_steps
            lines.append(f"Whole run: {steps} optimizer steps, {buffers} buffers, {buffers * whole} rollouts.")
        return "\n".join(lines)
