"""Warns before a run is lost: rules over the numbers of its rollout buffers, and what they say.

``docs/metrics.md`` explains the numbers.
"""

import math
import re
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
from dmpo_lightning.reports.plots import metrics_text
from dmpo_lightning.rollout import RolloutBuffer

Buffer = Mapping[str, float]
"""The numbers of a buffer that are logged, and ``reward`` and ``reward_square``, means over prompts."""
SHORT = 3
"""Buffers whose mean is judged where a buffer has so many tokens or groups that chance plays no part."""
PROMPTS = 100
"""Prompts behind a statement on the reward or on groups. With fewer, chance alone makes and breaks records."""
ERRORS = 4.0
"""Standard errors by which the best reward is discounted, so that a lucky buffer is no record."""


@dataclass
class History:
    """What is remembered of a run's buffers: the first ones, the last ones, and the best reward in between."""

    window: int
    """Buffers over which reward and groups are averaged, if they hold `PROMPTS` prompts."""
    prompts: int = 0
    """Prompts of one buffer, over all ranks."""
    group: int = 0
    length: int = 0
    """Tokens of a completion."""
    first: list[Buffer] = field(default_factory=list)
    recent: list[Buffer] = field(default_factory=list)
    best: Sequence[float] | None = None
    """Mean and error of the running reward that was best, discounted."""

    def add(self, means: Buffer, *, prompts: int, group: int, length: int) -> None:
        """Takes in the next buffer."""
        self.prompts, self.group, self.length = prompts, group, length
        row = {name: value for name, value in means.items() if math.isfinite(value)}
        if len(self.first) * prompts < PROMPTS:
            self.first.append(row)
        self.recent = [*self.recent, row][-max(self.buffers, SHORT) :]
        found = [each for each in (self.best, self.reward) if each is not None]
        self.best = max(found, key=lambda each: each[0] - ERRORS * each[1], default=None)

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

    def mean(self, name: str, buffers: int = SHORT, scale: float = 1.0) -> float | None:
        """The mean of a number over the last buffers. None where there were fewer, or one did not have it."""
        values = [row[name] for row in self.recent[-buffers:] if name in row]
        return scale * fmean(values) if len(values) == buffers else None


def _fall(history: History) -> float | None:
    """How far the running reward lies below its best, in standard errors of both."""
    if history.reward is None or history.best is None:
        return None
    (now, error), (best, best_error) = history.reward, history.best
    # Where all rewards are the same there is no error, and rounding is no fall.
    return (best - now - 1e-6 * max(abs(best), 1.0)) / max(error + best_error, 1e-9)


def _informative(history: History) -> float | None:
    share = history.mean("reward/informative_groups", history.buffers)
    return None if history.reward is None or history.has_risen else share


def _of_first(history: History, name: str) -> float | None:
    """A number as a share of what it was in the first buffer."""
    now, first = history.mean(name), history.first[0].get(name)
    return None if now is None or not first else now / first


def _entropy(history: History) -> float | None:
    return None if history.reward is None or history.has_risen else _of_first(history, "policy/entropy")


def _per_token(history: History) -> float:
    """The mean of log_rnd or its spread, whichever is larger."""
    values = (history.mean(name) or 0.0 for name in ("policy/log_rnd", "policy/log_rnd_spread"))
    return max(map(abs, values)) / history.length


NUMBERS: dict[str, Callable[[History], float | None]] = {
    "reward_drop": _fall,
    "informative_groups": _informative,
    "entropy": _entropy,
    "effective_rollouts": lambda history: history.mean("weight/ess", scale=history.group),
    "repetition": lambda history: history.mean("completion/repetition"),
    "empty": lambda history: history.mean("completion/empty"),
    "truncated": lambda history: history.mean("completion/truncated"),
    "log_rnd": _per_token,
    "routing": lambda history: _of_first(history, "routing/lowest_entropy"),
}
"""What each guard judges. None where it is not known, or says nothing."""
TOO_LOW = ("informative_groups", "entropy", "effective_rollouts", "routing")
"""The guards that warn below their thresholds. The others do above."""
SAID = re.compile(r"^\| `(\w+): [\d.]+` \|.*\| (.*) \|$", re.MULTILINE)
"""What each guard says of its number, the ``value``, in the table of docs/metrics.md."""


def finding(history: History, name: str, threshold: float) -> tuple[float, str] | None:
    """The number that a guard stumbles over, and what it says of it. None where all is well."""
    value = NUMBERS[name](history)
    if value is None or (value >= threshold if name in TOO_LOW else value <= threshold):
        return None
    return value, dict(SAID.findall(metrics_text())).get(name, "{value}").format(value=value, history=history)


class Guards(RolloutObserver):
    """Watches the numbers of each rollout buffer of `DMPO`, and says in plain words when they show that a run is lost.

    A warning says what is seen, the likely cause and the option to change. Each guard warns once in a run, restarts
    included. What was said is in ``events``, one dictionary each, and in the record of the run. ``dmpo-lightning fit``
    adds the callback by itself. All arguments but ``window`` are thresholds, each of one guard. None switches it off.

    Args:
        reward_drop: standard errors, of the running reward and of its best, by which the two lie apart.
        informative_groups: the least share of groups whose rewards differ, while the reward has not risen.
        entropy: the least share of the first buffer's entropy, while the reward has not risen.
        effective_rollouts: the least number of rollouts of a group that carry its weight.
        repetition: the largest share of repeated 4-grams.
        empty: the largest share of empty completions.
        truncated: the largest share of completions without an end token.
        log_rnd: the largest mean and spread of log_rnd, in nats per token.
        routing: the least share of the first buffer's entropy of routing, in the layer where it is lowest. Mixtures of
            experts alone have it.
        window: buffers over which reward and informative groups are averaged. They are more where these hold fewer than
            100 prompts. The other numbers are averaged over three.

    Raises:
        ValueError: a value is outside its range.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from dmpo_lightning import Guards
        >>> trainer = Trainer(callbacks=[Guards(entropy=0.05, repetition=None)])
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
        routing: float | None = 0.75,
        window: int = 10,
    ) -> None:
        given = locals()
        self.thresholds: dict[str, float | None] = {name: given[name] for name in NUMBERS}
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
        self._history = History(self.window)
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
        # All ranks find the same, from means over all of them.
        for name, threshold in self.thresholds.items():
            is_said = any(event["name"] == name for event in self.events)
            found = None if threshold is None or is_said else finding(self._history, name, threshold)
            if found is not None:
                event = {"step": trainer.global_step, "buffer": buffer.number, "name": name, "value": found[0]}
                self.events.append({**event, "message": found[1]})
                rank_zero_warn(f"Guard {name} at step {trainer.global_step}: {found[1]}")
                for recorder in callbacks_of(trainer, RunRecorder):
                    recorder.note(trainer, module, {"kind": "guard", **self.events[-1]})

    def state_dict(self) -> dict[str, Any]:
        """What was seen and said, as plain values. Empty before the first buffer, and where nothing is trained."""
        if self._buffer < 0:
            return {}
        return {"events": list(self.events), "history": asdict(self._history), "buffer": self._buffer}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the state was taken, with the thresholds of this run."""
        if "buffer" not in state_dict:
            return
        self.events, self._buffer = list(state_dict["events"]), state_dict["buffer"]
        self._history = History(**state_dict["history"] | {"window": self.window})
