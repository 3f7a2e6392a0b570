"""What loggers take beside scalars, each in its own way. Found by their names, because none of them need be installed.

A logger that takes nothing of a kind, as that of CSV files, is left out.
"""

from collections.abc import Callable, Sequence
from dataclasses import astuple, fields
from typing import Any

from torch import Tensor

from dmpo_lightning.callbacks.samples import Sample
from dmpo_lightning.terminal import printable

BINS = 32
"""Of histograms where the logger makes none itself."""


def log_histogram(logger: Any, name: str, values: Tensor, step: int) -> None:
    """A histogram of all values. MLflow, which has none, gets edges and counts as JSON."""
    values = values.detach().flatten().float().cpu()
    match _kind(logger):
        case "TensorBoardLogger":
            logger.experiment.add_histogram(name, values, step)
        case "WandbLogger":
            import wandb

            logger.log_metrics({name: wandb.Histogram(values.numpy())}, step)
        case "MLFlowLogger":
            # A histogram has no edges where nothing is finite.
            finite = values[values.isfinite()]
            counts, edges = finite.histogram(BINS)
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


def log_figure(logger: Any, name: str, draw: Callable[[], Any], step: int) -> None:
    """A figure of matplotlib, which ``draw`` makes where the logger takes figures."""
    match _kind(logger):
        case "TensorBoardLogger":
            logger.experiment.add_figure(name, draw(), step)
        case "WandbLogger":
            import wandb

            logger.log_metrics({name: wandb.Image(draw())}, step)
        case "MLFlowLogger":
            logger.experiment.log_figure(logger.run_id, draw(), f"{name}.png")


def _kind(logger: Any) -> str:
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
