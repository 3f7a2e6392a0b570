"""Checkpoints on the disk are complete or absent: they are written under another name, and then renamed."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

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
        complete(partial, target)
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
    for path in (path for folder in folders for path in folder.glob(f"*.ckpt{PARTIAL}*")):
        logger.warning("Removed %s, a checkpoint that was never completed.", path)
        remove(path)


def remove(path: Path) -> None:
    """Removes a file or a folder, where there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def complete(partial: Path, target: Path) -> None:
    """Puts a written checkpoint, a file or a folder, in its place."""
    # The machine writes to the disk what it still holds in memory, before the one before is given up.
    for path in partial.rglob("*") if partial.is_dir() else [partial]:
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    # Renaming replaces neither a link (`save_last: link`) nor a file by a folder.
    if partial.is_dir() and (target.is_symlink() or target.is_file()):
        target.unlink()
    old = target.with_name(f"{target.name}.old")
    # A folder cannot be replaced at once. For a moment only `old` is there, where `newest_readable` looks too.
    if target.is_dir():
        remove(old)
        target.rename(old)
    partial.replace(target)
    remove(old)
