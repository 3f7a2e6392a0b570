"""What a whole run takes: buffers, arithmetic, and the room of a checkpoint."""

from dataclasses import dataclass

from dmpo_lightning.planning.memory import Contents
from dmpo_lightning.planning.parameters import Architecture
from dmpo_lightning.planning.settings import Settings

REACHED = 300.0
"""TFLOP/s of one GPU where nothing else is said: three tenths of what an H100 has on paper in bfloat16, which sampling
reaches at best. It is an assumption and printed as one."""


@dataclass(frozen=True)
class WholeRun:
    """Figures of the whole run. None where the configuration does not say how long it is.

    Args:
        optimizer_steps: where the Trainer ends, by ``max_steps``.
        buffers: rollout buffers of each rank until then, one more at least for each further epoch.
        buffer_flops: of one buffer on one rank, from the products of weights and of attention. Caches of keys and
            values are left out, so that it is a bound.
        tflops: that a GPU is taken to reach, in 1e12 per second. None on a processor where nothing says.
        checkpoint_bytes: of one checkpoint, over all ranks.
    """

    optimizer_steps: int | None
    buffers: int | None
    buffer_flops: float
    tflops: float | None
    checkpoint_bytes: float

    @classmethod
    def of(
        cls, settings: Settings, architecture: Architecture, contents: Contents, *, tflops: float | None
    ) -> "WholeRun":
        """The figures of a configuration whose memory is known."""
        schedule, steps = settings.workload.schedule, settings.max_steps
        return cls(
            optimizer_steps=steps,
            buffers=None if steps is None else -(-steps // schedule.optimizer_steps),
            buffer_flops=_buffer_flops(settings, architecture),
            tflops=tflops if tflops is not None or settings.on_cpu else REACHED,
            # Each rank adds its rollouts. All else is there once, in parts or whole.
            checkpoint_bytes=contents.weights
            + contents.optimizer
            + contents.reference
            + contents.rollouts * settings.ranks,
        )

    @property
    def hours(self) -> float | None:
        """Of arithmetic, without rewards, waiting and evaluations."""
        if self.buffers is None or self.tflops is None:
            return None
        return self.buffers * self.buffer_flops / (self.tflops * 1e12) / 3600


def _buffer_flops(settings: Settings, architecture: Architecture) -> float:
    """Two operations per weight and token. The head is counted at the positions whose logits are taken."""
    work = settings.workload.of_blocks(architecture.block_size)
    rollouts, objective = work.schedule.buffer_rollouts, work.objective
    length = work.length
    # A backward pass computes the gradient of the inputs, and without an adapter that of the weights.
    passes = 2 + (settings.adapter is None) + settings.gradient_checkpointing
    shown = rollouts * work.schedule.num_iterations
    tokens = passes * shown * work.columns(objective.training.maskings)
    places = passes * shown * work.positions(objective.training)
    for times, scored in ((rollouts, objective.per_buffer), (shown, objective.per_step)):
        tokens += sum(times * each.forwards * work.columns(each.maskings) for each in scored)
        places += sum(times * each.forwards * work.positions(each) for each in scored)
    if work.sampling is not None:
        # A step of a block-causal model computes its block alone, and once in a block's steps that before it too.
        block = work.block_size
        computed = length + work.sampling.extra_columns if block is None else block + 1
        tokens += rollouts * work.sampling.forwards * computed
        places += rollouts * work.sampling.forwards * work.sampling.places
    # Scores and their sums over the values, each of a row's length times the width of the heads.
    attention = 4 * length * architecture.heads * architecture.head_size * architecture.blocks
    per_token = 2 * architecture.block_parameters * architecture.blocks + attention
    return float(tokens * per_token + places * 2 * architecture.head_parameters)
