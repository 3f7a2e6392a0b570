"""Where a run lives: one directory, which holds all of its files and those of no other run."""

import contextlib
import glob
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from dmpo_lightning.checkpoints.reading import facts_beside_weights
from dmpo_lightning.distributed.internals import FILE_LOGGERS, NoLog, continue_log, given_version, name_version
from dmpo_lightning.reports.lines import read_file, read_lines
from dmpo_lightning.reports.record import (
    AFTER,
    BASE,
    BEFORE,
    COMPLETIONS,
    EVALUATION,
    KNOWN,
    METRICS,
    ROLLOUTS,
    RUN,
    SUMMARY,
)

LATEST = "latest"
"""The link beside the directories of runs that leads to that of the run that trained last."""
KINDS = {"fit": "", "validate": "_validate", "test": "_test", "predict": "_predict"}
"""What comes behind the names of a command's directories and of the link to the latest of them."""
CONFIG = "config.yaml"
TRACES = (CONFIG, "hparams.yaml", "metrics.csv", "events.out.tfevents.*", "checkpoints", COMPLETIONS, *KNOWN)
"""By any of these a directory is that of a run, into which no other one writes."""
KEPT = ("checkpoints/*", f"{ROLLOUTS}/rank*", "metrics.csv", COMPLETIONS, EVALUATION, SUMMARY)
"""By any of these, or by metrics of more than the base, more has become of a run than a start."""
HELD_OUT = (f"{ROLLOUTS}/{BEFORE}.jsonl", f"{ROLLOUTS}/{AFTER}.jsonl")
STARTED = (CONFIG, "hparams.yaml", "events.out.tfevents.*", RUN, METRICS, *HELD_OUT)
"""What runs write before anything is trained or evaluated."""


@dataclass
class Start:
    """What the start of a run makes, so that one of which nothing comes leaves nothing."""

    taken: set[Path] = field(default_factory=set)
    """The directories of the run, and those within that its loggers write to."""
    made: list[Path] = field(default_factory=list)
    """Those of them, and of the folders above, that were not there before."""
    link: Path | None = None
    led_to: str | None = None

    def take(self, folder: Path, *, anew: bool) -> bool:
        """Whether a folder is this run's from now on, not another's. Of two runs at the same moment one gets it.

        Args:
            folder: of a run.
            anew: whether it must not be there yet. Else it may be, but must hold no run.
        """
        if folder in self.taken:
            return True
        missing = [each for each in reversed((folder, *folder.parents)) if not each.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=not anew)
            self.made += missing
            if not anew:
                if any(next(folder.glob(trace), None) for trace in TRACES):
                    return False
                (folder / CONFIG).touch(exist_ok=False)
        except OSError as error:
            if isinstance(error, FileExistsError) and folder.parent.is_dir() and (anew or folder.is_dir()):
                return False
            raise ValueError(
                f"The run directory {folder} cannot be made: {error.filename or folder}: {error.strerror}. Checkpoints "
                "and logs would go there; name a folder that can be written by --trainer.logger.save_dir, or by "
                "--trainer.default_root_dir where no logger is configured."
            ) from error
        self.taken.add(folder)
        return True

    def undo(self) -> bool:
        """Removes what a start leaves, where it led to nothing else, and says whether it did. Rank 0 calls it.

        What others have written there stays.
        """
        is_kept = any(next(run.glob(each), None) for run in self.taken for each in KEPT)
        if is_kept or any(line.get("kind") != BASE for run in self.taken for line in read_lines(run / METRICS)):
            return False
        files = [path for folder in self.taken for each in STARTED for path in folder.glob(each)]
        inner = {each for path in files for each in path.parents if not self.taken.isdisjoint(each.parents)}
        with contextlib.suppress(OSError):
            # Another run may have begun since.
            if self.link is not None and self.link.resolve() in {each.resolve() for each in self.taken}:
                self.link.unlink()
                if self.led_to is not None:
                    _lead(self.link, self.led_to)
            for path in files:
                path.unlink()
        for folder in [*sorted(inner, reverse=True), *reversed(self.made)]:
            # Only an empty one is removed.
            with contextlib.suppress(OSError):
                folder.rmdir()
        return bool(self.taken)


def run_directory(trainer: Trainer) -> Path:
    """The directory of this run, in whose ``checkpoints`` `ModelCheckpoint` writes by itself, and beside them all else.

    All ranks call it together. Lightning's ``log_dir`` is that of a version for its loggers of files alone. For any
    other, such as those of W&B and MLflow, it is the folder that all runs share. `ModelCheckpoint` adds name and
    version, and so does this.
    """
    # The other ranks may not know what their logger's service has called the run.
    return Path(trainer.strategy.broadcast(str(own_directory(trainer))))


def own_directory(trainer: Trainer) -> Path:
    """The directory as this rank knows it, which is as it is on rank 0."""
    logger: Any = trainer.logger
    if logger is None:
        return Path(trainer.default_root_dir)
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return _runs(trainer, logger) / version


def _runs(trainer: Trainer, logger: Any) -> Path:
    """In which the runs of a logger's name lie beside each other."""
    return Path(logger.save_dir or trainer.default_root_dir) / str(logger.name)


