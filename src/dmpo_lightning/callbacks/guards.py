"""Warns before a run is lost."""

from dataclasses import asdict
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from dmpo_lightning.callbacks.guard_rules import RULES, Finding, History
from dmpo_lightning.callbacks.records import record_warning
from dmpo_lightning.distributed.ranks import means_over_ranks
from dmpo_lightning.modules.observers import RolloutObserver
from dmpo_lightning.rollout import RolloutBuffer

PATIENCE = 20
"""Buffers between two warnings of one guard, at least."""


class Guards(RolloutObserver):
    """Watches the numbers of each rollout buffer of `DMPO`, and says in plain words when they show that a run is lost.

    A warning says what is seen, the likely cause and the option to change. Each guard warns once, and again only after
    it has recovered and 20 buffers have passed. What was said is in ``events``, one dictionary each, and in the record
    of the run. Both continue after a restart. ``dmpo-lightning fit`` adds the callback by itself. ``docs/metrics.md``
    says what the numbers mean.

    All arguments up to ``log_rnd`` are thresholds, each of one guard. None switches it off.

    Args:
        reward_drop: standard errors, of the running reward and of its best, by which the two lie apart.
        informative_groups: the least share of groups whose rewards differ, while the reward has not risen.
        entropy: the least share of the first buffer's entropy, while the reward has not risen.
        distinct: the least variety of a group's completions, while the reward has not risen. 0 is all the same, 1 all
            different.
        effective_rollouts: the least number of rollouts of a group that carry its weight.
        repetition: the largest share of repeated 4-grams.
        empty: the largest share of empty completions.
        truncated: the largest share of completions without an end token.
        log_rnd: the largest mean and spread of log_rnd, in nats per token.
        window: buffers over which reward and informative groups are averaged. They are more where these hold fewer than
            100 prompts. The other numbers are averaged over three.

    Raises:
        ValueError: a value is outside its range.
    """

    def __init__(
        self,
        *,
        reward_drop: float | None = 4.0,
        informative_groups: float | None = 0.01,
        entropy: float | None = 0.02,
        distinct: float | None = 0.01,
        effective_rollouts: float | None = 1.1,
        repetition: float | None = 0.5,
        empty: float | None = 0.5,
        truncated: float | None = 0.9,
        log_rnd: float | None = 0.5,
        window: int = 10,
    ) -> None:
        given = locals()
        self.thresholds: dict[str, float | None] = {name: given[name] for name in RULES}
        for name, value in self.thresholds.items():
            # Written so that NaN, which compares as false with everything, fails.
            if value is not None and not value >= 0:
                raise ValueError(f"`{name}` must be at least 0, or null to switch the guard off, got {value}.")
        if window < 1:
            raise ValueError(f"`window` must be at least 1 buffer, got {window}.")
        self.window = window
        self._begin()

    def _begin(self) -> None:
        """Nothing has been seen yet."""
        self.events: list[dict[str, Any]] = []
        """What was said: ``step``, ``buffer``, ``name``, ``value`` and ``message``."""
        self._history = History(self.window, errors=self.thresholds["reward_drop"] or 0.0)
        self._said: dict[str, int] = {}
        """When each guard has spoken last, counted in buffers."""
        self._on: set[str] = set()
        """The guards that have spoken and not recovered."""
        self._buffer = -1
        """The last one that was counted."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """A run that continues gets the state of its checkpoint after this hook."""
        if stage == "fit":
            self._begin()

    def on_rollouts(self, trainer: Trainer, module: LightningModule, buffer: RolloutBuffer) -> None:
        # A checkpoint taken within a step has its buffer collected again, which has been counted by then.
        if buffer.number <= self._buffer:
            return
        self._buffer = buffer.number
        prompts, group = buffer.rollouts.group_shape
        # Of all that were sampled, as the other means: those of a buffer that chooses among prompts say less.
        rewards = buffer.sampled_reward.double()
        means = rewards.mean(-1)
        of_reward = {"reward": means, "reward_square": means.square()}
        self._history.add(
            {**buffer.means, **means_over_ranks(of_reward)},
            prompts=prompts * trainer.world_size,
            group=group,
            length=buffer.rollouts.completion_ids.shape[-1],
        )
        for name, rule in RULES.items():
            threshold = self.thresholds[name]
            if threshold is not None:
                self._judge(trainer, module, name, rule(self._history, threshold))

    def _judge(self, trainer: Trainer, module: LightningModule, name: str, found: Finding | None) -> None:
        """Warns of a finding, unless that was done. All ranks find the same, from means over all of them."""
        now = self._history.count
        if found is None:
            self._on.discard(name)
        elif name not in self._on and now - self._said.get(name, -PATIENCE) >= PATIENCE:
            self._on.add(name)
            self._said[name] = now
            value, message = found
            event = {"step": trainer.global_step, "buffer": self._buffer, "name": name, "value": value}
            self.events.append({**event, "message": message})
            rank_zero_warn(f"Guard {name}, at optimizer step {trainer.global_step}: {message}")
            record_warning(trainer, module, self.events[-1])

    def state_dict(self) -> dict[str, Any]:
        """What was seen and said, as plain values. Empty before the first buffer, and where nothing is trained."""
        if self._buffer < 0:
            return {}
        return {
            "events": list(self.events),
            "history": asdict(self._history),
            "said": dict(self._said),
            "on": sorted(self._on),
            "buffer": self._buffer,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the state was taken, with the thresholds of this run."""
        self.events, self._buffer = list(state_dict["events"]), state_dict["buffer"]
        best = state_dict["history"]["best"]
        now = {"window": self._history.window, "errors": self._history.errors, "best": best and tuple(best)}
        self._history = History(**state_dict["history"] | now)
        self._said, self._on = dict(state_dict["said"]), set(state_dict["on"])
