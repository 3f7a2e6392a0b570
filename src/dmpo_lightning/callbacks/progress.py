"""What a person sees while a run goes on: one line at the bottom of a terminal, or plain lines in a log."""

import math
import re
import sys
from time import perf_counter
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from tqdm import tqdm

from dmpo_lightning.callbacks.clock import Clock, validations_to_come
from dmpo_lightning.callbacks.completion_records import samples_text
from dmpo_lightning.callbacks.facts import model_line, split_sizes
from dmpo_lightning.modules.base import PolicyModule
from dmpo_lightning.modules.dmpo import DMPO
from dmpo_lightning.modules.observers import RolloutObserver
from dmpo_lightning.rollout import RolloutBuffer, check_counts
from dmpo_lightning.terminal import BottomLine, escaped, is_terminal

ACCURACY, LOSS, RATE = "accuracy", "train/loss", "rollouts/per_second"
MEASURES = {
    "reward/total": "reward {:.3f}",
    LOSS: "loss {:.3f}",
    ACCURACY: "accuracy {:.3f}",
    "weight/ess": "ess {:.2f}",
    "reward/informative_groups": "informative {:.0%}",
    RATE: "{:4.3g} rollouts/s",
}
"""What is shown of a run, in the order of what matters."""
PHASES = {"sanity_check": "checking", "validate": "validating", "test": "testing", "predict": "predicting"}
"""Evaluations by Lightning's stages."""
ROOM = 20
"""Columns for what is being done."""
duration = tqdm.format_interval


