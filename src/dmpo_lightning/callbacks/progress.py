"""What a person sees while a run goes on: one line at the bottom of a terminal, or plain lines in a log."""

import math
import sys
from time import perf_counter
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from tqdm import tqdm

from dmpo_lightning.callbacks.clock import Clock, validations_to_come
from dmpo_lightning.callbacks.facts import model_line
from dmpo_lightning.callbacks.samples import samples_text
from dmpo_lightning.data.prompts import PromptLoader
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
EXPECTED = {
    "reward/total": "reward -.---",
    "accuracy": "accuracy -.---",
    "weight/ess": "ess -.--",
    "reward/informative_groups": "informative ---%",
    "rate": "---- rollouts/s",
}
"""What stands in the place of each until it is known, so that a line has one form in a whole run."""
ROOM = 20
"""Columns for what is being done, at least."""
duration = tqdm.format_interval


class ProgressLine(ProgressBar, RolloutObserver):
    """Shows where a run is. The command line takes it in the place of Lightning's bars, unless one is configured.

    On a terminal it is one line of tqdm's at the bottom: optimizer steps, the time left of the whole run with all its
    evaluations, what is being done, with denoising steps while completions are sampled, mean reward, validation
    accuracy, effective sample size, the share of informative groups and rollouts per second. A narrow terminal shows as
    many of these as it has room for. While an evaluation stands alone, as that of the base before a run, its batches
    and the time left of it are in the place of steps. Elsewhere, as in the log of a job, a plain line is written now
    and then and for each validation. Now and then the best and the worst completion of a prompt are shown. All goes to
    standard error (docs/decisions/036-progress.md).

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
        self._phase = self._part = self._denoising = ""
        self._measures: dict[str, str] = {}
        self._expected: dict[str, str] = {}
        """Those of `EXPECTED` that this run will have."""
        self._room = ROOM
        """Columns that what is being done will need."""
        self._step = 0
        self._steps: int | None = None
        self._evaluated: tuple[int, int | None] | None = None
        """Batches of an evaluation that stands alone, done and all."""
        self._started = self._evaluation_started = 0.0
        self._clock: Clock | None = None
        self._noted = (0, 0.0)
        """The step and the time up to which the clock knows the training, without validations since then."""
        self._validating: float | None = None
        """When the present validation began."""
        self._ends: float | None = None
        """When an evaluation that stands alone will be done."""
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
        changes = phase != self._phase
        self._evaluated, self._phase, self._denoising = None, phase, ""
        self._part = "" if total is None else f" {done}/{total}"
        self._refresh(at_once=changes)

    def note_evaluation(self, phase: str, done: int, total: int | None) -> None:
        """How much is done of an evaluation that stands alone."""
        now, changes = perf_counter(), phase != self._phase or not done
        if changes:
            self._evaluation_started = now
        # That behind the last step is known to the clock.
        left = None if self._clock is None else self._clock.left(self._clock.steps)
        if done and total is not None:
            left = (now - self._evaluation_started) / done * (total - done)
        self._evaluated, self._phase, self._part, self._denoising = (done, total), phase, "", ""
        self._ends = None if left is None else now + left
        self._refresh(at_once=changes)
        if done:
            self._write_plain()

    def expect_ending(self, completions: float, steps: int) -> None:
        """That this rank will sample so many completions behind the last step, in so many denoising steps each."""
        if self._clock is not None:
            self._clock.ending = completions * steps

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
        self._step = trainer.global_step
        steps = trainer.estimated_stepping_batches
        if math.isfinite(steps):
            self._steps = int(steps)
            self._clock = Clock(max(self._steps, 1), validations_to_come(trainer, self._steps))
        if isinstance(pl_module, DMPO):
            self._expect(trainer, pl_module)
        self.note_phase("training")

    def _expect(self, trainer: Trainer, module: DMPO) -> None:
        """What validations will be, of which the line keeps room for what they show."""
        evaluator, batches = module.evaluator, [int(each) for each in trainer.num_val_batches if math.isfinite(each)]
        steps = [each.num_steps(length) for each in evaluator.samplers.values() for length in evaluator.lengths]
        loaders = trainer.val_dataloaders if isinstance(trainer.val_dataloaders, list) else [trainer.val_dataloaders]
        self._expected = dict(EXPECTED)
        if self._clock is not None and self._clock.validations:
            prompts = (
                min(count * loader.batch_size, len(loader.kept) / trainer.world_size)
                for count, loader in zip(batches, loaders, strict=False)
                if isinstance(loader, PromptLoader)
            )
            self._clock.validation = sum(prompts) * evaluator.completions * sum(steps)
            most, batch = max(steps, default=0), sum(batches)
            self._room = max(ROOM, len(f"validating {batch}/{batch} {most}/{most}"))
        else:
            del self._expected["accuracy"]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Not at `on_train_start`, where reports evaluate the base, which no later step takes part in.
        if not self._started:
            self._started = perf_counter()
            self._noted = (trainer.global_step, self._started)
            self.note_phase("training")

    def on_rollouts(self, trainer: Trainer, module: LightningModule, buffer: RolloutBuffer) -> None:
        shown = {name: show(buffer.means[name]) for name, show in OF_BUFFERS.items() if name in buffer.means}
        self._measures |= shown
        # An objective may have no weights.
        for name in OF_BUFFERS.keys() - shown:
            self._expected.pop(name, None)
        self._show_training(module)
        self._write_plain()
        if self._is_enabled and buffer.number % self.every_n_buffers == 0:
            self.announce(samples_text(module, buffer))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        self._step = trainer.global_step
        if not isinstance(pl_module, DMPO) or pl_module.buffer.needs_rollouts:
            self._note_pace(trainer, pl_module)
        if not isinstance(pl_module, DMPO) and self._step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._measures["train/loss"] = f"loss {number(float(trainer.callback_metrics['train/loss']))}"
            self._write_plain()
        self._show_training(pl_module)

    def _note_pace(self, trainer: Trainer, module: LightningModule) -> None:
        """How fast the run is. In the middle of a buffer a part of its steps would stand for all of its sampling."""
        now, (step, since) = perf_counter(), self._noted
        if self._clock is not None and self._step > step:
            sampled = work = 0.0
            # A buffer of a checkpoint has no times.
            if isinstance(module, DMPO) and module.buffer.seconds:
                sampled, steps = module.buffer.seconds["sampling"], module.sampler.num_steps(module.completion_length)
                work = float(len(module.buffer.rollouts) * module.sampling_rounds * steps)
            self._clock.note_buffer(self._step - step, now - since, sampled=sampled, work=work)
            self._noted = (self._step, now)
        if "rollouts/per_second" in trainer.callback_metrics:
            self._measures["rate"] = f"{float(trainer.callback_metrics['rollouts/per_second']):.3g} rollouts/s"

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._validating = perf_counter()

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        if trainer.sanity_checking:
            self.note_evaluation("checking", batch[1], _whole(trainer.num_sanity_val_batches))
        elif trainer.state.fn != TrainerFn.FITTING:
            self.note_evaluation("validating", batch[1], _whole(trainer.num_val_batches))
        else:
            self.note_phase("validating", batch[1], _whole(trainer.num_val_batches))

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        self.note_evaluation("testing", batch[1], _whole(trainer.num_test_batches))

    def on_predict_batch_start(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        self.note_evaluation("predicting", batch[1], _whole(trainer.num_predict_batches))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        seconds = 0.0 if self._validating is None else perf_counter() - self._validating
        self._step, accuracies = trainer.global_step, _accuracies(pl_module)
        self._validating, self._noted = None, (self._noted[0], self._noted[1] + seconds)
        if self._clock is not None:
            self._clock.note_validation(seconds)
        if accuracies:
            self._measures["accuracy"] = f"accuracy {next(iter(accuracies.values()))[0]:.3f}"
            said = "accuracy " + ", ".join(
                f"{name} {mean:.3f} +- {error:.3f}" for name, (mean, error) in accuracies.items()
            )
        else:
            logged = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
            said = ", ".join(f"{name} {number(float(value))}" for name, value in logged.items())
        self.announce(f"step {self._counted()}: {said} ({duration(seconds)})")
        self._show_training(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seconds = duration(perf_counter() - self._started if self._started else 0.0)
        self._step = trainer.global_step
        if self._clock is not None:
            self._clock.validations = 0
        self.announce(f"{', '.join([f'step {self._counted()}', *self._known()])}; trained for {seconds}")
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
        if self._phase in ("training", "scoring"):
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
            done, total = self._evaluated or (self._step, self._steps)
            left = "" if total is None else self._time_left() or "--:-- left"
            doing = (self._phase + self._part + self._denoising).ljust(self._room)
            count = f"{done}" if total is None else f"{done}/{total}".rjust(2 * len(str(self._steps or total)) + 1)
            share = None if total is None else done / max(total, 1)
            self._line.show(count, [left, doing, *self._known(with_expected=True)], share, at_once=at_once)

    def _write_plain(self) -> None:
        now = perf_counter()
        if self._line is None and now - self._written >= self.plain_interval:
            self._written = now
            self.announce(self._plain_line())

    def _plain_line(self) -> str:
        """Without what a step is doing, which a line in a log outlives."""
        counted, known = f"step {self._counted()}", self._known()
        if self._evaluated is not None:
            counted, known = f"{self._phase} {'/'.join(map(str, filter(None, self._evaluated)))}", []
        return ", ".join(filter(None, [counted, *known, self._time_left()]))

    def _counted(self) -> str:
        return f"{self._step}" if self._steps is None else f"{self._step}/{self._steps}"

    def _known(self, *, with_expected: bool = False) -> list[str]:
        shown = (self._expected if with_expected else {}) | self._measures
        return [shown[name] for name in MEASURES if name in shown]

    def _time_left(self) -> str:
        """Empty where it is not known."""
        now, left = perf_counter(), None
        if self._evaluated is not None:
            left = None if self._ends is None else self._ends - now
        elif self._clock is not None:
            step, since = self._noted
            validated = 0.0 if self._validating is None else now - self._validating
            left = self._clock.left(step, now - since - validated, validated)
        return "" if left is None else f"{duration(max(0.0, left))} left"


def _whole(counts: Any) -> int | None:
    """All batches of all loaders. None where one of them does not say."""
    total = sum(counts) if isinstance(counts, list) else counts
    return int(total) if math.isfinite(total) else None


def _accuracies(module: LightningModule) -> dict[str, tuple[float, float]]:
    """Mean and error of the last evaluation, by the names of samplers, with the length where there are several."""
    results = module.evaluator.results if isinstance(module, DMPO) else []
    several = len({each.length for each in results}) > 1
    return {
        f"{each.sampler}/{each.length}" if several else each.sampler: each.means["accuracy"]
        for each in results
        if "accuracy" in each.means
    }
