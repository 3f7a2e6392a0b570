"""Where one rank of a run stands between two optimizer steps, which is all that a checkpoint can continue from."""

import copy
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn

from dmpo_lightning.checkpoints.reading import UnfitCheckpointError
from dmpo_lightning.distributed.internals import VALIDATION_IS_DUE, is_being_fitted
from dmpo_lightning.distributed.ranks import gather_ranks

COUNTERS = ("buffers_collected", "rollouts_seen")
KEY = "dmpo"
BUFFER_FORMAT = 2
"""Of what `RolloutBuffer.state_dict` holds. A buffer of another format is collected afresh."""


@dataclass
class OpenStep:
    """The optimizer step that has begun: its gradients are being computed or accumulated."""

    step: int
    """Optimizer steps taken before it."""
    batches: int
    """Training batches handed out before it, over all epochs."""
    generators: dict[str, Any]
    """As its first micro-batch found them."""
    position: int | None
    """Where its first micro-batch found the buffer, None where it had to collect one."""
    counters: dict[str, int]


class Continuation:
    """Writes `DMPO`'s part of a checkpoint, and continues from one.

    Gradients are in no checkpoint. One that is taken within an optimizer step, as Lightning's `ModelCheckpoint` takes
    one right after a resume and its `OnExceptionCheckpoint` anywhere, is therefore written as it would have been after
    the last step: its progress, loaders, buffer, counters and generators go back, and the step is begun again.
    """

    def __init__(self) -> None:
        self._open: OpenStep | None = None
        self._generators: dict[str, Any] | None = None
        self._loaded: dict[str, Any] | None = None
        """The progress that was loaded, until the first batch."""

    def start(self) -> None:
        """A run starts, with no step begun."""
        self._open = None

    def begin_micro_batch(self, module: Any) -> None:
        """Notes how its step found generators, buffer and counters."""
        trainer, buffer = module.trainer, module.buffer
        self._loaded = None
        if self._begun(trainer) is None:
            self._open = OpenStep(
                step=trainer.global_step,
                batches=trainer.fit_loop.total_batch_idx,
                generators=generator_states(),
                position=None if buffer.needs_rollouts else buffer.position,
                counters=_counters(module),
            )

    def save(self, module: Any, checkpoint: dict[str, Any]) -> None:
        """Adds buffer, generators and counters after the last optimizer step.

        The progress that Lightning has put into the checkpoint goes back as well.
        """
        state, loops = module.buffer.state_dict(), checkpoint["loops"]
        if self._loaded is not None:
            # Lightning has begun to prepare its progress for the first batch, which has not come.
            is_due = loops["fit_loop"]["state_dict"][VALIDATION_IS_DUE]
            loops["fit_loop"] = copy.deepcopy(self._loaded)
            loops["fit_loop"]["state_dict"][VALIDATION_IS_DUE] = is_due
        begun = self._begun(module.trainer)
        total = loops["fit_loop"]["epoch_loop.batch_progress"]["total"]
        # Without a begun step, what is more than started is a batch that a callback has stopped before training saw it.
        rewind_loops(loops, total["ready"] - (total["started"] if begun is None else begun.batches))
        # Those that were loaded may still wait for the first batch.
        generators = self._generators or generator_states()
        rank, counters = {"buffer": state, "generators": generators}, _counters(module)
        if begun is not None:
            before = {"position": 0} if begun.position is None else state | {"position": begun.position}
            rank, counters = {"buffer": before, "generators": begun.generators}, begun.counters
            # It is made again, where the step begins before it.
            loops["fit_loop"]["state_dict"][VALIDATION_IS_DUE] = False
        checkpoint[KEY] = {**counters, "layout": layout(module), "ranks": gather_ranks(rank)}

    def _begun(self, trainer: Trainer) -> OpenStep | None:
        return None if self._open is None or self._open.step != trainer.global_step else self._open

    def load(self, module: Any, checkpoint: dict[str, Any]) -> None:
        """Continues within the buffer. Where a buffer has another layout now, weights and counters alone continue.

        The generators wait for `restore_generators`. An evaluation, and a module outside of a Trainer, need neither.

        Raises:
            UnfitCheckpointError: to be trained on, and not written by DMPO.
        """
        state, trains = checkpoint.get(KEY), is_being_fitted(module)
        if state is None:
            if trains:
                raise UnfitCheckpointError(
                    "`ckpt_path` was not written by DMPO, so there is no run to continue: expected its buffer and "
                    "counters, got none. `export` the checkpoint, and pass the folder as `model`."
                )
            return
        for name in COUNTERS:
            setattr(module, name, int(state[name]))
        if not trains:
            return
        self._loaded = checkpoint["loops"]["fit_loop"]
        now, then = layout(module), state["layout"]
        if then == now:
            rank = state["ranks"][module.global_rank]
            module.buffer.load_state_dict(rank["buffer"])
            # Tried out here, where what cannot be restored is said to be the checkpoint's.
            own, self._generators = generator_states(), rank["generators"]
            restore_generators(self._generators)
            restore_generators(own)
            return
        module.buffer.clear()
        rank_zero_warn(
            f"The checkpoint's rollout buffer was made with {then}, this run has {now}: rollouts are collected afresh; "
            "weights and optimizer continue."
        )

    def restore_generators(self) -> None:
        """Called at each training batch. The first one restores them, because starting a loader draws from them."""
        if self._generators is not None:
            restore_generators(self._generators)
            self._generators = None