class ProgressLine(ProgressBar, RolloutObserver):
    """Shows where a run is. The command line takes it in the place of Lightning's bars, unless one is configured.

    On a terminal it is one line of tqdm's at the bottom: optimizer steps, the time left of the whole run with all its
    evaluations, what is being done, and numbers of the run, as many as there is room for. While an evaluation stands
    alone, as that of the base before a run, its batches and the time left of it are in the place of steps. Elsewhere,
    as in the log of a job, a plain line is written now and then and for each validation. Now and then the best and the
    worst completion of a prompt are shown. All goes to standard error (docs/decisions/036-progress.md).

    Args:
        refresh_interval: seconds between two states of the line on a terminal, at least.
        plain_interval: seconds between two lines in a log, at least. Validations are written in any case.
        every_n_buffers: how often completions are shown, beginning with the first buffer.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from dmpo_lightning import ProgressLine
        >>> trainer = Trainer(callbacks=[ProgressLine(plain_interval=60)])
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
        self._measures: dict[str, float] = {}
        self._expected: list[str] = []
        """Those of `MEASURES` that this run will have, for which the line keeps room."""
        self._step = 0
        self._steps: int | None = None
        self._alone: tuple[int, int | None] | None = None
        """Batches of an evaluation that stands alone, done and all."""
        self._started = self._phase_started = self._validation_started = 0.0
        self.clock: Clock | None = None
        """Of a run whose steps are known."""
        self._noted = (0, 0.0)
        """The step and the time up to which the clock knows the training, without validations since then."""
        self._ends: float | None = None
        """When the run will be done, or an evaluation that stands alone."""
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

    def note(self, phase: str, done: int | None = None, total: int | None = None, *, alone: bool = False) -> None:
        """What is being done from here on, how much of it is done, and whether that is an evaluation by itself."""
        now, changes = perf_counter(), phase != self._phase or (alone and not done)
        if changes:
            self._phase_started = now
        if alone and done and total is not None:
            self._ends = now + (now - self._phase_started) / done * (total - done)
        self._alone = (done or 0, total) if alone else None
        self._part = "" if alone or done is None else f" {_of(done, total)}"
        self._phase, self._denoising = phase, ""
        self._refresh(at_once=changes)
        if alone and done:
            self._write_plain()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._forget()
        self.announce(model_line(trainer, pl_module))
        if self._is_enabled and self._line is None and is_terminal(sys.stderr):
            self._line = BottomLine(sys.stderr, self.refresh_interval)
        if self._line is not None and isinstance(pl_module, PolicyModule):
            self._module = pl_module
            # Not the method itself: copies of the module, such as those of averaged weights, copy what one is bound to.
            pl_module.policy.on_denoising_step = lambda *counts: self._note_denoising(*counts)  # noqa: PLW0108
        self.note("starting")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step, self._ends, self._expected = trainer.global_step, None, [LOSS]
        if math.isfinite(steps := trainer.estimated_stepping_batches):
            self._steps = int(steps)
            self.clock = Clock(max(self._steps, 1), validations_to_come(trainer, self._steps))
        if isinstance(pl_module, DMPO):
            left_out = {LOSS} if trainer.enable_validation else {LOSS, ACCURACY}
            self._expected = [name for name in MEASURES if name not in left_out]
            if self.clock is not None:
                evaluator, prompts = pl_module.evaluator, split_sizes(trainer).get("validation", 0)
                each = sum(one.num_steps(length) for one in evaluator.samplers.values() for length in evaluator.lengths)
                self.clock.validation = prompts / trainer.world_size * evaluator.completions * each
        self.note("training")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Not at `on_train_start`, where reports evaluate the base, which no later step takes part in.
        if not self._started:
            self._started, self._ends = perf_counter(), None
            self._noted = (trainer.global_step, self._started)
            self.note("training")

    def on_rollouts(self, trainer: Trainer, module: LightningModule, buffer: RolloutBuffer) -> None:
        self._measures |= {name: value for name, value in buffer.means.items() if name in MEASURES}
        self._show_training(module)
        self._write_plain()
        if self._is_enabled and buffer.number % self.every_n_buffers == 0:
            self.announce(samples_text(module, buffer))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        self._step, logged = trainer.global_step, trainer.callback_metrics
        # In the middle of a buffer a part of its steps would stand for all of its sampling.
        if not isinstance(pl_module, DMPO) or pl_module.buffer.needs_rollouts:
            self._note_pace(pl_module)
            self._measures |= {name: float(logged[name]) for name in (LOSS, RATE) if name in logged}
        if not isinstance(pl_module, DMPO) and self._step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._write_plain()
        self._show_training(pl_module)

    def _note_pace(self, module: LightningModule) -> None:
        now, (step, since), sampled, work = perf_counter(), self._noted, 0.0, 0.0
        if self.clock is not None and self._step > step:
            # A buffer of a checkpoint has no times.
            if isinstance(module, DMPO) and module.buffer.seconds:
                sampled, steps = module.buffer.seconds["sampling"], module.sampler.num_steps(module.completion_length)
                work = float(len(module.buffer.rollouts) * module.sampling_rounds * steps)
            self.clock.note_buffer(self._step - step, now - since, sampled=sampled, work=work)
            self._noted = (self._step, now)
            self._foresee()

    def _foresee(self) -> None:
        left = None if self.clock is None else self.clock.left(self._noted[0])
        # Of the steps that the clock does not know yet, some time has gone by.
        self._ends = None if left is None else self._noted[1] + left

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_started = perf_counter()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        stage: Any = trainer.state.stage
        kind = "sanity_val" if trainer.sanity_checking else stage.dataloader_prefix
        counts = getattr(trainer, f"num_{kind}_batches")
        total = sum(counts) if isinstance(counts, list) else counts
        is_part = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        self.note(PHASES[stage], batch_idx, int(total) if math.isfinite(total) else None, alone=not is_part)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        seconds = perf_counter() - self._validation_started
        self._step, self._noted = trainer.global_step, (self._noted[0], self._noted[1] + seconds)
        if self.clock is not None:
            self.clock.note_validation(seconds)
            self._foresee()
        logged = {name[4:]: float(each) for name, each in trainer.callback_metrics.items() if name.startswith("val/")}
        accuracies = {name: each for name, each in logged.items() if f"{name}_stderr" in logged}
        said = ", ".join(f"val/{name} {each:.3f}" for name, each in logged.items())
        if accuracies:
            self._measures[ACCURACY] = next(iter(accuracies.values()))
            errors = ((name.rpartition("/")[0], each, logged[f"{name}_stderr"]) for name, each in accuracies.items())
            said = f"accuracy {', '.join(f'{name} {each:.3f} +- {error:.3f}' for name, each, error in errors)}"
        self.announce(f"step {_of(self._step, self._steps)}: {said} ({duration(seconds)})")
        self._show_training(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seconds = duration(perf_counter() - self._started if self._started else 0.0)
        self._step = trainer.global_step
        self.announce(f"{', '.join(self._known())}; trained for {seconds}")
        self.note("finishing")

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
            self.note("sampling")
        if self._phase == "sampling" and done == total:
            # Of training. Rewards and the objective's log-probs come next, whose steps nobody counts.
            self.note("scoring")
        else:
            self._denoising = f" {done}/{total}"
            self._refresh()

    def _show_training(self, module: LightningModule) -> None:
        buffer = module.buffer if isinstance(module, DMPO) and len(module.buffer) else None
        counts = (buffer.position, buffer.num_iterations * buffer.micro_batches) if buffer else ()
        self.note("training", *counts)

    def _refresh(self, *, at_once: bool = False) -> None:
        if self._line is None:
            return
        done, total = self._alone or (self._step, self._steps)
        doing = self._phase + self._part + self._denoising
        if len(doing) > ROOM:
            doing = self._phase + self._part
        # In the place of a number that is not known yet there are dashes.
        dashes = {name: re.sub(r"\d", "-", MEASURES[name].format(1.0)) for name in self._expected}
        shown = dashes | {name: MEASURES[name].format(value) for name, value in self._measures.items()}
        count = _of(done, total).rjust(len(_of(self._steps or 0, self._steps)))
        parts = [self._time_left() or "--:-- left", doing.ljust(ROOM), *(shown[name] for name in self._expected)]
        self._line.show(count, parts, done / total if total else None, at_once=at_once)

    def _write_plain(self) -> None:
        now = perf_counter()
        if self._line is None and now - self._written >= self.plain_interval:
            self._written = now
            # Without what a step is doing, which a line in a log outlives.
            parts = [f"{self._phase} {_of(*self._alone)}"] if self._alone is not None else self._known()
            self.announce(", ".join(filter(None, [*parts, self._time_left()])))

    def _known(self) -> list[str]:
        known = [MEASURES[name].format(self._measures[name]) for name in self._expected if name in self._measures]
        return [f"step {_of(self._step, self._steps)}", *map(str.strip, known)]

    def _time_left(self) -> str:
        """Empty where it is not known."""
        return "" if self._ends is None else f"{duration(max(0.0, self._ends - perf_counter()))} left"


def _of(done: int, total: int | None) -> str:
    return f"{done}" if total is None else f"{done}/{total}"
