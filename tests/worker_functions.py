"""Functions for worker processes; importing them must not import torch."""

import faulthandler
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from dmpo_lightning.tasks.base import Verdict
from dmpo_lightning.workers import WorkerPool

LOCK = threading.Lock()


class Unspeakable(BaseException):
    """What cannot even be printed."""

    def __str__(self):
        raise ValueError

    __repr__ = __str__


def behave(what, value=None):  # noqa: PLR0911, PLR0912  one line per behaviour
    """Does what the first argument says."""
    if what == "return":
        return value
    if what == "sleep":
        time.sleep(value)
        return "slept"
    if what == "raise":
        raise KeyError(value)
    if what == "exit":
        os._exit(value)
    if what == "long integer operation":
        return hold_the_interpreter(0)
    if what == "pid":
        return os.getpid()
    if what == "modules":
        return sorted(set(value) & set(sys.modules))
    if what == "nested":
        return WorkerPool(behave, workers=1).map([("return", value)])
    if what == "start and wait":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(value).write_text(f"{os.getpid()} {child.pid}")
        time.sleep(600)
    if what == "sys.exit":
        sys.exit(value)
    if what == "GeneratorExit":
        raise GeneratorExit
    if what == "KeyboardInterrupt":
        raise KeyboardInterrupt
    if what == "leave a thread":
        threading.Thread(target=hold_the_interpreter, daemon=True).start()
        return "left"
    if what == "leave a lock":
        LOCK.acquire()
        return "left"
    if what == "take the lock":
        with LOCK:
            return "taken"
    if what == "leave an alarm":
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        return "left"
    if what == "fork":
        os.fork()
        return value
    if what == "stop the clock":
        faulthandler.cancel_dump_traceback_later()
        time.sleep(600)
    if what == "unspeakable":
        raise Unspeakable
    if what == "leave a child":
        if os.fork():
            os._exit(3)
        time.sleep(600)
    if what == "close all files":
        os.closerange(3, 256)
    if what == "import":
        return importlib.import_module(value).value()
    return lambda: None


def hold_the_interpreter(after=0.2):
    """One operation on integers, during which no other thread runs."""
    time.sleep(after)
    return len(str((9**9**7) ** 9))


def refuse():
    raise OSError("no model here")


class Refusing:
    """What loads something where it is unpickled."""

    def __reduce__(self):
        return refuse, ()

    def __call__(self):
        return 1


def score(example, completion):
    """Components of a completion, which may also say how to fail."""
    if completion.startswith("fail: "):
        what, _, value = completion.removeprefix("fail: ").partition(" ")
        return behave(what, float(value) if what == "sleep" else int(value or 1))
    return {"count": float(completion.count(example["word"])), "length": len(completion)}


def score_later(example, completion):
    async def later():
        return 1.0

    return later()


def half(example, completion):
    return 0.5


def check_end(example, completion):
    """Correct is what ends."""
    if completion == "sleep":
        time.sleep(60)
    return Verdict(completion, completion.endswith("<end>"))


def score_batch(examples, completions):
    """The number of completions, for each of them; or what a completion says."""
    for text in completions:
        if text.startswith("fail: "):
            score(None, text)
    if "one too few" in completions:
        return [1.0]
    results = [float(len(completions)) for _ in examples]
    return [float("nan") if text == "nan" else result for text, result in zip(completions, results, strict=True)]


class Longer:
    """A score with a setting."""

    def __init__(self, than: int = 1) -> None:
        self.than = than

    def __call__(self, example, completion):
        return float(len(completion) > self.than)
