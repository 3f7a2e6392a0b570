"""When a run goes wrong: what is remembered of its rollout buffers, rules over their numbers, and what they say.

Nothing here knows a Trainer. ``docs/metrics.md`` explains the numbers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

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
    count: int = 0
    """Buffers seen."""
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
        self.count += 1
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
        "best checkpoint with a lower learning rate, or with a `baseline` and negative signals that are bounded."
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


def distinct(history: History, least: float) -> Finding | None:
    """The completions of a prompt are nearly all the same, and no better than at the start."""
    share = history.mean("completion/distinct")
    if share is None or history.group < 2:
        return None
    # One text is always distinct. 0 is a group of equal texts, 1 a group in which all differ.
    others = (share * history.group - 1) / (history.group - 1)
    if others >= least or history.has_risen:
        return None
    said = "All completions" if others <= 0 else "Nearly all completions"
    return share, (
        f"{said} of a prompt are the same text: {share * history.group:.2f} of {history.group} are distinct on "
        "average, while the reward has not risen. Raise the `temperature` of the rollouts' `sampler` (a greedy one "
        "belongs into `validation_samplers`), or go back to a checkpoint with more variety and lower the learning rate."
    )


def effective_rollouts(history: History, least: float) -> Finding | None:
    """One rollout of each group has nearly all the weight."""
    ess = history.mean("weight/ess")
    if ess is None or ess * history.group >= least:
        return None
    return ess, (
        f"Of {history.group} rollouts of a group {ess * history.group:.2f} carry the weight (weight/ess {ess:.3f}): "
        "the policy is told to copy single completions. Raise `reward_temperature`, set `target_ess`, lower "
        "`proximal_coefficient`, or refresh the reference (`reference_refresh_interval`)."
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
    "distinct": distinct,
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
