"""What a run of the command line says at its end: what came of it, where that is, and what to type next."""

import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from dmpo_lightning.callbacks.before_after import BeforeAfterReport
from dmpo_lightning.callbacks.preemption import Preemption
from dmpo_lightning.callbacks.progress import duration
from dmpo_lightning.callbacks.records import RunRecorder
from dmpo_lightning.checkpoints.reading import facts_beside_weights
from dmpo_lightning.commands.score import TASKS
from dmpo_lightning.distributed.internals import callbacks_of
from dmpo_lightning.modules.run_directory import own_directory
from dmpo_lightning.reports.lines import read_lines
from dmpo_lightning.reports.record import COMPLETIONS, EVALUATION, METRICS, REPORT, SUMMARY
from dmpo_lightning.terminal import escaped

PROGRAM = "dmpo-lightning"


def closing_text(
    trainer: Trainer,
    module: LightningModule,
    typed: Sequence[str],
    *,
    checkpoint: str | None = None,
    error: BaseException | None = None,
) -> str:
    """The last lines of a run. Rank 0 alone asks for them, when the run is over.

    The command was ``typed`` with these options, it continued ``checkpoint``, and ``error`` ended it before its time.
    """
    directory = own_directory(trainer)
    is_fit = trainer.state.fn == TrainerFn.FITTING
    saved = dict(_saved(trainer, checkpoint)) if is_fit else {}
    last = max(saved, key=lambda path: saved[path], default=None)
    results = ", ".join(_measures(trainer, module, directory))
    lines = [_deed(trainer, module, error) + f"; {results}" * bool(results), f"  directory   {_shown(directory)}"]
    if last is not None:
        lines.append(f"  checkpoint  {_shown(last)}, of step {saved[last]}")
    elif is_fit:
        lines.append("  checkpoint  none is saved yet")
    for callback in callbacks_of(trainer, ModelCheckpoint):
        path, score = Path(callback.best_model_path), callback.best_model_score
        if score is not None and path in saved and path != last:
            lines.append(f"  best        {_shown(path)}, of step {saved[path]}: {callback.monitor} {float(score):.3f}")
    lines += [
        f"  {what.ljust(10)}  {_shown(directory / name)}"
        for what, name in (("page", REPORT), ("summary", SUMMARY), ("results", EVALUATION), ("answers", COMPLETIONS))
        if (directory / name).is_file()
    ]
    commands = list(_next(trainer, directory, typed, last, is_over=error is None))
    return "\n".join(map(escaped, ["", *lines, *["Next:"] * bool(commands), *(f"  {each}" for each in commands)]))


def _deed(trainer: Trainer, module: LightningModule, error: BaseException | None) -> str:
    """What was done, and why no more."""
    deeds: dict[Any, str] = {TrainerFn.FITTING: "Trained", TrainerFn.PREDICTING: "Predicted"}
    done = deeds.get(trainer.state.fn, "Evaluated")
    if error is not None:
        done = f"{_reason(error)}, {done.lower()}"
    if trainer.state.fn != TrainerFn.FITTING:
        return done
    done += f" {trainer.global_step}" + f" of {trainer.max_steps}" * (trainer.max_steps > 0) + " steps"
    if rollouts := getattr(module, "rollouts_seen", 0):
        done += f" on {rollouts} rollouts"
    return done + "".join(f" in {duration(each.seconds_by_now())}" for each in callbacks_of(trainer, RunRecorder)[:1])


def _reason(error: BaseException) -> str:
    if is_interrupt(error):
        return "Interrupted"
    # As `Preemption` leaves.
    status = error.code if isinstance(error, SystemExit) else None
    return f"Ended by signal {status - 128}" if isinstance(status, int) and status > 128 else "Failed"


def is_interrupt(error: BaseException) -> bool:
    """Whether somebody has pressed Ctrl-C, after which Lightning's Trainer exits with status 1."""
    return isinstance(error, KeyboardInterrupt) or (
        isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt)
    )


