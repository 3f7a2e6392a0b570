"""What callbacks can see of each rollout buffer, right after it was collected; and the one that measures its time."""

from collections.abc import Mapping
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from dmpo_lightning.rollout import RolloutBuffer


class RolloutObserver(Callback):
    """A callback that sees each rollout buffer. All ranks call it, each with its own rollouts."""

    def on_rollouts(self, trainer: Trainer, module: LightningModule, buffer: RolloutBuffer) -> None:
        """Called once per buffer, before the first micro-batch is trained on.

        The buffer is the module's own, which holds other rollouts later. What is to be kept of it is copied.
        """


class RunMeter(RolloutObserver):
    """Logs what a run costs. `DMPO` adds one by itself.

    ``time/sampling`` (with rewards), ``time/scoring`` and ``time/training`` are seconds of one buffer on this rank.
    ``rollouts/seen`` counts all ranks, ``rollouts/per_second`` is that of the last buffer, without validation.
    ``optimizer/lr`` is the learning rate of the first parameters.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from dmpo_lightning import RunMeter
        >>> trainer = Trainer(callbacks=[RunMeter()])
    """

    def __init__(self) -> None:
        self._seconds: Mapping[str, float] = {}
        self._rollouts = 0
        self._training = self._collecting = self._batch_started = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Of the buffer that is being trained on. A run that is continued within one goes on with its times."""
        return {"seconds": dict(self._seconds), "rollouts": self._rollouts, "training": self._training}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds, self._rollouts = state_dict["seconds"], state_dict["rollouts"]
        self._training = state_dict["training"]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch_started, self._collecting = perf_counter(), 0.0
        if trainer.optimizers:
            pl_module.log("optimizer/lr", float(trainer.optimizers[0].param_groups[0]["lr"]), batch_size=1)

    def on_rollouts(self, trainer: Trainer, module: LightningModule, buffer: RolloutBuffer) -> None:
        self._seconds, self._rollouts = buffer.seconds, len(buffer.rollouts) * trainer.world_size
        # Of a buffer that an epoch cut short there is no time of training that could be compared.
        self._training, self._collecting = 0.0, sum(buffer.seconds.values())
        values = {f"time/{name}": seconds for name, seconds in buffer.seconds.items()}
        seen = float(getattr(module, "rollouts_seen", self._rollouts))
        module.log_dict(values | {"rollouts/seen": seen}, batch_size=1)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        buffer: Any = getattr(pl_module, "buffer", None)
        is_used_up = buffer is not None and buffer.needs_rollouts
        device = trainer.strategy.root_device
        if is_used_up and device.type == "cuda":
            # Else the time of training would be counted as that of the next sampling, which waits for it in any case.
            torch.cuda.synchronize(device)
        self._training += perf_counter() - self._batch_started - self._collecting
        # An older checkpoint does not say how long the buffer was sampled.
        if is_used_up and self._seconds:
            rate = self._rollouts / (sum(self._seconds.values()) + self._training)
            pl_module.log_dict({"time/training": self._training, "rollouts/per_second": rate}, batch_size=1)


def measure_first(trainer: Trainer) -> None:
    """Puts the meter before all other callbacks, which read what it logs at the same moment."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    callbacks.sort(key=lambda each: not isinstance(each, RunMeter))
