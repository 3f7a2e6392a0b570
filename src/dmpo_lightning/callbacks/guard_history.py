"""What guards remember of a run: the numbers of its first and last rollout buffers, and what they have said."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

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


@dataclass
class Alarm:
    """Whether a guard speaks up: once, and again only after it has recovered and some time has passed."""

    patience: int
    spoke_at: int | None = None
    is_on: bool = False

    def says(self, found: bool, *, at: int) -> bool:
        """Whether to speak now. ``at`` counts buffers."""
        if not found:
            self.is_on = False
            return False
        if self.is_on or (self.spoke_at is not None and at - self.spoke_at < self.patience):
            return False
        self.is_on, self.spoke_at = True, at
        return True
