"""How often the model is called for one rollout buffer."""

from collections.abc import Iterable
from dataclasses import dataclass

from dmpo_lightning.objectives import MaskedPass
from dmpo_lightning.planning.workload import Workload


@dataclass(frozen=True)
class Forwards:
    """Calls of the model for one rollout buffer on one rank, at most.

    Args:
        sampling: without gradient, to unmask the completions, of all rounds there may be.
        scoring: without gradient, for log_rnd, weights and baselines.
        training: with gradient, each with its backward pass.
    """

    sampling: int
    scoring: int
    training: int

    @classmethod
    def of(cls, work: Workload) -> "Forwards":
        """Counts the chunks of rollouts in every pass."""
        per_sample = 0 if work.sampling is None else work.sampling.forwards
        return cls(
            sampling=per_sample
            * _chunks(work.schedule.buffer_rollouts, work.sampling_rows)
            * work.schedule.sampling_rounds,
            scoring=_scoring(work),
            training=work.schedule.training_steps,
        )


def _scoring(work: Workload) -> int:
    """Each optimizer step scores the whole groups that its rollouts belong to, as `Objective.before_step` is called."""
    schedule = work.schedule
    step = schedule.micro_batch_size * schedule.accumulation
    per_iteration = 0
    # Steps may cut through groups, so each is counted by itself. A test compares the sum with the forwards of training.
    for first in range(0, schedule.buffer_rollouts, step):
        last = min(first + step, schedule.buffer_rollouts) - 1
        groups = last // schedule.group_size - first // schedule.group_size + 1
        per_iteration += _chunks(groups * schedule.group_size, work.scored_rollouts)
    per_buffer = _chunks(schedule.buffer_rollouts, work.scored_rollouts)
    renewals = schedule.num_iterations * per_iteration
    return per_buffer * _forwards(work.objective.per_buffer) + renewals * _forwards(work.objective.per_step)


def _forwards(passes: Iterable[MaskedPass]) -> int:
    return sum(each.forwards for each in passes)


def _chunks(rows: int, rows_per_forward: int) -> int:
    return -(-rows // rows_per_forward)
