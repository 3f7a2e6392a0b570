"""Optimizer steps whose gradient is not finite are left out, on all ranks alike."""

import math
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from dmpo_lightning.distributed.internals import callbacks_of
from dmpo_lightning.distributed.ranks import gather_ranks
from dmpo_lightning.distributed.sharding import gradient_norm
from dmpo_lightning.modules.base import PolicyModule


class SkipNonFiniteSteps(Callback):
    """Leaves an optimizer step out where a gradient of any rank is not finite, says so and counts it.

    `DMPO` adds one by itself. Put your own among the Trainer's callbacks for another limit. DeepSpeed hides its
    gradients and leaves such steps out by itself, which is counted in the same way. The count is logged as
    ``train/skipped_steps`` and continues after a restart. The norm that it looks at is logged as ``gradient/norm``:
    over all ranks, before clipping, of the steps that are taken.

    Args:
        limit: steps in a row that may be left out. One more ends the run with a ValueError.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from dmpo_lightning import SkipNonFiniteSteps
        >>> trainer = Trainer(callbacks=[SkipNonFiniteSteps(limit=3)])
    """

    def __init__(self, limit: int = 10) -> None:
        self.limit = limit
        self.total = self.in_a_row = 0
        self.norm: float | None = None
        """Of the last optimizer step, None where it was left out. Under DeepSpeed `norm_of_step` knows it."""
        self._engine_steps = self._engine_skipped = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._engine_steps, self._engine_skipped = _engine_counts(trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            return
        # One total norm waits for the device once, a check of each gradient once per parameter.
        norm = float(gradient_norm(pl_module.policy.model if isinstance(pl_module, PolicyModule) else pl_module))
        # All ranks decide together: weights of a rank that steps alone would differ from then on.
        if trainer.strategy.reduce_boolean_decision(math.isfinite(norm)):
            self.in_a_row, self.norm = 0, norm
            pl_module.log("gradient/norm", norm, batch_size=1)
            return
        self.norm = None
        for parameter in pl_module.parameters():
            # An optimizer does nothing to parameters without a gradient.
            parameter.grad = None
        self._skip(pl_module, trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts what DeepSpeed has left out. Lightning calls callbacks that save after all others."""
        steps, skipped = _engine_counts(trainer)
        if skipped > self._engine_skipped:
            # Lightning has counted this step by now. Before the step, where the others notice, its number was one less.
            self._skip(pl_module, trainer.global_step - 1)
        elif steps > self._engine_steps:
            self.in_a_row = 0
            norm = norm_of_step(trainer)
            if norm is not None:
                pl_module.log("gradient/norm", norm, batch_size=1)
        self._engine_steps, self._engine_skipped = steps, skipped

    def _skip(self, module: LightningModule, step: int) -> None:
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        rank_zero_warn(
            f"A gradient is not finite: optimizer step {step} was left out, {self.total} so far, {self.in_a_row} in a "
            "row."
        )
        module.log("train/skipped_steps", float(self.total), batch_size=1)
        if self.in_a_row > self.limit:
            raise ValueError(
                f"{self.in_a_row} optimizer steps in a row had gradients that are not finite, more than the `limit` "
                f"{self.limit} of SkipNonFiniteSteps. {_likely_causes(module.trainer)}"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.total, self.in_a_row = state_dict["total"], state_dict["in_a_row"]


def check_policy(trainer: Trainer, values: Mapping[str, Tensor]) -> None:
    """Ends a run whose policy has been destroyed, before anything is made of its rollouts. All ranks call it together.

    Raises:
        ValueError: a number of a buffer's rollouts that says something of the policy is NaN.
    """
    own = [name for name, value in values.items() if name.startswith("policy/") and bool(value.isnan().any())]
    if odd := [name for each in gather_ranks(own) for name in each]:
        raise ValueError(
            f"`{odd[0]}` of the rollouts at optimizer step {trainer.global_step} is not finite: the policy has been "
            f"destroyed by a step before. {_likely_causes(trainer)}"
        )


def _likely_causes(trainer: Trainer) -> str:
    """What most often destroys a policy, with this run's options, and what is saved."""
    rate, clipped = trainer.optimizers[0].param_groups[0]["lr"], trainer.gradient_clip_val
    paths = [getattr(each, "last_model_path", "") for each in trainer.checkpoint_callbacks]
    saved = next(filter(None, paths), None)
    newest = f"The last checkpoint, {saved}, may hold it already" if saved else "No last checkpoint was saved"
    return (
        f"Most often the learning rate is too high (it is {float(rate):.3g}), gradients are not clipped "
        f"(`gradient_clip_val` is {clipped}), or the precision is too low (it is {trainer.precision}). {newest}."
    )


def norm_of_step(trainer: Trainer) -> float | None:
    """The gradient's norm of the optimizer step that a batch has ended with, which callbacks may ask at its end.

    None is a step that was left out, or that nobody has looked at.
    """
    engine = getattr(trainer.strategy, "deepspeed_engine", None)
    if engine is not None:
        # None where the engine was told not to compute it.
        norm = engine.get_global_grad_norm()
        return None if norm is None or not math.isfinite(norm) else float(norm)
    return next((each.norm for each in callbacks_of(trainer, SkipNonFiniteSteps)), None)


def _engine_counts(trainer: Trainer) -> tuple[int, int]:
    """DeepSpeed's optimizer steps, and how many of them it left out. Both are zero under any other strategy."""
    engine = getattr(trainer.strategy, "deepspeed_engine", None)
    return (engine.global_steps, engine.skipped_steps) if engine else (0, 0)