def layout(module: Any) -> dict[str, Any]:
    """What a buffer must have in common with a stored one."""
    return {
        "format": BUFFER_FORMAT,
        "world_size": module.trainer.world_size,
        "prompts_per_buffer": module.prompts_per_buffer,
        "group_size": module.group_size,
        "micro_batch_size": module.micro_batch_size,
        "num_iterations": module.buffer.num_iterations,
        "completion_length": module.completion_length,
    }


def _counters(module: Any) -> dict[str, int]:
    return {name: getattr(module, name) for name in COUNTERS}


def rewind_loops(loops: dict[str, Any], batches: int) -> None:
    """Takes the last training batches back, in Lightning's progress and in the loaders' states."""
    fit = loops["fit_loop"]
    progress, stepped = fit["epoch_loop.batch_progress"], fit["epoch_loop.state_dict"]
    for counts in (progress["total"], progress["current"]):
        if batches:
            ready = counts["ready"] - batches
            # As a callback finds them that saves at the end of a batch, for which Lightning completes it on a resume.
            counts.update(ready=ready, started=ready, processed=ready, completed=ready - 1)
        # The step was taken, and what follows it in its batch was not reached.
        counts["processed"] = counts["started"]
    if not batches:
        return
    progress["is_last_batch"] = False
    # Lightning counts the step again on a resume, because as a rule callbacks save before it has counted.
    stepped["_batches_that_stepped"] -= 1
    for counts in fit["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"].values():
        counts["ready"] = counts["completed"]
    for state in fit["state_dict"].get("combined_loader", []):
        state["handed_out"] -= batches
        # A loader that has handed out nothing starts the next epoch.
        state["epoch"] -= state["handed_out"] == 0


def generator_states() -> dict[str, Any]:
    """The states of this process's global generators, as tensors and primitives.

    The package's own draws are keyed. Only dropout, and rewards and data of the user's own, draw from these generators.
    Those of reward workers are other processes' and not among them.
    """
    name, numbers, *rest = np.random.get_state(legacy=True)
    numpy = (str(name), torch.from_numpy(np.asarray(numbers, dtype=np.int64)), *map(float, rest))
    states: dict[str, Any] = {"cpu": torch.get_rng_state(), "python": random.getstate(), "numpy": numpy}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_generators(states: dict[str, Any]) -> None:
    """Puts the generators back to where `generator_states` found them."""
    torch.set_rng_state(states["cpu"].cpu())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, words, position, has_gauss, kept = states["numpy"]
    np.random.set_state((name, words.cpu().numpy(), int(position), int(has_gauss), kept))
