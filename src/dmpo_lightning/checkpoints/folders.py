"""Checkpoints on the disk: how they appear when they are complete, and which is the newest that can be read."""

import json
import logging
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

SIZES = "sizes.json"
"""Lists the files of a complete folder with their sizes."""
SUFFIXES = (".ckpt", ".ckpt.old")
"""Of checkpoints. The second is left where a job was killed while a folder was being replaced."""
PARTIAL = ".partial"


def partial_name(target: Path) -> Path:
    """Where a checkpoint is written until it is complete."""
    return target.with_name(f"{target.name}{PARTIAL}")


def write_file(checkpoint: dict[str, Any], target: Path) -> None:
    """Writes a checkpoint of one file, beside the one before and then in its place.

    Raises:
        OSError: the file cannot be written. The one before is as it was.
    """
    import torch

    partial = partial_name(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save(checkpoint, file)
        complete_folder(partial, target)
    # torch turns some errors of the disk into its own.
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else (error.__cause__ or error.__context__ or error)
        raise OSError(
            f"Checkpoint {str(target)!r} could not be written ({cause}); the one before, if there was any, is as it "
            "was. Make room on the disk or say where there is some (`dirpath` of ModelCheckpoint), and continue."
        ) from error
    finally:
        # Once it has taken its place it is no longer there.
        partial.unlink(missing_ok=True)


def remove_partial(*folders: Path) -> None:
    """Removes what jobs that were killed have left half-written directly in some folders.

    Called before a run writes there. A job that is writing there at this moment would lose its checkpoint.
    """
    for path in (path for folder in folders for path in _entries(folder) if f".ckpt{PARTIAL}" in path.name):
        logger.warning("Removed %s, a checkpoint that was never completed.", path)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def complete_folder(partial: Path, target: Path) -> None:
    """Puts a written checkpoint in its place. A folder gets a list of what it holds."""
    if partial.is_dir():
        sizes = {str(path.relative_to(partial)): path.stat().st_size for path in _files(partial)}
        (partial / SIZES).write_text(json.dumps(sizes))
    _flush(partial)
    # Renaming replaces neither a link (`save_last: link`) nor a file by a folder.
    if partial.is_dir() and (target.is_symlink() or target.is_file()):
        target.unlink()
    old = target.with_name(f"{target.name}.old")
    # A folder cannot be replaced at once. For a moment only `old` is there, where `newest_readable` looks too.
    if target.is_dir():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    partial.replace(target)
    _flush_names(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Has the machine write to the disk what it still holds in memory."""
    for path in _files(folder) if folder.is_dir() else [folder]:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _flush_names(folder: Path) -> None:
    """Has the machine write to the disk which names a folder holds, where it can be told to."""
    if os.name == "posix":
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def newest_readable(*folders: Path, why_unusable: Callable[[Path], str | None] = lambda path: None) -> Path | None:
    """The newest ``*.ckpt`` below some folders that can be read and used, or None. Those passed over are logged.

    Args:
        folders: that are searched, with all folders in them.
        why_unusable: what else is wrong with a checkpoint that can be read, None if nothing is.
    """
    candidates = {path: age for folder in folders for path in _checkpoints_below(folder) if (age := _written(path))}
    for path in sorted(candidates, key=lambda path: (candidates[path], str(path)), reverse=True):
        problem, verb = why_unreadable(path), "read"
        if problem is None:
            problem, verb = why_unusable(path), "used"
        if problem is None:
            return path
        logger.warning("Checkpoint %s cannot be %s (%s); trying the one before.", path, verb, problem)
    return None


def _checkpoints_below(folder: Path) -> Iterator[Path]:
    # Passes over folders that vanish meanwhile, as `rglob` does not.
    for parent, folders, files in os.walk(folder):
        yield from (Path(parent, name) for name in (*folders, *files) if name.endswith(SUFFIXES))


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _written(path: Path) -> int:
    """When a checkpoint was written. 0 where there is none (any more), to which a link may lead too."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def why_unreadable(path: Path) -> str | None:
    """What is wrong with a checkpoint, a file of torch or the folder of a sharded one. None if nothing is."""
    try:
        return _folder_problem(path) if path.is_dir() else _file_problem(path)
    # A running job may replace or remove it at any moment.
    except OSError as error:
        return str(error)


def _folder_problem(folder: Path) -> str | None:
    if (folder / SIZES).is_file():
        try:
            sizes = json.loads((folder / SIZES).read_text())
        except ValueError:
            return f"{SIZES} is damaged"
        for name, size in sizes.items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != size:
                return f"{name} is truncated or missing"
        return None
    # Lightning's own strategies leave no list, so a folder is judged by what is written last. Here it is DeepSpeed's.
    if (folder / "latest").is_file():
        return None
    if not (folder / ".metadata").is_file():
        return "the folder has no .metadata"
    # Lightning writes this one behind the parts of FSDP.
    return _file_problem(folder / "meta.pt")


def _file_problem(path: Path) -> str | None:
    # Opening a pipe would wait for somebody who writes into it.
    if path.exists() and not path.is_file():
        return "it is neither a file nor a folder"
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
            complete = any(name.endswith("/data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError) as error:
        return str(error)
    if broken is not None:
        return f"{broken} is damaged"
    return None if complete else "it is no checkpoint"
