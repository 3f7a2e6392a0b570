"""Warns before a run is lost: rules over the numbers of its rollout buffers, and what they say.

``docs/metrics.md`` explains the numbers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from dmpo_lightning.callbacks.records import RunRecorder
from dmpo_lightning.distributed.internals import callbacks_of
from dmpo_lightning.distributed.ranks import means_over_ranks
from dmpo_lightning.modules.observers import RolloutObserver
from dmpo_lightning.rollout import RolloutBuffer

Buffer = Mapping[str, float]
"""The numbers of a buffer that are logged, and ``reward`` and ``reward_square``, means over prompts."""
SHORT = 3
"""Buffers whose mean is judged where a buffer has so many tokens or groups that chance plays no part."""
PROMPTS = 100
"""Prompts behind a statement on the reward or on groups. With fewer, chance alone makes and breaks records."""


@dataclass
class History:
    """What is remembered of a run's buffers: the first ones, the last ones, and the best reward in between.

    Args:
        window: the number of buffers over which reward and groups are averaged, or more where these hold fewer than
            `PROMPTS` prompts.
        errors: standard errors by which the best reward is discounted, so that a lucky buffer is no record.
    """

    window: int
    errors: float
    prompts: int = 0
    """Prompts of one buffer, over all ranks."""
    group: int = 0
    length: int = 0
    """Tokens of a completion."""
    first: list[Buffer] = field(default_factory=list)
    recent: list[Buffer] = field(default_factory=list)
    best: tuple[float, float] | None = None
    """Mean and error of the running reward that was best, discounted."""

    def add(self, means: Buffer, *, prompts: int, group: int, length: int) -> None:
        """Takes in the next buffer."""
        if (self.prompts, self.group, self.length) != (prompts, group, length):
            # Another number of ranks, or other options after a resume: old and new buffers cannot be averaged.
            self.prompts, self.group, self.length, self.recent = prompts, group, length, []
        row = {name: value for name, value in means.items() if math.isfinite(value)}
        if len(self.first) * prompts < PROMPTS:
            self.first.append(row)
        self.recent = [*self.recent, row][-max(self.buffers, SHORT) :]
        now = self.reward
        if now is not None and (self.best is None or self._low(now) > self._low(self.best)):
            self.best = now

    def _low(self, reward: tuple[float, float]) -> float:
        return reward[0] - self.errors * reward[1]

    @property
    def buffers(self) -> int:
        """How many buffers the long window has."""
        return max(self.window, math.ceil(PROMPTS / self.prompts))

    @property
    def reward(self) -> tuple[float, float] | None:
        """The running mean of the reward, with its standard error over prompts."""
        return self._reward_of(self.recent[-self.buffers :])

    def _reward_of(self, rows: Sequence[Buffer]) -> tuple[float, float] | None:
        """None where so few buffers are too few to judge."""
        rows = [row for row in rows if "reward" in row]
        count = len(rows) * self.prompts
        if count < PROMPTS:
            return None
        mean = fmean(row["reward"] for row in rows)
        variance = max(fmean(row["reward_square"] for row in rows) - mean**2, 0.0)
        return mean, math.sqrt(variance / (count - 1))

    @property
    def has_risen(self) -> bool:
        """Whether the reward is better than at the start, by more than chance: of the window, or of its last part."""
        start = self._reward_of(self.first)
        # The last part tells of a rise that the whole window does not show yet.
        rewards = [start and now for now in (self.reward, self._reward_of(self.recent[-len(self.first) :]))]
        return any(now[0] - start[0] > 2 * math.hypot(start[1], now[1]) for now in rewards if start and now)

    def mean(self, name: str, *, buffers: int = SHORT) -> float | None:
        """The mean of a number over the last buffers. None where there were fewer, or one did not have it."""
        values = [row[name] for row in self.recent[-buffers:] if name in row]
        return fmean(values) if len(values) == buffers else None


Finding = tuple[float, str]
"""The number that a rule stumbled over, and what it says of it."""
Rule = Callable[[History, float], Finding | None]


def reward_drop(history: History, errors: float) -> Finding | None:
    """The running reward lies below its best, by more than the errors of both."""
    now, best = history.reward, history.best
    # Where all rewards are the same there is no error, and rounding is no fall.
    if (
        now is None
        or best is None
        or now[0] + errors * now[1] + 1e-6 * max(abs(best[0]), 1.0) >= best[0] - errors * best[1]
    ):
        return None
    return now[0], (
        f"The reward has fallen: its running mean is {now[0]:.3f} +- {now[1]:.3f}, and was {best[0]:.3f} +- "
        f"{best[1]:.3f} at its best. Most often the policy is being destroyed by too long steps. Continue from the "
        "best checkpoint with a lower learning rate, and with bounded negative signals (`negative_term: likelihood`)."
    )


def informative_groups(history: History, least: float) -> Finding | None:
    """Nearly all groups have equal rewards, so that there is nothing to learn from, and this is not success."""
    share, now = history.mean("reward/informative_groups", buffers=history.buffers), history.reward
    if share is None or now is None or share >= least or history.has_risen:
        return None
    return share, (
        f"Only {share:.1%} of the groups are informative: in all others every rollout got the same reward, "
        f"{now[0]:.3f} on average. The prompts are too hard or too easy for this model, the policy has collapsed, or "
        "the reward cannot tell completions apart. Look at completions and their rewards. Take other prompts, a larger "
        "`group_size`, a higher sampling `temperature`, or a reward that gives partial credit."
    )


def entropy(history: History, least: float) -> Finding | None:
    """The policy has become sure of itself without having become better."""
    now, first = history.mean("policy/entropy"), history.first[0].get("policy/entropy")
    if now is None or first is None or first <= 0 or now >= least * first or history.has_risen:
        return None
    return now, (
        f"The entropy has collapsed from {first:.3f} to {now:.3f} nats per token, while the reward has not risen: the "
        "policy writes the same things over and over. Lower the learning rate, or raise `reward_temperature`, so that "
        "weights stay closer to the reference."
    )


def effective_rollouts(history: History, least: float) -> Finding | None:
    """One rollout of each group has nearly all the weight."""
    ess = history.mean("weight/ess")
    if ess is None or ess * history.group >= least:
        return None
    return ess, (
        f"Of {history.group} rollouts of a group {ess * history.group:.2f} carry the weight (weight/ess {ess:.3f}): "
        "the policy is told to copy single completions. Raise `reward_temperature`. Where `policy/log_rnd_spread` "
        "is the larger part, lower `proximal_coefficient` or refresh the reference (`reference_refresh_interval`)."
    )


def log_rnd(history: History, most: float) -> Finding | None:
    """The policy has gone far from its reference."""
    mean, spread = history.mean("policy/log_rnd"), history.mean("policy/log_rnd_spread")
    farthest = max(mean or 0.0, spread or 0.0, key=abs)
    if abs(farthest) <= most * history.length:
        return None
    return farthest, (
        f"The policy has left its reference: log_rnd is {mean or 0.0:.1f} nats on average, with a spread of "
        f"{spread or 0.0:.1f} within groups, over {history.length} tokens. The weights then follow this difference and "
        "not the reward. Lower the learning rate, raise `reward_temperature`, or refresh the reference "
        "(`reference_refresh_interval`)."
    )


def _too_many(metric: str, said: str) -> Rule:
    """A rule that speaks up where the share ``metric`` of completions is above its threshold.

    ``said`` is what it says of them behind their share.
    """

    def rule(history: History, most: float) -> Finding | None:
        share = history.mean(metric)
        return None if share is None or share <= most else (share, f"{share:.0%} of {said}")

    return rule


RULES: dict[str, Rule] = {
    "reward_drop": reward_drop,
    "informative_groups": informative_groups,
    "entropy": entropy,
    "effective_rollouts": effective_rollouts,
    "repetition": _too_many(
        "completion/repetition",
        "what completions say they have said before (4-grams of tokens). The policy has degenerated, or the reward "
        "likes repetition. Look at completions with a high reward, and lower the learning rate.",
    ),
    "empty": _too_many(
        "completion/empty",
        "the completions are empty. The reward may favour saying nothing, the prompt template may not be the model's, "
        "or the policy has collapsed. Look at rewards of empty completions, and lower the learning rate.",
    ),
    "truncated": _too_many(
        "completion/truncated",
        "the completions have no end token, so that answers may be cut off. Raise `completion_length`, or let the "
        "reward ask for short answers. Where completions are meant to fill it, set `truncated: null` of "
        "dmpo_lightning.Guards.",
    ),
    "log_rnd": log_rnd,
}
"""The rules by the names of their thresholds."""


class Guards(RolloutObserver):
    """Watches the numbers of each rollout buffer of `DMPO`, and says in plain words when they show that a run is lost.

    A warning says what is seen, the likely cause and the option to change. Each guard warns once in a run, restarts
    included. What was said is in ``events``, one dictionary each, and in the record of the run. ``dmpo-lightning fit``
    adds the callback by itself. ``docs/metrics.md`` says what the numbers mean.

    All arguments up to ``log_rnd`` are thresholds, each of one guard. None switches it off.

    Args:
        reward_drop: standard errors, of the running reward and of its best, by which the two lie apart.
        informative_groups: the least share of groups whose rewards differ, while the reward has not risen.
        entropy: the least share of the first buffer's entropy, while the reward has not risen.
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
            threshold, said = self.thresholds[name], any(event["name"] == name for event in self.events)
            # All ranks find the same, from means over all of them.
            found = None if threshold is None or said else rule(self._history, threshold)
            if found is not None:
                value, message = found
                event = {"step": trainer.global_step, "buffer": buffer.number, "name": name, "value": value}
                self.events.append({**event, "message": message})
                rank_zero_warn(f"Guard {name} at step {trainer.global_step}: {message}")
                for recorder in callbacks_of(trainer, RunRecorder):
                    recorder.note(trainer, module, {"kind": "guard", **self.events[-1]})

    def state_dict(self) -> dict[str, Any]:
        """What was seen and said, as plain values. Empty before the first buffer, and where nothing is trained."""
        if self._buffer < 0:
            return {}
        return {"events": list(self.events), "history": asdict(self._history), "buffer": self._buffer}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the state was taken, with the thresholds of this run. One of an older version is left out."""
        if "buffer" not in state_dict:
            return
        self.events, self._buffer = list(state_dict["events"]), state_dict["buffer"]
        best = state_dict["history"]["best"]
        now = {"window": self._history.window, "errors": self._history.errors, "best": best and tuple(best)}
        self._history = History(**state_dict["history"] | now)
