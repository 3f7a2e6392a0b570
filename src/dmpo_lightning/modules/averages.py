"""Lightning's averages of weights, beside weights that are not trained."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging

from dmpo_lightning.distributed.internals import averaged_module, callbacks_of


def averaging_callbacks(trainer: Trainer) -> list[Any]:
    """Those of Lightning's callbacks that average weights."""
    return [*callbacks_of(trainer, WeightAveraging), *callbacks_of(trainer, StochasticWeightAveraging)]


def refuse_divided(trainer: Trainer) -> None:
    """Raises ValueError where weights are to be averaged that are divided among ranks."""
    for callback in averaging_callbacks(trainer):
        raise ValueError(
            f"{type(callback).__name__} averages whole weights, but {type(trainer.strategy).__name__} divides them "
            "among ranks; use DDP, or leave the callback out."
        )


@torch.no_grad()
def keep_frozen_weights(trainer: Trainer, module: LightningModule) -> None:
    """Weights that are not trained are not averaged: base and reference stay what they are.

    The moving average of a weight that does not change drifts away from it by rounding, and that of a renewed reference
    is none of its states.
    """
    for callback in averaging_callbacks(trainer):
        copy = averaged_module(callback)
        if copy is not None:
            for own, averaged in zip(module.parameters(), copy.parameters(), strict=True):
                if not own.requires_grad:
                    averaged.copy_(own)
