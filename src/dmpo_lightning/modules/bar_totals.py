"""The numbers of Lightning's own progress bars, where Lightning gets them wrong."""

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar


class BarTotals(Callback):
    """Corrects what `TQDMProgressBar` and `RichProgressBar` count to in runs that ``max_steps`` ends.

    Lightning takes the optimizer steps that are left for the batches of the epoch, also where the epoch continues
    (`16/14`) or where an optimizer step takes several batches, and shows the missing limit of epochs as ``-2``. The
    modules of this package add it by themselves.
    """

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Modules' callbacks come after the Trainer's own, so that the bar has set its numbers by now.
        bar, total = trainer.progress_bar_callback, epoch_batches(trainer)
        if isinstance(bar, TQDMProgressBar):
            bar.train_progress_bar.total = total
            bar.train_progress_bar.refresh()
        elif isinstance(bar, RichProgressBar) and bar.progress is not None and bar.train_progress_bar_id is not None:
            epochs = trainer.max_epochs or -1
            description = f"Epoch {trainer.current_epoch}{f'/{epochs - 1}' if epochs > 0 else ''}"
            bar.progress.update(bar.train_progress_bar_id, total=total, description=description)


def epoch_batches(trainer: Trainer) -> int | None:
    """The number of the last batch of this epoch that will be trained on. None without an end."""
    if trainer.num_training_batches == float("inf"):
        return None
    batches = int(trainer.num_training_batches)
    if trainer.max_steps < 0:
        return batches
    done = trainer.fit_loop.epoch_loop.batch_progress.current.completed
    return min(batches, done + (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches)
