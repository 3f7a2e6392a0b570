"""Where one rank of a run stands between two optimizer steps, which is all that a checkpoint can continue from."""

from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer

from dmpo_lightning.modules.generators import generator_states, restore_generators
from dmpo_lightning.rollout import RolloutBuffer


@dataclass
class OpenStep:
    """The optimizer step that is being accumulated."""

    step: int
    """Optimizer steps taken before it."""
    generators: dict[str, Any]
    """As its first micro-batch found them."""
    collected: bool
    """Whether its first micro-batch collected a buffer."""
    micro_batches: int = 0
    """Micro-batches that have begun."""


class Continuation:
    """Writes this rank's part of a checkpoint, and restores the generators of one.

    Gradients that are being accumulated are in no checkpoint. One that is taken between two optimizer steps, as
    Lightning's `ModelCheckpoint` takes one right after a resume, is therefore written as it would have been after the
    last step: its progress, loaders, buffer and generators go back, and the step is begun again.
    """

    def __init__(self) -> None:
        self._open: OpenStep | None = None
        self._generators: dict[str, Any] | None = None

    def start(self) -> None:
        """A run starts, with no step begun."""
        self._open = None

    def begin_micro_batch(self, trainer: Trainer, buffer: RolloutBuffer) -> None:
        """Notes how its step found generators and buffer. With a step per batch, none is ever left open."""
        if trainer.accumulate_grad_batches == 1:
            return
        if self._open is None or self._open.step != trainer.global_step:
            self._open = OpenStep(trainer.global_step, generator_states(), buffer.needs_rollouts)
        self._open.micro_batches += 1

    def save(self, trainer: Trainer, buffer: RolloutBuffer, loops: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """Buffer and generators after the last optimizer step, and the number of buffers collected since, 0 or 1.

        ``loops`` is the progress that Lightning has put into the checkpoint. It goes back as well.
        """
        state, now = buffer.state_dict(), self._open
        if now is None or now.step != trainer.global_step:
            return {"buffer": state, "generators": generator_states()}, 0
        rewind_loops(loops, now.micro_batches)
        before = {"position": 0} if now.collected else state | {"position": state["position"] - now.micro_batches}
        return {"buffer": before, "generators": now.generators}, int(now.collected)

    def load(self, state: dict[str, Any], buffer: RolloutBuffer) -> None:
        """Fills the buffer from what `save` returned. The generators wait for `restore_generators`."""
        buffer.load_state_dict(state["buffer"])
        self._generators = state["generators"]

    def restore_generators(self) -> None:
        """Called at each training batch. The first one restores them, because starting a loader draws from them."""
        if self._generators is not None:
            restore_generators(self._generators)
            self._generators = None


def rewind_loops(loops: dict[str, Any], micro_batches: int) -> None:
    """Takes the last training batches back, in Lightning's progress and in the loaders' states."""
    fit = loops["fit_loop"]
    batches = fit["epoch_loop.batch_progress"]
    for progress in (batches["total"], batches["current"]):
        for name in progress:
            progress[name] -= micro_batches
    # Of an epoch that has not begun, no batch waits for its completion.
    if batches["current"]["ready"] == 0:
        batches["total"]["completed"], batches["current"]["completed"] = batches["total"]["ready"], 0
    batches["is_last_batch"] = False
    for state in fit["state_dict"].get("combined_loader", []):
        state["handed_out"] -= micro_batches
        # A loader that has handed out nothing starts the next epoch.
        state["epoch"] -= state["handed_out"] == 0
