"""What a person sees while a run goes on: one line at the bottom of a terminal, or plain lines in a log."""

import math
import sys
import textwrap
from dataclasses import replace
from time import perf_counter
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from dmpo_lightning.callbacks.progress_text import Progress, duration, plain_line, status_line
from dmpo_lightning.callbacks.run_facts import first_accuracy, model_line, total_steps, validation_line
from dmpo_lightning.callbacks.status import StatusLine
from dmpo_lightning.distributed.internals import callbacks_of
from dmpo_lightning.modules.base import PolicyModule
from dmpo_lightning.modules.dmpo import DMPO
from dmpo_lightning.modules.meter import RunMeter
from dmpo_lightning.modules.observers import CollectedBuffer, RolloutObserver
from dmpo_lightning.terminal import escaped, is_terminal


class ProgressLine(ProgressBar, RolloutObserver):
    """Shows where a run is. The command line takes it in the place of Lightning's bars, unless one is configured.

    On a terminal it is one line at the bottom, as wide as the terminal: optimizer steps, what is being done, with
    denoising steps while completions are sampled, mean reward, validation accuracy, effective sample size, the share of
    informative groups, rollouts per second and the time left. Elsewhere, as in the log of a job, a plain line is
    written for rollout buffers and for each validation. Both go to standard error.

    Args:
        refresh_interval: seconds between two states of the line on a terminal, at least.
        plain_interval: seconds between two lines in a log, at least. Validations are written in any case.

    Raises:
        ValueError: a negative interval.
    """

    def __init__(self, refresh_interval: float = 0.1, plain_interval: float = 10.0) -> None:
        super().__init__()
        for name, value in (("refresh_interval", refresh_interval), ("plain_interval", plain_interval)):
            if not 0 <= value < math.inf:
                raise ValueError(f"`{name}` must be at least 0 seconds, got {value}.")
        self.refresh_interval, self.plain_interval = refresh_interval, plain_interval
        self.progress = Progress()
        self._is_enabled = True
        self._line: StatusLine | None = None
        self._module: PolicyModule | None = None
        self._meter: RunMeter | None = None
        self._drawn = self._written = -math.inf
        self._started = self._validation_started = 0.0
        self._first_step = 0
        self._ends: float | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Copies of a Trainer and other processes have no terminal of ours.
        return vars(self) | {"_line": None, "_module": None, "_meter": None}

    def enable(self) -> None:
        self._is_enabled = True

    def disable(self) -> None:
        self._is_enabled = False
        self._close(keep=False)

    def print(self, *args: Any, sep: str = " ", **options: Any) -> None:
        """As Lightning's bars do it: what is printed appears above the line."""
        print(*args, sep=sep, **options)

    def announce(self, text: str) -> None:
        """Says something on lines of its own, which stay."""
        if not self._is_enabled:
            return
        columns = None if self._line is None else self._line.columns
        for line in text.splitlines():
            shown = [escaped(line)] if columns is None else textwrap.wrap(escaped(line), columns) or [""]
            print("\n".join(shown), file=sys.stderr, flush=True)

    def note_phase(self, phase: str, done: int = 0, total: int | None = None) -> None:
        """What is being done from here on, and how much of it is done."""
        self.progress = replace(self.progress, phase=phase, done=done, total=total, denoised=0, denoising_steps=None)
        self._refresh()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.progress = Progress()
        self.announce(model_line(trainer, pl_module))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open(pl_module, "starting")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first_step, self._ends = trainer.global_step, None
        self._meter = next(iter(callbacks_of(trainer, RunMeter)), None)
        self.progress = replace(self.progress, step=trainer.global_step, steps=total_steps(trainer))
        self.note_phase("training")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Not at `on_train_start`, where reports evaluate the base, which no later step takes part in.
        if not self._started:
            self._started = perf_counter()

    def on_rollouts(self, trainer: Trainer, module: LightningModule, collected: CollectedBuffer) -> None:
        means = collected.means
        self.progress = replace(
            self.progress,
            reward=means.get("reward/total"),
            ess=means.get("weight/ess"),
            informative=means.get("reward/informative_groups"),
        )
        self._show_training(module)
        self._write_plain()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        is_boundary = step > self._first_step and (not isinstance(pl_module, DMPO) or pl_module.buffer.needs_rollouts)
        if is_boundary and self.progress.steps is not None:
            now = perf_counter()
            # With all validations so far, of which there will be as many in what is left.
            self._ends = now + (now - self._started) / (step - self._first_step) * (self.progress.steps - step)
        self.progress = replace(self.progress, step=step)
        if not isinstance(pl_module, DMPO):
            loss = trainer.callback_metrics.get("train/loss") if step % trainer.log_every_n_steps == 0 else None  # type: ignore[attr-defined]
            self.progress = replace(self.progress, loss=self.progress.loss if loss is None else float(loss))
            if loss is not None:
                self._write_plain()
        self._show_training(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open(pl_module, "validating")
        self._validation_started = perf_counter()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open(pl_module, "testing")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._open(pl_module, "predicting")

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.note_phase("checking" if trainer.sanity_checking else "validating", args[1], self._batches(trainer))

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.note_phase("testing", args[1], self._batches(trainer))

    def on_predict_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.note_phase("predicting", args[1], self._batches(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        self.progress = replace(self.progress, accuracy=first_accuracy(pl_module), step=trainer.global_step)
        taken = duration(perf_counter() - self._validation_started)
        steps = "" if self.progress.steps is None else f"/{self.progress.steps}"
        self.announce(f"step {trainer.global_step}{steps}: {validation_line(trainer, pl_module)} ({taken})")
        self._show_training(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seconds = duration(perf_counter() - self._started if self._started else 0.0)
        self._started, self._ends = 0.0, None
        self.progress = replace(self._timed(), step=trainer.global_step, seconds_left=None)
        if self._line is None:
            self.announce(f"{plain_line(self.progress)}; trained for {seconds}")
        else:
            self.note_phase(f"trained for {seconds}")
            self.announce(status_line(self.progress, self._line.columns))
        self.note_phase("finishing")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close(keep=False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._started = 0.0
        self._close(keep=True)

    def _open(self, module: LightningModule, phase: str) -> None:
        if self._is_enabled and self._line is None and is_terminal(sys.stderr):
            self._line = StatusLine(sys.stderr)
            self._line.open()
        if self._line is not None and isinstance(module, PolicyModule):
            self._module = module

            # Not the method itself: copies of the module, such as those of averaged weights, copy what one is bound to.
            def note(done: int, total: int) -> None:
                self._note_denoising(done, total)

            module.policy.on_denoising_step = note
        self.note_phase(phase)

    def _close(self, *, keep: bool) -> None:
        if self._line is not None:
            self._line.close(keep=keep)
        if self._module is not None:
            self._module.policy.on_denoising_step = None
        self._line = self._module = None

    def _note_denoising(self, done: int, total: int) -> None:
        progress = self.progress
        if progress.phase == "training":
            progress = replace(progress, phase="sampling", done=0, total=None)
        if done == total and progress.phase == "sampling":
            # Of training. Rewards and the objective's log-probs come next, whose steps nobody counts.
            progress = replace(progress, phase="scoring", denoised=0, denoising_steps=None)
        else:
            progress = replace(progress, denoised=done, denoising_steps=total)
        changes = progress.phase != self.progress.phase
        self.progress = progress
        self._refresh(at_once=changes)

    def _show_training(self, module: LightningModule) -> None:
        if isinstance(module, DMPO) and len(module.buffer):
            buffer = module.buffer
            self.note_phase("training", buffer.position, buffer.num_iterations * buffer.micro_batches)
        else:
            self.note_phase("training")

    def _batches(self, trainer: Trainer) -> int | None:
        loops: Any = {
            TrainerFn.TESTING: trainer.num_test_batches,
            TrainerFn.PREDICTING: trainer.num_predict_batches,
        }
        counts = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        total = sum(loops.get(trainer.state.fn, counts))
        return int(total) if math.isfinite(total) else None

    def _refresh(self, *, at_once: bool = False) -> None:
        """Draws the line anew, unless that was done a moment ago."""
        now = perf_counter()
        if self._line is None or (now - self._drawn < self.refresh_interval and not at_once):
            return
        self._drawn = now
        self._line.draw(status_line(self._timed(), self._line.columns))

    def _write_plain(self) -> None:
        now = perf_counter()
        if self._line is None and now - self._written >= self.plain_interval:
            self._written = now
            self.announce(plain_line(self._timed()))

    def _timed(self) -> Progress:
        """With what changes by itself."""
        rate = None if self._meter is None else self._meter.rollouts_per_second
        left = None if self._ends is None else max(0.0, self._ends - perf_counter())
        return replace(self.progress, rate=rate, seconds_left=left)


def announce(trainer: Trainer, text: str) -> None:
    """Says something on rank 0, above the line if there is one."""
    if isinstance(bar := trainer.progress_bar_callback, ProgressLine):
        bar.announce(text)
    else:
        rank_zero_info(text)


def note_phase(trainer: Trainer, phase: str, done: int = 0, total: int | None = None) -> None:
    """Shows in the line what a callback is doing, and how much of it is done."""
    if isinstance(bar := trainer.progress_bar_callback, ProgressLine):
        bar.note_phase(phase, done, total)
