"""Leaving in time: after a signal the run saves and ends at the next optimizer step."""

import os
import signal
import subprocess
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from dmpo_lightning.distributed.internals import (
    is_accumulating,
    replace_original_handlers,
    validate_before_training,
    validates_now,
)
from dmpo_lightning.distributed.ranks import gather_ranks
from dmpo_lightning.modules.run_directory import run_directory

FILE_NAME = "preempted.ckpt"


class Preemption(Callback):
    """After SIGTERM, SIGUSR1 or the signal that requeues the job, to any rank, all ranks save a checkpoint and exit.

    They do so at the end of the next optimizer step. In a validation they do so at the end of its next batch, and the
    continued run makes that validation again. After the last step nothing continues, and ``validate`` makes it. Before
    the first step, from ``setup`` on, they leave without a checkpoint: nothing was trained, and a run that continues is
    as it was. A validation that SIGINT interrupts is not made again.

    The checkpoint is ``preempted.ckpt`` beside those of `ModelCheckpoint`. It continues the run bit for bit, and
    ``--ckpt_path last`` finds it. The exit status of all ranks is 128 plus the signal's number, as of a process that
    the signal ended.

    A SLURM job is put back into the queue after Lightning's requeue signal, which a job script has sent before its time
    is up. That is SIGUSR1 unless `SLURMEnvironment` says otherwise. After SIGTERM, SLURM itself decides.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}
        self._validation_is_due = self._validates_again = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.received = None
            self._listen(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.leave_untrained(trainer)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen(trainer)
        self.leave_untrained(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen(trainer)
        self.leave_untrained(trainer)
        is_due, self._validation_is_due = self._validation_is_due, False
        if is_due and trainer.enable_validation:
            self._validates_again = True
            validate_before_training(trainer)
            self._validates_again = False

    def _listen(self, trainer: Trainer) -> None:
        """Replaces what handles the signals, Lightning's own too, which come shortly before training and would save in
        the middle of a step.
        """
        for each in {signal.SIGTERM, signal.SIGUSR1, requeue_signal(trainer.strategy) or signal.SIGUSR1}:
            self._previous.setdefault(each, signal.signal(each, self._note))

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Only noted: a handler may run in the middle of a step, of which no checkpoint can be continued.
        self.received = number

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        # Between two steps gradients are being accumulated, which no checkpoint holds.
        if not is_accumulating(trainer):
            self._leave_if_told(trainer, validation_is_due=validates_now(trainer))

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        if trainer.sanity_checking:
            self.leave_untrained(trainer)
        # A validation may fall between two micro-batches, where there are gradients that no checkpoint holds.
        elif trainer.state.fn == TrainerFn.FITTING and not is_accumulating(trainer):
            self._leave_if_told(trainer, validation_is_due=True)

    def leave_untrained(self, trainer: Trainer) -> None:
        """Leaves if a rank was told to, before the first step of this run. All ranks call it together."""
        received = self._told(trainer)
        if received is not None:
            rank_zero_info(f"Left after signal {received}, before training: nothing was trained, nothing is saved.")
            self._exit(trainer, received)

    def _told(self, trainer: Trainer) -> int | None:
        """The signal that a rank was sent, on all ranks, which ask together as it may have reached one of them only."""
        if not trainer.strategy.reduce_boolean_decision(self.received is not None, all=False):
            return None
        # Ranks may have been sent different signals, and exit with the same one.
        return max(number or 0 for number in gather_ranks(self.received))

    def _leave_if_told(self, trainer: Trainer, *, validation_is_due: bool) -> None:
        received = self._told(trainer)
        if received is None:
            return
        # The checkpoint of the last time says all there is, the open validation included.
        if self._validates_again:
            rank_zero_info(f"Left after signal {received}, in the validation that the checkpoint had left open.")
        else:
            directory = getattr(trainer.checkpoint_callback, "dirpath", None) or run_directory(trainer) / "checkpoints"
            path, self._validation_is_due = Path(directory) / FILE_NAME, validation_is_due
            trainer.save_checkpoint(path)
            rank_zero_info(f"Saved to {path} after signal {received}, at optimizer step {trainer.global_step}.")
        self._exit(trainer, received)

    def _exit(self, trainer: Trainer, received: int) -> NoReturn:
        if trainer.is_global_zero and received == requeue_signal(trainer.strategy):
            requeue()
        # srun may end the job at the first exit of a rank, before rank 0 has put it back into the queue.
        trainer.strategy.barrier()
        raise SystemExit(128 + received)

    def state_dict(self) -> dict[str, Any]:
        """Whether the run was left before the validation of its step was done."""
        return {"validation_is_due": self._validation_is_due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The validation is made when the run continues."""
        self._validation_is_due = state_dict["validation_is_due"]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore(trainer)
        self._validation_is_due = self._validates_again = False

    def _restore(self, trainer: Trainer) -> None:
        for each, previous in self._previous.items():
            signal.signal(each, previous)
        replace_original_handlers(trainer, self._previous)
        self._previous = {}


def requeue_signal(strategy: Any) -> int | None:
    """The signal that puts this job back into the queue, None where none does.

    After any other signal SLURM itself decides what becomes of the job.
    """
    environment = getattr(strategy, "cluster_environment", None)
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
