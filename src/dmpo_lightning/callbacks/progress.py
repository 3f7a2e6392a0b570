"""What a person sees while a run goes on: one line at the bottom of a terminal, or plain lines in a log."""

import math
import sys
from time import perf_counter
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from tqdm import tqdm

from dmpo_lightning.callbacks.facts import model_line
from dmpo_lightning.callbacks.samples import samples_text
from dmpo_lightning.modules.base import PolicyModule
from dmpo_lightning.modules.dmpo import DMPO
from dmpo_lightning.modules.observers import RolloutObserver
from dmpo_lightning.rollout import RolloutBuffer, check_counts
from dmpo_lightning.terminal import BottomLine, escaped, is_terminal, number

OF_BUFFERS = {
    "reward/total": lambda value: f"reward {number(value)}",
    "weight/ess": lambda value: f"ess {value:.2f}",
    "reward/informative_groups": lambda value: f"informative {value:.0%}",
}
"""How the means of a rollout buffer are shown."""
MEASURES = ("reward/total", "train/loss", "accuracy", "weight/ess", "reward/informative_groups", "rate")
"""What is shown of a run, in the order of what matters."""
duration = tqdm.format_interval


class ProgressLine(ProgressBar, RolloutObserver):
    """Shows where a run is. The command line takes it in the place of Lightning's bars, unless one is configured.

    On a terminal it is one line of tqdm's at the bottom: optimizer steps, the time left, what is being done, with
    denoising steps while completions are sampled, mean reward, validation accuracy, effective sample size, the share of
    informative groups and rollouts per second. A narrow terminal shows the beginning of it. Elsewhere, as in the log of
    a job, a plain line is written for rollout buffers and for each validation. Now and then the best and the worst
    completion of a prompt are shown. All goes to standard error (docs/decisions/036-progress.md).

    Args:
        refresh_interval: seconds between two states of the line on a terminal, at least.
        plain_interval: seconds between two lines in a log, at least. Validations are written in any case.
        every_n_buffers: how often completions are shown, beginning with the first buffer.
    """

    def __init__(self, refresh_interval: float = 0.1, plain_interval: float = 10.0, every_n_buffers: int = 20) -> None:
        super().__init__()
        check_counts(every_n_buffers=every_n_buffers)
        self.refresh_interval, self.plain_interval = refresh_interval, plain_interval
        self.every_n_buffers = every_n_buffers
        self._is_enabled = True
        self._line: BottomLine | None = None
        self._module: PolicyModule | None = None
        self._forget()

    def _forget(self) -> None:
        self._phase = self._denoising = ""
        self._measures: dict[str, str] = {}
        self._step = self._first_step = 0
        self._steps: int | None = None
        self._started = self._validation_started = 0.0
        self._ends: float | None = None
        self._written = -math.inf

    def enable(self) -> None:
        self._is_enabled = True

    def disable(self) -> None:
        self._is_enabled = False
        self._close(keep=False)

    def announce(self, text: str) -> None:
        """Says something on lines of its own, which stay."""
        if self._is_enabled:
            print("\n".join(map(escaped, text.splitlines())), file=sys.stderr, flush=True)

    def note_phase(self, phase: str, done: int = 0, total: int | None = None) -> None:
        """What is being done from here on, and how much of it is done."""
        changes = phase != self._phase.partition(" ")[0]
        self._phase, self._denoising = phase if total is None else f"{phase} {done}/{total}", ""
        self._refresh(at_once=changes)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._forget()
        self.announce(model_line(trainer, pl_module))
        if self._is_enabled and self._line is None and is_terminal(sys.stderr):
            self._line = BottomLine(sys.stderr, self.refresh_interval)
        if self._line is not None and isinstance(pl_module, PolicyModule):
            self._module = pl_module

            # Not the method itself: copies of the module, such as those of averaged weights, copy what one is bound to.
            def note(done: int, total: int) -> None:
                self._note_denoising(done, total)

            pl_module.policy.on_denoising_step = note
        self.note_phase("starting")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first_step = self._step = trainer.global_step
        steps = trainer.estimated_stepping_batches
        self._steps = int(steps) if math.isfinite(steps) else None
        self.note_phase("training")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Not at `on_train_start`, where reports evaluate the base, which no later step takes part in.
        if not self._started:
            self._started = perf_counter()

    def on_rollouts(self, trainer: Trainer, module: LightningModule, buffer: RolloutBuffer) -> None:
        shown = {name: show(buffer.means[name]) for name, show in OF_BUFFERS.items() if name in buffer.means}
        self._measures |= shown
        self._show_training(module)
        self._write_plain()
        if self._is_enabled and buffer.number % self.every_n_buffers == 0:
            self.announce(samples_text(module, buffer))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        self._step = trainer.global_step
        if not isinstance(pl_module, DMPO) or pl_module.buffer.needs_rollouts:
            self._note_pace(trainer)
        if not isinstance(pl_module, DMPO) and self._step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._measures["train/loss"] = f"loss {number(float(trainer.callback_metrics['train/loss']))}"
            self._write_plain()
        self._show_training(pl_module)

    def _note_pace(self, trainer: Trainer) -> None:
        """How fast the run is. In the middle of a buffer a part of its steps would stand for all of its sampling."""
        now, done = perf_counter(), self._step - self._first_step
        if done and self._steps is not None:
            # With all validations so far, of which there will be as many in what is left.
            self._ends = now + (now - self._started) / done * (self._steps - self._step)
        if "rollouts/per_second" in trainer.callback_metrics:
            self._measures["rate"] = f"{float(trainer.callback_metrics['rollouts/per_second']):.3g} rollouts/s"

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_started = perf_counter()

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        counts = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._show_batch("checking" if trainer.sanity_checking else "validating", batch[1], counts)

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        self._show_batch("testing", batch[1], trainer.num_test_batches)

    def on_predict_batch_start(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        self._show_batch("predicting", batch[1], trainer.num_predict_batches)

    def _show_batch(self, phase: str, number: int, counts: Any) -> None:
        total = sum(counts) if isinstance(counts, list) else counts
        self.note_phase(phase, number, int(total) if math.isfinite(total) else None)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        self._step, accuracies = trainer.global_step, _accuracies(pl_module)
        if accuracies:
            self._measures["accuracy"] = f"accuracy {next(iter(accuracies.values()))[0]:.3f}"
            said = "accuracy " + ", ".join(
                f"{name} {mean:.3f} +- {error:.3f}" for name, (mean, error) in accuracies.items()
            )
        else:
            logged = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
            said = ", ".join(f"{name} {number(float(value))}" for name, value in logged.items())
        self.announce(f"step {self._counted()}: {said} ({duration(perf_counter() - self._validation_started)})")
        self._show_training(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seconds = duration(perf_counter() - self._started if self._started else 0.0)
        self._step, self._ends = trainer.global_step, None
        self.announce(f"{self._plain_line()}; trained for {seconds}")
        self.note_phase("finishing")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close(keep=False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close(keep=True)

    def _close(self, *, keep: bool) -> None:
        if self._line is not None:
            self._line.close(keep=keep)
        if self._module is not None:
            self._module.policy.on_denoising_step = None
        self._line = self._module = None

    def _note_denoising(self, done: int, total: int) -> None:
        if self._phase.startswith(("training", "scoring")):
            self.note_phase("sampling")
        if self._phase == "sampling" and done == total:
            # Of training. Rewards and the objective's log-probs come next, whose steps nobody counts.
            self.note_phase("scoring")
        else:
            self._denoising = f" {done}/{total}"
            self._refresh()

    def _show_training(self, module: LightningModule) -> None:
        if isinstance(module, DMPO) and len(module.buffer):
            buffer = module.buffer
            self.note_phase("training", buffer.position, buffer.num_iterations * buffer.micro_batches)
        else:
            self.note_phase("training")

    def _refresh(self, *, at_once: bool = False) -> None:
        if self._line is not None:
            parts = [*self._time_left(), self._phase + self._denoising, *self._known()]
            self._line.show(", ".join(parts), self._step, self._steps, at_once=at_once)

    def _write_plain(self) -> None:
        now = perf_counter()
        if self._line is None and now - self._written >= self.plain_interval:
            self._written = now
            self.announce(self._plain_line())

    def _plain_line(self) -> str:
        """Without a phase, which a line in a log outlives."""
        return ", ".join([f"step {self._counted()}", *self._known(), *self._time_left()])

    def _counted(self) -> str:
        return f"{self._step}" if self._steps is None else f"{self._step}/{self._steps}"

    def _known(self) -> list[str]:
        return [self._measures[name] for name in MEASURES if name in self._measures]

    def _time_left(self) -> list[str]:
        return [] if self._ends is None else [f"{duration(max(0.0, self._ends - perf_counter()))} left"]


def _accuracies(module: LightningModule) -> dict[str, tuple[float, float]]:
    """Mean and error of the last evaluation, by the names of samplers, with the length where there are several."""
    results = module.evaluator.results if isinstance(module, DMPO) else []
    several = len({each.length for each in results}) > 1
    return {
        f"{each.sampler}/{each.length}" if several else each.sampler: each.means["accuracy"]
        for each in results
        if "accuracy" in each.means
    }
