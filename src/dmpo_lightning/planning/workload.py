"""What one rank computes: its rollouts, their tokens, and the passes of the model over them."""

from dataclasses import dataclass, replace

from dmpo_lightning.objectives import MaskedPass, ObjectiveFootprint
from dmpo_lightning.samplers import SamplingFootprint
from dmpo_lightning.schedule import Schedule


@dataclass(frozen=True)
class Workload:
    """The rollouts of one rank and the passes over them.

    Args:
        prompt_length: tokens of the longest prompt, 0 where nothing says.
        completion_length: tokens of a completion.
        schedule: how the rollouts are cut. Without sampling (supervised fine-tuning) a buffer is one optimizer step.
        objective: what the objective asks of the model.
        sampling: what the sampler asks of the model, None where nothing is sampled.
        rows_per_forward: rollouts of a forward without gradient. None takes all for sampling and a micro-batch for
            scoring.
        block_size: of a block-causal model, which has rows of its own for scoring (`clean_and_noisy`).
    """

    prompt_length: int
    completion_length: int
    schedule: Schedule
    objective: ObjectiveFootprint
    sampling: SamplingFootprint | None = None
    rows_per_forward: int | None = None
    block_size: int | None = None

    def of_blocks(self, block_size: int | None) -> "Workload":
        """The same for a block-causal model, or itself where there are no blocks.

        Each block is masked in part, so more positions are scored, and sampling keeps the finished blocks.
        """
        if block_size is None:
            return self
        sampling = self.sampling
        if sampling is not None:
            sampling = replace(sampling, places=min(sampling.places, block_size), keeps_cache=True)
        return replace(self, block_size=block_size, sampling=sampling)

    def columns(self, maskings: int) -> int:
        """Columns that a forward computes for one rollout under so many maskings."""
        if self.block_size is None:
            return maskings * self.length
        return self.length + maskings * (self.completion_length + min(self.block_size - 1, self.prompt_length))

    def positions(self, each: MaskedPass) -> float:
        """Positions of one rollout whose log-probs a forward computes.

        ``each`` counts them for a bidirectional model, where (L + 1) / 2 of L positions are masked on average. In
        blocks of B that is (B + 1) / 2 of each block.
        """
        if self.block_size is None:
            return each.positions
        share = (self.block_size + 1) / self.block_size / (1 + 1 / self.completion_length)
        return min(each.positions * share, each.maskings * self.completion_length)

    @property
    def length(self) -> int:
        """Tokens of a row, which are a prompt and a completion."""
        return self.prompt_length + self.completion_length

    @property
    def training_rows(self) -> int:
        """Rows of one forward with gradient: each rollout of a micro-batch under each of its maskings."""
        return self.schedule.micro_batch_size * self.objective.training.maskings

    @property
    def training_positions(self) -> float:
        """Positions whose log-probs one forward with gradient computes."""
        return self.schedule.micro_batch_size * self.positions(self.objective.training)

    @property
    def sampling_rows(self) -> int:
        """Rows of one sampling forward."""
        rollouts = self.schedule.buffer_rollouts
        return min(self.rows_per_forward or rollouts, rollouts)

    @property
    def sampling_columns(self) -> int:
        """Columns of a row that one sampling forward computes, at most.

        Samplers may compute fewer with a cache, but begin with all. Blocks are decoded one after another: the first
        forward computes the prompt and the first block, and later ones two blocks.
        """
        if self.block_size is None:
            return self.length + (self.sampling.extra_columns if self.sampling else 0)
        return min(max(self.prompt_length, self.block_size), self.length) + self.block_size

    @property
    def cached_columns(self) -> int:
        """Columns of a row that a cache has room for. Rows of blocks are moved by less than a block, to stand alike."""
        return self.length + (self.block_size or 1) - 1

    @property
    def scored_rollouts(self) -> int:
        """Rollouts of one scoring forward."""
        return min(self.rows_per_forward or self.schedule.micro_batch_size, self.schedule.buffer_rollouts)

    @property
    def scoring_passes(self) -> tuple[MaskedPass, ...]:
        """All passes without gradient, those of a buffer before those of an optimizer step."""
        return self.objective.per_buffer + self.objective.per_step

    @property
    def scoring_rows(self) -> int:
        """Rows of the largest scoring forward, 0 where no forward scores."""
        return self.scored_rollouts * max((each.maskings for each in self.scoring_passes), default=0)
