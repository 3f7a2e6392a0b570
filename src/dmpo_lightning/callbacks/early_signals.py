"""A signal before training: it is said and the process ends at once, because nothing was trained that could be lost.

Handlers belong to a process, and so does what is kept here. Neither torch nor Lightning is imported: that takes
seconds, in which a signal may come.
"""

import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class EarlySignals:
    """What handles signals from the first moment of a command until a callback does, or nobody.

    A signal that comes before the configuration is known waits for it, since that says whether a job is requeued.
    """

    def __init__(self) -> None:
        self.process = os.getpid()
        self.received: int | None = None
        self.is_configured = False
        self.requeue_signal: int | None = None
        self.previous: dict[signal.Signals, Any] = {each: signal.signal(each, self.handle) for each in SIGNALS}

    def handle(self, number: int, frame: FrameType | None = None) -> None:
        """Notes a signal, or ends the process."""
        # A child that was forked, such as one that loads data, has handlers of its parent's and ends as it would.
        if os.getpid() != self.process:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.received = number
        if self.is_configured:
            self._leave(number)
        else:
            _say(f"{signal.Signals(number).name} came before training; this run ends once its configuration is read.")

    def configured(self, requeue_signal: int | None) -> None:
        """From now on a signal ends the process at once, as does one that has come."""
        self.requeue_signal, self.is_configured = requeue_signal, True
        if self.received is not None:
            self._leave(self.received)

    def _leave(self, number: int) -> None:
        _say(
            f"Left after {signal.Signals(number).name}, before training: nothing was trained, checkpoints are as ever."
        )
        # One process asks for all.
        if number == self.requeue_signal and os.environ.get("SLURM_PROCID", "0") == "0":
            problem = requeue()
            if problem is not None:
                _say(problem)
        # An exception could be taken for something else by the code that is interrupted, such as a library that tries
        # an import. Nothing has begun that would have to be put away.
        os._exit(128 + number)

    def stop(self) -> None:
        """Puts back what was there before, where nobody else has taken a signal."""
        for each, previous in self.previous.items():
            if signal.getsignal(each) == self.handle:
                signal.signal(each, previous)


_listening: list[EarlySignals] = []


@contextmanager
def listening() -> Iterator[None]:
    """Inside, SIGTERM and SIGUSR1 before training are said, and requeue a job of SLURM's as they do in training."""
    # Python takes signals in the main thread alone, where the program runs.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    early = EarlySignals()
    _listening.append(early)
    try:
        yield
    finally:
        early.stop()
        _listening.remove(early)


def configured(requeue_signal: int | None) -> None:
    """The configuration is known now. ``requeue_signal`` requeues a job of SLURM's, and None is that no signal does."""
    for each in _listening:
        each.configured(requeue_signal)


def stop_listening() -> None:
    """Called before training of a run without a callback that would take over: Lightning leaves a signal alone that
    has a handler already.
    """
    for each in _listening:
        each.stop()


def take(number: signal.Signals, handler: Any) -> Any:
    """Sets a handler, and returns the one to be put back behind training: not `EarlySignals`, which is over by then."""
    previous = signal.signal(number, handler)
    owner = getattr(previous, "__self__", None)
    return owner.previous[number] if isinstance(owner, EarlySignals) else previous


def requeue() -> str | None:
    """Puts this job of SLURM's back into the queue. Returns what went wrong, None if nothing did."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    # A task of a job array is put back by itself and not with the whole array.
    job = os.environ["SLURM_JOB_ID"] if array is None else f"{array}_{task}"
    command = ["scontrol", "requeue", job]
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"`{' '.join(command)}` failed ({error}): submit the job again, it continues where it was."
    return None


def _say(line: str) -> None:
    # Not through `sys.stderr`, which may be what the signal interrupts.
    os.write(2, f"dmpo-lightning: {line}\n".encode())
