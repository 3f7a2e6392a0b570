"""Leaving in time: after a signal the run saves and ends at the next optimizer step."""

import os
import signal
import subprocess
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from dmpo_lightning.distributed.internals import (
    call_last,
    callbacks_of,
    cluster_environment,
    is_accumulating,
    log_step,
    replace_original_handlers,
)
from dmpo_lightning.distributed.ranks import gather_ranks
from dmpo_lightning.modules.run_directory import run_directory

FILE_NAME = "preempted.ckpt"
INTERRUPTED = b"\nThe run saves at the end of this optimizer step and leaves. Ctrl-C again ends it at once.\n"


class Preemption(Callback):
    """After Ctrl-C, SIGTERM, SIGUSR1 or the signal that requeues the job, to any rank, all ranks save and exit.

    They do so at the end of the next optimizer step, when all other callbacks have seen it. In a validation, and in the
    evaluation of `BeforeAfterReport` behind the last step, they do so at its next batch, and the continued run makes it
    again. Until the first step of a run has ended they leave without a checkpoint: what it continues from, if anything,
    says all there is. Ctrl-C until then, and a second one, end the run at once. Where another handler of it is set than
    Python's own, that one is left. The command line adds the callback by itself.

    The checkpoint is ``preempted.ckpt`` beside those of `ModelCheckpoint`. It continues the run bit for bit, and
    ``--ckpt_path last`` finds it. The exit status of all ranks is 128 plus the signal's number, as of a process that
    the signal ended. A SLURM job is put back into the queue after Lightning's requeue signal, which a job script has
    sent before its time is up: SIGUSR1 unless `SLURMEnvironment` says otherwise. After SIGTERM SLURM itself decides.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from dmpo_lightning import Preemption
        >>> trainer = Trainer(callbacks=[Preemption()])
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.saved: Path | None = None
        """The checkpoint that this run has left with."""
        self._has_trained = self._speaks = False
        self._previous: dict[int, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.received, self.saved, self._has_trained = None, None, False
            self._speaks = trainer.is_global_zero
            call_last(trainer, self)
            self._listen(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listens again, because Lightning replaces handlers between these hooks."""
        self._listen(trainer)
        self.leave_if_told(trainer)

    on_sanity_check_start = on_train_start = on_fit_start

    def _listen(self, trainer: Trainer) -> None:
        # Lightning's own too, which come shortly before training and would save in the middle of a step.
        for each in {signal.SIGTERM, signal.SIGUSR1, requeue_signal(trainer) or signal.SIGUSR1}:
            self._previous.setdefault(each, signal.signal(each, self._note))
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Only noted: a handler may run in the middle of a step, of which no checkpoint can be continued.
        self.received = number

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None or not self._has_trained:
            signal.default_int_handler(number, frame)
        self.received = number
        if self._speaks:
            # Not by `print`, in the middle of which a handler may run.
            os.write(2, INTERRUPTED)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        # Between two steps gradients are being accumulated, which no checkpoint holds.
        if not is_accumulating(trainer):
            self._has_trained = True
            self.leave_if_told(trainer)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        # A validation may fall between two micro-batches, where there are gradients that no checkpoint holds.
        if trainer.sanity_checking or (trainer.state.fn == TrainerFn.FITTING and not is_accumulating(trainer)):
            self.leave_if_told(trainer)

    def leave_if_told(self, trainer: Trainer) -> None:
        """Leaves if a rank was told to, and saves if there is anything to save. All ranks call it together."""
        # They ask together, as it may have reached one of them only.
        if not trainer.strategy.reduce_boolean_decision(self.received is not None, all=False):
            return
        # Ranks may have been sent different signals, and exit with the same one.
        received = max(number or 0 for number in gather_ranks(self.received))
        if self._has_trained:
            log_step(trainer)
            directory = getattr(trainer.checkpoint_callback, "dirpath", None) or run_directory(trainer) / "checkpoints"
            trainer.save_checkpoint(path := Path(directory) / FILE_NAME)
            self.saved = path
            rank_zero_info(f"Saved to {path} after signal {received}, at optimizer step {trainer.global_step}.")
        else:
            rank_zero_info(f"Left after signal {received}: nothing was trained since the start, nothing is saved.")
        if trainer.is_global_zero and received == requeue_signal(trainer):
            requeue()
        # srun may end the job at the first exit of a rank, before rank 0 has put it back into the queue.
        trainer.strategy.barrier()
        if received == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + received)

    def on_train_end(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException | None = None
    ) -> None:
        """Gives the signals back."""
        for each, previous in self._previous.items():
            # Lightning ignores further ones while it ends an interrupted run.
            if each != signal.SIGINT or signal.getsignal(each) == self._interrupt:
                signal.signal(each, previous)
        replace_original_handlers(trainer, self._previous)
        self._previous = {}

    on_exception = on_train_end


def leave_if_told(trainer: Trainer) -> None:
    """Ends a run that was sent a signal, outside of Lightning's loops, which look for one. All ranks call it."""
    for each in callbacks_of(trainer, Preemption):
        each.leave_if_told(trainer)
    if trainer.strategy.reduce_boolean_decision(trainer.received_sigterm, all=False):
        raise SIGTERMException


def requeue_signal(trainer: Trainer) -> int | None:
    """The signal that puts this job back into the queue, None where none does."""
    environment = cluster_environment(trainer)
    if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
        return None
    return environment.requeue_signal or signal.SIGUSR1


def requeue() -> None:
    """Puts this job of SLURM's back into the queue, or says what went wrong."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    # A task of a job array is put back by itself and not with the whole array.
    job = os.environ["SLURM_JOB_ID"] if array is None else f"{array}_{task}"
    command = ["scontrol", "requeue", job]
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        rank_zero_warn(f"`{' '.join(command)}` failed ({error}): submit the job again, it continues where it was.")
