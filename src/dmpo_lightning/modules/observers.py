"""What callbacks can see of each rollout buffer, right after it was collected."""

from lightning.pytorch import Callback, LightningModule, Trainer

from dmpo_lightning.distributed.internals import callbacks_of
from dmpo_lightning.rollout import RolloutBuffer


class RolloutObserver(Callback):
    """A callback that sees each rollout buffer. All ranks call it, each with its own rollouts."""

    def on_rollouts(self, trainer: Trainer, module: LightningModule, buffer: RolloutBuffer) -> None:
        """Called once per buffer, before the first micro-batch is trained on.

        The buffer is the module's own, which holds other rollouts later. What is to be kept of it is copied.
        """


def notify(trainer: Trainer, module: LightningModule, buffer: RolloutBuffer) -> None:
    """Shows a buffer to all observers among the callbacks, in their order."""
    for observer in callbacks_of(trainer, RolloutObserver):
        observer.on_rollouts(trainer, module, buffer)
