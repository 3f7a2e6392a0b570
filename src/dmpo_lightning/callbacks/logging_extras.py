"""Histograms and completions in the run's loggers, whichever they are."""

from collections.abc import Sequence
from dataclasses import astuple, fields, replace
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from dmpo_lightning.callbacks.samples import Sample, best_and_worst
from dmpo_lightning.modules.observers import RolloutObserver
from dmpo_lightning.rollout import RolloutBuffer, check_counts
from dmpo_lightning.terminal import printable

HISTOGRAMS = {"weight": "weight/histogram", "log_rnd": "policy/log_rnd_histogram"}
"""Names in the logger, by names of the objective's targets."""
BINS = 32
"""Of histograms where the logger makes none itself."""
LONGEST_TEXT = 4000
"""Characters of a prompt or completion that a logger gets."""


class LoggingExtras(RolloutObserver):
    """Gives TensorBoard, W&B and MLflow what is not a number: ``weight/histogram`` and ``policy/log_rnd_histogram``,
    and prompts with their best and worst completion in ``completion/text``.

    All of it is of rank 0's rollouts. Loggers of scalars alone, such as that of CSV files, get the scalars they always
    get. The command line adds this callback by itself. A logger that fails here gets nothing more of it: a warning says
    so, and the run goes on.

    Args:
        every_n_buffers: how often, beginning with the first buffer.
        prompts: of each such buffer.
    """

    def __init__(self, every_n_buffers: int = 10, prompts: int = 4) -> None:
        check_counts(every_n_buffers=every_n_buffers, prompts=prompts)
        self.every_n_buffers, self.prompts = every_n_buffers, prompts
        self._failed: set[int] = set()

    def on_rollouts(self, trainer: Trainer, module: LightningModule, buffer: RolloutBuffer) -> None:
        if buffer.number % self.every_n_buffers or not trainer.is_global_zero or not trainer.loggers:
            return
        samples = [
            replace(each, prompt=each.prompt[-LONGEST_TEXT:], completion=each.completion[-LONGEST_TEXT:])
            for each in best_and_worst(module, buffer, self.prompts)
        ]
        for logger in trainer.loggers:
            if id(logger) in self._failed:
                continue
            try:
                for target, name in HISTOGRAMS.items():
                    if (values := buffer.targets.get(target)) is not None:
                        log_histogram(logger, name, values.flatten().float().cpu(), trainer.global_step)
                log_samples(logger, "completion/text", samples, trainer.global_step)
            # Services and disks fail in as many ways as there are loggers, and training need not end for a picture.
            except Exception as error:
                self._failed.add(id(logger))
                rank_zero_warn(
                    f"{type(logger).__name__} gets no more histograms and completions, because one failed: "
                    f"{type(error).__name__}: {error}"
                )


def log_histogram(logger: Any, name: str, values: Tensor, step: int) -> None:
    """A histogram of all values. MLflow, which has none, gets edges and counts as JSON."""
    match _kind(logger):
        case "TensorBoardLogger":
            logger.experiment.add_histogram(name, values, step)
        case "WandbLogger":
            import wandb

            logger.log_metrics({name: wandb.Histogram(values.numpy())}, step)
        case "MLFlowLogger":
            # A histogram has no edges where nothing is finite.
            counts, edges = values[values.isfinite()].histogram(BINS)
            content = {"step": step, "edges": edges.tolist(), "counts": counts.tolist()}
            logger.experiment.log_dict(logger.run_id, content, f"histograms/{name}/step_{step:08}.json")


def log_samples(logger: Any, name: str, samples: Sequence[Sample], step: int) -> None:
    """Rollouts in words: a table where the logger has tables, else text."""
    columns = [field.name for field in fields(Sample)]
    match _kind(logger):
        case "TensorBoardLogger":
            logger.experiment.add_text(name, _markdown(samples), step)
        case "WandbLogger":
            logger.log_table(name, columns=columns, data=[list(astuple(each)) for each in samples], step=step)
        case "MLFlowLogger":
            table = {column: [getattr(each, column) for each in samples] for column in columns}
            # A file for each step: MLflow adds to a table by reading all of it.
            logger.experiment.log_table(logger.run_id, table, f"{name}/step_{step:08}.json")


def _kind(logger: Any) -> str:
    """By names, because none of their packages need be installed."""
    known = ("TensorBoardLogger", "WandbLogger", "MLFlowLogger")
    return next((each.__name__ for each in type(logger).__mro__ if each.__name__ in known), "")


def _markdown(samples: Sequence[Sample]) -> str:
    """TensorBoard reads Markdown, in which completions could be anything: lines of code are shown as they are."""
    parts = []
    for each in samples:
        parts += [f"reward {each.reward:.4g}, weight {each.weight:.4g}", _code(each.prompt), _code(each.completion)]
    return "\n\n".join(parts)


def _code(text: str) -> str:
    return "\n".join(f"    {line}" for line in printable(text).split("\n"))