def own_directories(trainer: Trainer) -> tuple[list[Path], Path]:
    """The directories of earlier runs that this one may be a part of, and in words where they are.

    They are all of its logger's name, or those of the version that the logger was given, which is another run's than
    that of any other version: the directory itself, and those with a number behind it. The version that Lightning takes
    from a job of SLURM is nobody's choice.
    """
    logger: Any = trainer.logger or NoLog(trainer.default_root_dir)
    runs, given = _runs(trainer, logger), given_version(logger)
    if given in (None, f"version_{SLURMEnvironment.job_id()}"):
        where, found = runs / "*", [*runs.glob("*")]
    elif given:
        where = runs / given
        numbered = where.parent.glob(f"{glob.escape(where.name)}_*")
        found = [where, *(each for each in numbered if each.name[len(where.name) + 1 :].isdecimal())]
    else:
        where, found = runs, [runs, *runs.glob("*")]
    # The link `latest` leads to one of the others.
    return sorted(each for each in found if each.is_dir() and not each.is_symlink()), where


def choose_directory(trainer: Trainer, checkpoint: str | Path | None = None, kind: str = "") -> Start:
    """Says to the loggers where this run lives, before they begin. A run of the command line calls it once.

    A run that continues a checkpoint of its own lives where the run lived that wrote it. Any other one has a directory
    in which there is no run, named by date, time and kind, such as ``2026-11-26_21-55-03_test``, or by the version that
    its logger was given. Where there is a run already, the kind or a number comes behind the version.

    ``latest`` with the kind behind it leads to it from then on.

    Args:
        trainer: whose loggers have written nothing yet.
        checkpoint: that the run continues, None for one that begins.
        kind: of the run, such as ``_test``, empty for training.

    Returns:
        What can be undone, if nothing comes of the run.

    Raises:
        ValueError: the directory cannot be made, so that a run ends before it computes what it could not keep.
    """
    start = Start()
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return start
    trainer.loggers = trainer.loggers or [NoLog(trainer.default_root_dir)]
    facts = (facts_beside_weights(Path(checkpoint)) or {}) if checkpoint is not None else {}
    run = None if checkpoint is None else _directory_of(checkpoint, facts, own_directories(trainer)[0])
    if run is not None:
        _continue(trainer, run, facts)
    # Other ranks are told by rank 0.
    elif trainer.is_global_zero:
        try:
            _begin(trainer, start, kind)
        except ValueError:
            start.undo()
            raise
    if trainer.is_global_zero:
        _link(trainer, start, LATEST + kind)
    return start


def _continue(trainer: Trainer, run: Path, facts: Mapping[str, Any]) -> None:
    """Has the loggers go on in the directory of a run, from the step of its checkpoint."""
    runs = _runs(trainer, trainer.logger)
    step = facts["global_step"] if isinstance(facts.get("global_step"), int) else None
    lines = read_lines(run / METRICS)
    is_validated = any(line.get("kind") == "validation" and line.get("step") == step for line in lines)
    for logger in trainer.loggers:
        if _runs(trainer, logger) == runs or given_version(logger) is None:
            name_version(logger, "" if run == runs else str(run.relative_to(runs)))
        continue_log(logger, step, is_validated=is_validated)
    rank_zero_info(f"Continues in {run}.")


def _directory_of(checkpoint: str | Path, facts: Any, directories: list[Path]) -> Path | None:
    """That of the run which wrote a checkpoint: it lies there, or the record there is the one it was written beside."""
    folders = Path(checkpoint).resolve().parents
    for each in directories:
        if (each / "checkpoints").resolve() in folders:
            return each
    for key in ("callbacks", "RunRecorder", "run"):
        facts = facts.get(key) if isinstance(facts, dict) else None
    return next((each for each in directories if facts and read_file(each / RUN).get("run") == facts), None)


def _begin(trainer: Trainer, start: Start, kind: str) -> None:
    """Takes a directory for each logger of files. Those of a run that write to the same place share one."""
    now = time.strftime("%Y-%m-%d_%H-%M-%S") + kind
    for logger in (each for each in trainer.loggers if isinstance(each, FILE_LOGGERS)):
        runs, given = _runs(trainer, logger), given_version(logger)
        # A logger may write to one folder, without name and version: the runs behind its first have folders in there.
        first, behind = now if given is None else given, f"{given}{kind}" if given else now
        names = chain(dict.fromkeys((first, behind)), (f"{behind}_{number}" for number in count(2)))
        name = next(each for each in names if start.take(runs / each, anew=given is None))
        name_version(logger, name)
        start.taken.add(Path(logger.log_dir or runs / name))
        if name != first and given is not None:
            rank_zero_info(
                f"{runs / given} holds a run already, which stays as it is. This one lives in {runs / name}."
            )


def _link(trainer: Trainer, start: Start, name: str) -> None:
    """Has the link of a name lead to the directory of this run.

    It is a link to a folder beside it, so that all of them can be moved together. A file system without links, and
    anything of that name that is none, are left alone.
    """
    logger: Any = trainer.logger
    if not isinstance(logger, FILE_LOGGERS) or not (run := given_version(logger)):
        return
    link = _runs(trainer, logger) / name
    if link.is_symlink() or not link.exists():
        start.link, start.led_to = link, os.readlink(link) if link.exists() else None
        _lead(link, run)


def _lead(link: Path, run: str) -> None:
    partial = link.with_name(f".{link.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        partial.symlink_to(run, target_is_directory=True)
        # In one step, so that somebody who looks meets the old run or the new one.
        partial.replace(link)
