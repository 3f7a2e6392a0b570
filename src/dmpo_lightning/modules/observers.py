"""What callbacks can see of each rollout buffer, right after it was collected."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from dmpo_lightning.distributed.internals import callbacks_of
from dmpo_lightning.rewards.scores import Scores
from dmpo_lightning.rollout import PromptBatch, Rollouts


@dataclass(frozen=True)
class CollectedBuffer:
    """One rollout buffer of this rank, with all that is known of it before training on it begins.

    Args:
        iteration: how many buffers were collected before this one.
        prompts: the prompts, with their examples.
        rollouts: the rollouts, group by group.
        completions: the decoded texts, one list per prompt.
        scores: what the rewards come from.
        targets: of the objective, each ``[batch group ...]``; of WDCE and WDDO with ``log_rnd`` and ``weight`` among
            them, of WDCE with ``signal``.
        means: what is logged of the buffer, over all ranks.
        seconds: wall time of this rank by phase, ``sampling`` (with rewards) and ``scoring``.
        sampled_reward: the rewards ``[prompts group]`` of all rollouts that this rank sampled, as in ``means``: of more
            than the buffer holds if there were several ``sampling_rounds``.
        left_out: the ``prompt_index`` of each prompt that was sampled and is not in the buffer.
    """

    iteration: int
    prompts: PromptBatch
    rollouts: Rollouts
    completions: Sequence[Sequence[str]]
    scores: Scores
    targets: Mapping[str, Tensor]
    means: Mapping[str, float]
    seconds: Mapping[str, float]
    sampled_reward: Tensor
    left_out: Sequence[int]

    @property
    def sampled(self) -> int:
        """How many rollouts this rank sampled."""
        return self.sampled_reward.numel()


class RolloutObserver(Callback):
    """A callback that sees each rollout buffer. All ranks call it, each with its own rollouts."""

    def on_rollouts(self, trainer: Trainer, module: LightningModule, collected: CollectedBuffer) -> None:
        """Called once per buffer, before the first micro-batch is trained on."""


def notify(trainer: Trainer, module: LightningModule, collected: CollectedBuffer) -> None:
    """Shows a buffer to all observers among the callbacks, in their order."""
    for observer in callbacks_of(trainer, RolloutObserver):
        observer.on_rollouts(trainer, module, collected)
