"""Histograms, completions and the learning curve in the run's loggers, whichever they are."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from dmpo_lightning.callbacks.samples import best_and_worst
from dmpo_lightning.callbacks.sinks import log_figure, log_histogram, log_samples
from dmpo_lightning.modules.observers import RolloutObserver
from dmpo_lightning.rollout import RolloutBuffer, check_counts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HISTOGRAMS = {"weight": "weight/histogram", "log_rnd": "policy/log_rnd_histogram"}
"""Names in the logger, by names of the objective's targets."""
LONGEST_TEXT = 4000
"""Characters of a prompt or completion that a logger gets."""


class LoggingExtras(RolloutObserver):
    """Gives TensorBoard, W&B and MLflow what is not a number: ``weight/histogram`` and ``policy/log_rnd_histogram``,
    prompts with their best and worst completion in ``completion/text``, and at the end ``curve/accuracy``.

    All of it is of rank 0's rollouts. Loggers of scalars alone, such as that of CSV files, get the scalars they always
    get. The command line adds this callback by itself. A logger that fails here is left alone from then on, with a
    warning, and the run goes on.

    Args:
        every_n_buffers: how often, beginning with the first buffer.
        prompts: of each such buffer.
    """

    def __init__(self, every_n_buffers: int = 10, prompts: int = 4) -> None:
        check_counts(every_n_buffers=every_n_buffers, prompts=prompts)
        self.every_n_buffers, self.prompts = every_n_buffers, prompts
        self.curve: list[tuple[int, str, float]] = []
        """Step, name and value of each validation accuracy."""
        self._failed: set[int] = set()

    def on_rollouts(self, trainer: Trainer, module: LightningModule, buffer: RolloutBuffer) -> None:
        if buffer.number % self.every_n_buffers or not trainer.is_global_zero or not trainer.loggers:
            return
        step = trainer.global_step
        for target, name in HISTOGRAMS.items():
            if (values := buffer.targets.get(target)) is not None:
                self._give(trainer, partial(log_histogram, name=name, values=values, step=step))
        samples = [
            replace(each, prompt=each.prompt[-LONGEST_TEXT:], completion=each.completion[-LONGEST_TEXT:])
            for each in best_and_worst(module, buffer, self.prompts)
        ]
        self._give(trainer, partial(log_samples, name="completion/text", samples=samples, step=step))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        accuracies = {name: value for name, value in logged.items() if name.endswith("/accuracy")}
        self.curve += [(trainer.global_step, name, value) for name, value in accuracies.items()]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.curve and trainer.is_global_zero:
            self._give(trainer, partial(log_figure, name="curve/accuracy", draw=self.draw, step=trainer.global_step))

    def state_dict(self) -> dict[str, Any]:
        return {"curve": [list(point) for point in self.curve]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The figure of a run that is continued shows all of it."""
        self.curve = [(step, name, value) for step, name, value in state_dict["curve"]]

    def draw(self) -> "Figure":
        """Accuracy over optimizer steps, a line for each sampler and length."""
        # Slow to import, and needed once in a run (docs/decisions/006-matplotlib.md).
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for name in dict.fromkeys(name for _, name, _ in self.curve):
            points = [(step, value) for step, each, value in self.curve if each == name]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        axes.set(xlabel="optimizer step", ylabel="accuracy", ylim=(0, 1))
        axes.grid(alpha=0.3)
        axes.legend()
        return figure

    def _give(self, trainer: Trainer, log: Callable[[Any], None]) -> None:
        for logger in trainer.loggers:
            if id(logger) in self._failed:
                continue
            try:
                log(logger)
            # Services and disks fail in as many ways as there are loggers, and training need not end for a picture.
            except Exception as error:
                self._failed.add(id(logger))
                rank_zero_warn(
                    f"{type(logger).__name__} gets no more histograms, completions and figures, because one failed: "
                    f"{type(error).__name__}: {error}"
                )