def _measures(trainer: Trainer, module: Any, directory: Path) -> Iterator[str]:
    """What is measured, before and after where both are known."""
    if trainer.state.fn == TrainerFn.PREDICTING and (directory / COMPLETIONS).is_file():
        yield f"{len((directory / COMPLETIONS).read_bytes().splitlines())} completions"
    if trainer.state.fn != TrainerFn.FITTING:
        for result in getattr(getattr(module, "evaluator", None), "results", []):
            if "accuracy" in result.means:
                yield f"accuracy {result.means['accuracy'][0]:.3f} ({result.sampler}, length {result.length})"
        return
    for report in callbacks_of(trainer, BeforeAfterReport):
        for name, after in report.after.items():
            yield f"accuracy {report.before[name]['accuracy'][0]:.3f} -> {after['accuracy'][0]:.3f} ({name})"
        if report.after:
            return
    for kind in ("validation", "buffer"):
        values = [line["values"] for line in read_lines(directory / METRICS) if line.get("kind") == kind]
        names = [name for name in (values[-1] if values else ()) if name.endswith("/accuracy")]
        for name in (names or ["val/loss", "reward/total"])[:2]:
            if known := [each[name] for each in values if isinstance(each.get(name), float)]:
                yield f"{name} " + " -> ".join(f"{each:.3f}" for each in dict.fromkeys((known[0], known[-1])))


def _saved(trainer: Trainer, checkpoint: str | None) -> Iterator[tuple[Path, int]]:
    """The checkpoints that there are, each with its step."""
    callbacks = callbacks_of(trainer, ModelCheckpoint)
    paths: list[Any] = [each.saved for each in callbacks_of(trainer, Preemption)]
    paths += [path for each in callbacks for path in (each.last_model_path, each.best_model_path)] + [checkpoint]
    for path in dict.fromkeys(Path(each) for each in paths if each):
        facts = facts_beside_weights(path) if path.exists() else None
        if isinstance(facts, dict) and isinstance(facts.get("global_step"), int):
            yield path, facts["global_step"]


def _next(
    trainer: Trainer, directory: Path, typed: Sequence[str], last: Path | None, *, is_over: bool
) -> Iterator[str]:
    """Commands that make sense now, as they are typed."""
    if not is_over:
        # The last one of an option that is given twice counts.
        yield _command(*typed, *(["--ckpt_path", "last"] if last is not None else []))
        return
    if last is not None:
        # A folder, which sharded runs write, can run code where it is opened.
        trust = ["--trust_checkpoint"] * last.is_dir()
        yield _command("generate", "--ckpt_path", _shown(last), *trust, "--prompt", _prompt(trainer), "--show")
        yield _command("export", "--ckpt_path", _shown(last), *trust, "--output", "model")
    own: Any = getattr(getattr(trainer, "datamodule", None), "task", None)
    for task in (name for name, kind in TASKS.items() if type(own) is kind and (directory / COMPLETIONS).is_file()):
        yield _command("score", "--task", task, "--file", _shown(directory / COMPLETIONS))
    if (directory / EVALUATION).is_file() or (directory / METRICS).is_file():
        yield _command("report", _shown(directory))


def _prompt(trainer: Trainer) -> str:
    """A prompt of the run, if it is short enough to be typed."""
    loader: Any = trainer.train_dataloader
    try:
        prompt = loader.prompt(loader.dataset[loader.kept[0]])
    # Loaders of one's own and mixtures have no such prompts, and a run that is done must not fail for want of one.
    except Exception:
        return "TEXT"
    return prompt if isinstance(prompt, str) and len(prompt) <= 80 and prompt.isprintable() else "TEXT"


def _command(*arguments: str) -> str:
    """As this command was called."""
    called = Path(sys.argv[0])
    if called.parts[-2:] == ("dmpo_lightning", "__main__.py"):
        return shlex.join(["python", "-m", "dmpo_lightning", *arguments])
    is_found = called.name != PROGRAM or shutil.which(PROGRAM) == str(called.absolute())
    return shlex.join([PROGRAM if is_found else str(called), *arguments])


def _shown(path: Path) -> str:
    """A path as it is typed from here."""
    return os.path.relpath(path) if path.absolute().is_relative_to(Path.cwd()) else str(path)
