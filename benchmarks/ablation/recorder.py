"""What is written down of a run: one row per evaluation."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from dmpo_lightning import DMPO
from dmpo_lightning.modules.observers import RolloutObserver
from dmpo_lightning.rollout import RolloutBuffer

MEASURED = ("reward", "ess", "informative", "entropy", "distinct_correct", "pass_at_group")


class Recorder(RolloutObserver):
    """Keeps a row per evaluation, the first of the base, and stops a run that has collapsed.

    Args:
        collapsed: the sampled solve rate at or below which a run has.
    """

    def __init__(self, collapsed: float) -> None:
        self.collapsed = collapsed
        self.rows: list[dict[str, Any]] = []
        self._buffers: list[dict[str, float]] = []
        self._started = 0.0
        self._tokens = {False: 0, True: 0}
        """Through the policy and its reference since training began, without a gradient and with one."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, DMPO)
        self._started = time.perf_counter()

        def count(_: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            # Prompts, padding and what an early exit computes again are all paid for; evaluations are nobody's cost.
            if trainer.training:
                self._tokens[torch.is_grad_enabled()] += given[0].numel()

        for network in pl_module.policy.networks:
            network.register_forward_pre_hook(count)

    def on_rollouts(self, trainer: Trainer, module: LightningModule, buffer: RolloutBuffer) -> None:
        self._buffers.append(
            {
                "reward": buffer.means["reward/total"],
                # Only weighted objectives have weights.
                "ess": buffer.means.get("weight/ess", float("nan")),
                "informative": buffer.means["reward/informative_groups"],
                "entropy": -float(buffer.rollouts.sampled_log_prob.mean()),
                "distinct_correct": _distinct_correct(buffer.rollouts.completions, buffer.rollouts.reward),
                # pass@8 of Countdown and pass@4 of Sudoku, on prompts that the policy has not been trained on before.
                "pass_at_group": float((buffer.rollouts.reward >= 1).any(-1).float().mean()),
            }
        )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, DMPO)
        found = {name: float(value) for name, value in trainer.callback_metrics.items()}
        since = self._buffers or [dict.fromkeys(MEASURED, float("nan"))]
        self.rows.append(
            {
                "step": trainer.global_step,
                "rollouts": pl_module.rollouts_seen,
                "seconds": round(time.perf_counter() - self._started, 1) if self._buffers else 0.0,
                **{name: found[f"val/{name}/accuracy"] for name in ("sampled", "greedy")},
                **{f"{name}_se": found[f"val/{name}/accuracy_stderr"] for name in ("sampled", "greedy")},
                "tokens_forward": self._tokens[False],
                "tokens_trained": self._tokens[True],
                **{name: sum(buffer[name] for buffer in since) / len(since) for name in MEASURED},
            }
        )
        self._buffers = []
        if self.rows[-1]["sampled"] <= self.collapsed:
            trainer.should_stop = True


def _distinct_correct(completions: Sequence[Sequence[str]], reward: torch.Tensor) -> float:
    """Different completions of full reward, 1, per prompt."""
    found = [
        {text for text, value in zip(texts, values, strict=True) if value >= 1}
        for texts, values in zip(completions, reward.tolist(), strict=True)
    ]
    return sum(map(len, found)) / len(found)
