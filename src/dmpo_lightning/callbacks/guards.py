"""Warns before a run is lost, and can end it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from dmpo_lightning.callbacks.guard_history import Alarm, History
from dmpo_lightning.callbacks.guard_rules import (
    COLLAPSES,
    NORMS,
    RULES,
    Finding,
    gradient_spike,
    greedy_rollouts,
)
from dmpo_lightning.distributed.internals import callbacks_of
from dmpo_lightning.distributed.ranks import means_over_ranks
from dmpo_lightning.modules.dmpo import DMPO
from dmpo_lightning.modules.non_finite import norm_of_step
from dmpo_lightning.modules.observers import RolloutObserver
from dmpo_lightning.modules.run_directory import run_directory
from dmpo_lightning.reports.lines import replace
from dmpo_lightning.rollout import RolloutBuffer
from dmpo_lightning.terminal import escaped

FILE_NAME = "guards.jsonl"


class Guards(RolloutObserver):
    """Watches the numbers of each rollout buffer of `DMPO`, and says in plain words when they show that a run is lost.

    A warning says what is seen, the likely cause and the option to change. Each guard warns once, and again only after
    it has recovered and ``patience`` buffers have passed. What was said is in ``events``, one dictionary each, and in
    ``guards.jsonl`` of the run directory. Both continue after a restart. ``dmpo-lightning fit`` adds the callback by
    itself. ``docs/metrics.md`` says what the numbers mean.

    All arguments up to ``temperature`` are thresholds, each of one guard. None switches it off.

    Args:
        reward_drop: standard errors, of the running reward and of its best, by which the two lie apart.
        informative_groups: the least share of groups whose rewards differ.
        entropy: the least share of the first buffer's entropy, while the reward has not risen.
        distinct: the least variety of a group's completions, while the reward has not risen. 0 is all the same, 1 all
            different.
        effective_rollouts: the least number of rollouts of a group that carry its weight.
        repetition: the largest share of repeated 4-grams.
        empty: the largest share of empty completions.
        truncated: the largest share of completions without an end token.
        gradient_spike: how many times a gradient may be as long as the median of the steps before it.
        log_rnd: the largest mean and spread of log_rnd, in nats per token.
        temperature: warns at the start of rollouts that are sampled at this temperature or below.
        window: buffers over which reward and informative groups are averaged. They are more where these hold fewer than
            100 prompts. The other numbers are averaged over three.
        patience: the least number of buffers between two warnings of one guard.
        stop: ends training after a warning that there is nothing to be gained by going on (`COLLAPSES`). The best state
            is that of a `ModelCheckpoint` with a ``monitor``, which there must be.

    Raises:
        ValueError: a value is outside its range; at fit start, ``stop`` without a `ModelCheckpoint` that monitors.
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
        gradient_spike: float | None = 20.0,
        log_rnd: float | None = 0.5,
        temperature: float | None = 0.0,
        window: int = 10,
        patience: int = 20,
        stop: bool = False,
    ) -> None:
        self.thresholds: dict[str, float | None] = {
            "reward_drop": reward_drop,
            "informative_groups": informative_groups,
            "entropy": entropy,
            "distinct": distinct,
            "effective_rollouts": effective_rollouts,
            "repetition": repetition,
            "empty": empty,
            "truncated": truncated,
            "gradient_spike": gradient_spike,
            "log_rnd": log_rnd,
            "temperature": temperature,
        }
        for name, value in self.thresholds.items():
            # Written so that NaN, which compares as false with everything, fails.
            if value is not None and not value >= 0:
                raise ValueError(f"`{name}` must be at least 0, or null to switch the guard off, got {value}.")
        for name, count in (("window", window), ("patience", patience)):
            if count < 1:
                raise ValueError(f"`{name}` must be at least 1 buffer, got {count}.")
        self.window, self.patience, self.stop = window, patience, stop
        self.events: list[dict[str, Any]] = []
        """What was said: ``step``, ``buffer``, ``name``, ``value`` and ``message``."""
        self._file: Path | None = None
        self._begin()

    def _begin(self) -> None:
        """Nothing has been seen yet."""
        self.events = []
        self._history = History(self.window, errors=self.thresholds["reward_drop"] or 0.0)
        self._alarms = {name: Alarm(self.patience) for name in self.thresholds}
        self._norms: list[float] = []
        # The last buffer and optimizer step that were counted.
        self._iteration, self._step = -1, 0
        self._stopped_by: str | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """A run that continues gets the state of its checkpoint after this hook."""
        if stage != "fit":
            return
        self._begin()
        if self.stop and _monitoring(trainer) is None:
            raise ValueError(
                "`stop` of Guards keeps the best state, which a ModelCheckpoint has to save; add one that monitors a "
                "validation accuracy, such as ModelCheckpoint(monitor='val/sampled/accuracy', mode='max')."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rollouts that cannot differ are told before the first is sampled."""
        if not isinstance(pl_module, DMPO):
            return
        # On all ranks, because it is a broadcast.
        directory = run_directory(trainer)
        self._file = None if trainer.fast_dev_run else directory / FILE_NAME  # type: ignore[attr-defined]
        most = self.thresholds["temperature"]
        if most is not None:
            found = greedy_rollouts(pl_module.sampler.temperature, most)
            self._say(trainer, "temperature", found)

    def on_rollouts(self, trainer: Trainer, module: LightningModule, buffer: RolloutBuffer) -> None:
        # A checkpoint taken within a step has its buffer collected again, which has been counted by then.
        if buffer.number <= self._iteration:
            return
        self._iteration = buffer.number
        prompts, group = buffer.rollouts.group_shape
        # Of all that were sampled, as the other means: those of a buffer that chooses among prompts say less.
        rewards = buffer.sampled_reward.double()
        means = rewards.mean(-1)
        of_reward = {"reward": means, "reward_square": means.square(), "reward_highest": rewards.amax()}
        self._history.add(
            {**buffer.means, **means_over_ranks(of_reward)},
            prompts=prompts * trainer.world_size,
            group=group,
            length=buffer.rollouts.completion_ids.shape[-1],
        )
        for name, rule in RULES.items():
            threshold = self.thresholds[name]
            if threshold is not None:
                self._say(trainer, name, rule(self._history, threshold))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        most, taken = self.thresholds["gradient_spike"], trainer.global_step > self._step
        if most is None or not taken:
            return
        self._step = trainer.global_step
        norm = norm_of_step(trainer)
        if norm is not None:
            self._norms = [*self._norms, norm][-NORMS:]
            self._say(trainer, "gradient_spike", gradient_spike(self._norms, most))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        saved = _monitoring(trainer)
        if self._stopped_by is not None and saved is not None:
            best = escaped(f"{saved.best_model_path or 'none yet'}, of {saved.monitor}")
            rank_zero_info(
                f"The run was ended by guard {self._stopped_by} after {trainer.global_step} optimizer steps. Its best "
                f"checkpoint: {best}."
            )

    def _say(self, trainer: Trainer, name: str, found: Finding | None) -> None:
        """Warns of a finding, unless it was said before. All ranks find the same, from means over all of them."""
        if not self._alarms[name].says(found is not None, at=self._history.count) or found is None:
            return
        value, message = found
        event = {"step": trainer.global_step, "buffer": self._iteration, "name": name, "value": value}
        self.events.append({**event, "message": message})
        rank_zero_warn(f"Guard {name}, at optimizer step {trainer.global_step}: {message}")
        if trainer.is_global_zero and self._file is not None:
            self._write(self._file)
        if self.stop and name in COLLAPSES:
            self._stopped_by = name
            trainer.should_stop = True

    def _write(self, file: Path) -> None:
        """Writes all events, so that those which a lost part of the run had left behind are gone after a restart."""
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            replace(file, "".join(json.dumps(event) + "\n" for event in self.events).encode())
        except OSError as error:
            # Training is worth more than its notes. The events stay in checkpoints.
            rank_zero_warn(f"{FILE_NAME} could not be written ({error}): what guards say is on the screen only.")

    def state_dict(self) -> dict[str, Any]:
        """What was seen and said, as plain values. Empty before the first buffer, and where nothing is trained."""
        if self._iteration < 0 and not self.events:
            return {}
        return {
            "events": list(self.events),
            "history": asdict(self._history),
            "alarms": {name: asdict(alarm) for name, alarm in self._alarms.items()},
            "norms": list(self._norms),
            "iteration": self._iteration,
            "step": self._step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where the state was taken, with the thresholds of this run."""
        self.events = list(state_dict["events"])
        best = state_dict["history"]["best"]
        now = {"window": self._history.window, "errors": self._history.errors, "best": best and tuple(best)}
        self._history = History(**state_dict["history"] | now)
        for name, alarm in state_dict["alarms"].items():
            if name in self._alarms:
                self._alarms[name] = Alarm(**alarm | {"patience": self.patience})
        self._norms = list(state_dict["norms"])
        self._iteration, self._step = state_dict["iteration"], state_dict["step"]


def _monitoring(trainer: Trainer) -> ModelCheckpoint | None:
    """The checkpoints that keep a best state."""
    return next((each for each in callbacks_of(trainer, ModelCheckpoint) if each.monitor is not None), None)
