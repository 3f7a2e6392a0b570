"""Rollouts and forwards of one buffer, and what one optimizer step uses."""

from dataclasses import dataclass

from dmpo_lightning.planning.settings import Workload


@dataclass(frozen=True)
class Schedule:
    """Counts per rank unless said otherwise; forwards are calls of the model, of at most so many rows each."""

    rollouts_per_buffer: int
    prompts_per_buffer: int
    sampling_forwards: int
    scoring_forwards: int
    training_forwards: int
    optimizer_steps_per_buffer: int
    step_rollouts: int
    """Over all ranks."""
    step_prompts: float
    """Over all ranks."""
    problems: tuple[str, ...]
    """What `DMPO` would refuse."""

    @classmethod
    def of(cls, work: Workload, *, ranks: int) -> "Schedule":
        """From the sizes of a run; ``problems`` names what does not divide."""
        rollouts = work.buffer_rollouts if work.sampler_steps else work.micro_batch_size * work.accumulation
        micro_batches = max(1, rollouts // work.micro_batch_size)
        steps = max(1, work.num_iterations * micro_batches // work.accumulation)
        step_rollouts = work.micro_batch_size * work.accumulation
        parts = _chunks(work.trajectory_steps, work.scoring_replicates) if work.trajectory_steps else 1
        scoring = work.scoring_passes * _chunks(rollouts, work.scoring_rows) * parts
        in_step = _chunks(_whole_groups(step_rollouts, work.group_size), work.scoring_rows) * parts
        renewed = work.step_passes * steps * in_step
        return cls(
            rollouts_per_buffer=rollouts,
            prompts_per_buffer=rollouts // work.group_size,
            sampling_forwards=work.sampler_steps * _chunks(rollouts, work.sampling_rows),
            scoring_forwards=scoring + renewed,
            training_forwards=work.num_iterations * micro_batches,
            optimizer_steps_per_buffer=steps,
            step_rollouts=step_rollouts * ranks,
            step_prompts=step_rollouts * ranks / work.group_size,
            problems=tuple(_problems(work, rollouts, micro_batches)),
        )


def _chunks(rows: int, rows_per_forward: int) -> int:
    return -(-rows // rows_per_forward)


def _whole_groups(rollouts: int, group_size: int) -> int:
    return -(-rollouts // group_size) * group_size


def _problems(work: Workload, rollouts: int, micro_batches: int) -> list[str]:
    problems = []
    if rollouts % work.micro_batch_size:
        problems.append(f"micro_batch_size {work.micro_batch_size} does not divide the buffer of {rollouts} rollouts")
    elif micro_batches % work.accumulation:
        problems.append(
            f"accumulate_grad_batches {work.accumulation} does not divide the {micro_batches} micro-batches of a buffer"
        )
    return problems
