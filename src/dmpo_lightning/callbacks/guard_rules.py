"""When a run goes wrong: what is remembered of its rollout buffers, rules over their numbers, and what they say.

Nothing here knows a Trainer. ``docs/metrics.md`` explains the numbers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

NORMS = 100
"""Optimizer steps whose gradient norms are remembered."""
FEWEST_NORMS = 20
"""A median of fewer norms is not trusted."""
SHORT = 3
"""Buffers whose mean is judged where a buffer has so many tokens or groups that chance plays no part."""
PROMPTS = 100
"""Prompts behind a statement on the reward or on groups. With fewer, chance alone makes and breaks records."""
JUDGED = (
    "reward",
    "reward_square",
    "reward_highest",
    "reward/informative_groups",
    "weight/ess",
    "policy/entropy",
    "policy/log_rnd",
    "policy/log_rnd_spread",
    "completion/distinct",
    "completion/empty",
    "completion/repetition",
    "completion/truncated",
)
"""The numbers of a buffer that rules read. ``reward`` is the mean over prompts, ``reward_square`` of its square, and
``reward_highest`` is that of the best rollout, mean over ranks."""
MOSTLY = 0.8
"""Share of the way from the first reward to the highest beyond which a task counts as solved."""


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts, with its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, float]], *, prompts: int) -> "Estimate | None":
        """Of the reward in some buffers of ``prompts`` prompts each. None where that is too few to judge."""
        rows = [row for row in rows if "reward" in row and "reward_square" in row]
        count = len(rows) * prompts
        if count < PROMPTS:
            return None
        mean = fmean(row["reward"] for row in rows)
        variance = max(fmean(row["reward_square"] for row in rows) - mean**2, 0.0)
        return cls(mean, math.sqrt(variance / (count - 1)))

    def low(self, errors: float) -> float:
        """The mean less so many of its errors."""
        return self.mean - errors * self.error

    def high(self, errors: float) -> float:
        """The mean and so many of its errors."""
        return self.mean + errors * self.error


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
    """Of one buffer, over all ranks."""
    group: int = 0
    length: int = 0
    """Tokens of a completion."""
    count: int = 0
    """Buffers seen."""
    first: list[dict[str, float]] = field(default_factory=list)
    recent: list[dict[str, float]] = field(default_factory=list)
    best: tuple[float, float] | None = None
    """Mean and error of the running reward that was best, discounted."""

    def add(self, means: Mapping[str, float], *, prompts: int, group: int, length: int) -> None:
        """Takes in the next buffer."""
        if (self.prompts, self.group, self.length) != (prompts, group, length):
            # Another number of ranks, or other options after a resume: old and new buffers cannot be averaged.
            self.prompts, self.group, self.length, self.recent = prompts, group, length, []
        row = {name: means[name] for name in JUDGED if math.isfinite(means.get(name, math.nan))}
        self.count += 1
        if len(self.first) * prompts < PROMPTS:
            self.first.append(row)
        self.recent = [*self.recent, row][-max(self.buffers, SHORT) :]
        now = self.reward
        if now is not None and (self.best is None or now.low(self.errors) > Estimate(*self.best).low(self.errors)):
            self.best = (now.mean, now.error)

    @property
    def buffers(self) -> int:
        """How many buffers the long window has."""
        return max(self.window, math.ceil(PROMPTS / self.prompts))

    @property
    def reward(self) -> Estimate | None:
        """The running mean of the reward."""
        return Estimate.of(self.recent[-self.buffers :], prompts=self.prompts)

    @property
    def has_risen(self) -> bool:
        """Whether the reward is better than at the start, by more than chance: of the window, or of its last part."""
        start = Estimate.of(self.first, prompts=self.prompts)
        # The last part tells of a rise that the whole window does not show yet.
        last = Estimate.of(self.recent[-len(self.first) :], prompts=self.prompts)
        return start is not None and any(
            now is not None and now.mean - start.mean > 2 * math.hypot(start.error, now.error)
            for now in (self.reward, last)
        )

    @property
    def is_solved(self) -> bool:
        """Whether the reward has risen most of the way to the best that any rollout of the window got."""
        start, now = Estimate.of(self.first, prompts=self.prompts), self.reward
        highest = max((row.get("reward_highest", math.inf) for row in self.recent), default=math.inf)
        return (
            start is not None
            and now is not None
            and self.has_risen
            and now.mean - start.mean >= MOSTLY * (highest - start.mean)
        )

    def mean(self, name: str, *, buffers: int = SHORT) -> float | None:
        """The mean of a number over the last buffers. None where there were fewer, or one did not have it."""
        values = [row[name] for row in self.recent[-buffers:] if name in row]
        return fmean(values) if len(values) == buffers else None


Finding = tuple[float, str]
"""The number that a rule stumbled over, and what it says of it."""
Rule = Callable[[History, float], Finding | None]


def reward_drop(history: History, errors: float) -> Finding | None:
    """The running reward lies below its best, by more than the errors of both."""
    now = history.reward
    if now is None or history.best is None:
        return None
    mean, error = history.best
    # Where all rewards are the same there is no error, and rounding is no fall.
    if now.high(errors) + 1e-6 * max(abs(mean), 1.0) >= Estimate(mean, error).low(errors):
        return None
    return now.mean, (
        f"The reward has fallen: its running mean is {now.mean:.3f} +- {now.error:.3f}, and was {mean:.3f} +- "
        f"{error:.3f} at its best. Most often the policy is being destroyed by too long steps. Continue from the best "
        "checkpoint with a lower learning rate, or with a `baseline` and negative signals that are bounded."
    )


def informative_groups(history: History, least: float) -> Finding | None:
    """Nearly all groups have equal rewards, so that there is nothing to learn from, and this is not success."""
    share, now = history.mean("reward/informative_groups", buffers=history.buffers), history.reward
    if share is None or now is None or share >= least or history.is_solved:
        return None
    seen = (
        f"Only {share:.1%} of the groups are informative: in all others every rollout got the same reward, "
        f"{now.mean:.3f} on average. "
    )
    if history.has_risen:
        return share, (
            seen
            + "The reward has risen and goes no further: the policy gives one answer to each prompt, right or wrong. "
            "Take a larger `group_size`, a higher sampling `temperature`, or a lower learning rate from the start."
        )
    return share, (
        seen + "The prompts are too hard or too easy for this model, the policy has collapsed, or the reward cannot "
        "tell completions apart. Look at completions and their rewards. Take other prompts, a larger `group_size`, a "
        "higher sampling `temperature`, or a reward that gives partial credit."
    )


def entropy(history: History, least: float) -> Finding | None:
    """The policy has become sure of itself without having become better."""
    now, first = history.mean("policy/entropy"), history.first[0].get("policy/entropy")
    if now is None or first is None or first <= 0 or now >= least * first or history.has_risen:
        return None
    return now, (
        f"The entropy has collapsed from {first:.3f} to {now:.3f} nats per token, while the reward has not risen. The "
        "policy writes the same things over and over, and finds no better ones. Lower the learning rate, or raise "
        "`reward_temperature`, so that weights stay closer to the reference."
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
        "average, while the reward has not risen. Equal completions have equal rewards, and give no signal. Raise the "
        "`temperature` of the rollouts' `sampler`, or go back to a checkpoint with more variety and lower the learning "
        "rate."
    )


def effective_rollouts(history: History, least: float) -> Finding | None:
    """One rollout of each group has nearly all the weight."""
    ess = history.mean("weight/ess")
    if ess is None or ess * history.group >= least:
        return None
    return ess, (
        f"Of {history.group} rollouts of a group {ess * history.group:.2f} carry the weight (weight/ess {ess:.3f}): "
        "the policy is told to copy single completions. Either rewards differ by much more than `reward_temperature`, "
        "or log_rnd varies more than they do. Raise `reward_temperature`, set `target_ess`, lower "
        "`proximal_coefficient`, or refresh the reference (`reference_refresh_interval`)."
    )


def too_many(metric: str, said: str) -> Rule:
    """A rule that speaks up where the share ``metric`` of completions is above its threshold.

    ``said`` is what it says of them behind their share, with ``{length}`` for the tokens of a completion.
    """

    def rule(history: History, most: float) -> Finding | None:
        share = history.mean(metric)
        if share is None or share <= most:
            return None
        return share, f"{share:.0%} of {said.format(length=history.length)}"

    return rule


def log_rnd(history: History, most: float) -> Finding | None:
    """The policy has gone far from its reference."""
    found = [history.mean(name) for name in ("policy/log_rnd", "policy/log_rnd_spread")]
    values = [value for value in found if value is not None]
    farthest = max(values, key=abs, default=0.0)
    if abs(farthest) <= most * history.length:
        return None
    return farthest, (
        f"The policy has left its reference: log_rnd is {values[0]:.1f} nats on average, with a spread of "
        f"{values[-1]:.1f} within groups, over {history.length} tokens. The weights then follow this difference and "
        "not the reward, and errors of its estimate grow with it. Lower the learning rate, raise `reward_temperature`, "
        "or refresh the reference (`reference_refresh_interval`)."
    )


RULES: dict[str, Rule] = {
    "reward_drop": reward_drop,
    "informative_groups": informative_groups,
    "entropy": entropy,
    "distinct": distinct,
    "effective_rollouts": effective_rollouts,
    "repetition": too_many(
        "completion/repetition",
        "what completions say they have said before (4-grams of tokens). The policy has degenerated, or the reward "
        "likes repetition. Look at completions with a high reward, lower the learning rate, or let the reward reject "
        "repetition.",
    ),
    "empty": too_many(
        "completion/empty",
        "the completions are empty. The reward may favour saying nothing, the prompt template may not be the model's, "
        "or the policy has collapsed. Look at rewards of empty completions, at `prompt_template`, and lower the "
        "learning rate.",
    ),
    "truncated": too_many(
        "completion/truncated",
        "the completions fill all {length} tokens without an end token, so that answers may be cut off. Raise "
        "`completion_length`, or let the reward ask for short answers. Where completions are meant to fill it, set "
        "`truncated: null` of dmpo_lightning.Guards.",
    ),
    "log_rnd": log_rnd,
}
"""The rules that look at buffers, by the names of their thresholds."""
COLLAPSES = ("reward_drop", "informative_groups", "entropy", "distinct", "repetition", "empty", "log_rnd")
"""Those after which there is nothing to be gained by going on."""


def gradient_spike(norms: Sequence[float], most: float) -> Finding | None:
    """The last gradient is many times as long as usual. Gradients of zero, of steps without signal, are not counted."""
    usual = [norm for norm in norms[:-1] if norm > 0]
    if len(usual) < FEWEST_NORMS or norms[-1] <= most * median(usual):
        return None
    return norms[-1], (
        f"A gradient is {norms[-1] / median(usual):.0f} times as long as usual: its norm is {norms[-1]:.3g}, and "
        f"{median(usual):.3g} in the median of the last {len(usual)} steps. A few rollouts may have extreme weights, "
        "or steps are too long. Set `gradient_clip_val`, lower the learning rate, or look at weight/max."
    )


def greedy_rollouts(temperature: float, most: float) -> Finding | None:
    """The rollouts of a prompt are all alike by construction."""
    if temperature > most:
        return None
    return temperature, (
        f"The rollouts are sampled at temperature {temperature:g}, where all completions of a prompt are the same or "
        "nearly so: equal rewards give no signal, and nothing will be learnt. Set the `temperature` of `sampler`, "
        "commonly to 0.2 to 1. A greedy sampler belongs into `validation_samplers`."
    )
