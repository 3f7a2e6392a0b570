"""Checkpoints on the disk: how they appear when they are complete, and which is the newest that can be read.

Imports no torch.
"""

import json
import logging
import os
import shutil
import zipfile
from pathlib import Path

logger = logging.getLogger(__name__)

SIZES = "sizes.json"
"""Lists the files of a complete folder with their sizes."""


def partial_name(target: Path) -> Path:
    """Where a checkpoint is written until it is complete."""
    return target.with_name(f"{target.name}.partial")


def complete_folder(partial: Path, target: Path) -> None:
    """Puts a written checkpoint in its place. A folder gets a list of what it holds."""
    if partial.is_dir():
        sizes = {str(path.relative_to(partial)): path.stat().st_size for path in _files(partial)}
        (partial / SIZES).write_text(json.dumps(sizes))
    _flush(partial)
    # Renaming replaces neither a link (`save_last: link`) nor a file by a folder.
    if target.is_symlink() or (target.is_file() and partial.is_dir()):
        target.unlink()
    old = target.with_name(f"{target.name}.old")
    # A folder cannot be replaced at once. For a moment only `old` is there, where `newest_readable` looks too.
    if target.is_dir():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    partial.replace(target)
    shutil.rmtree(old, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Has the machine write to the disk what it still holds in memory."""
    for path in _files(folder) if folder.is_dir() else [folder]:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def newest_readable(*folders: Path) -> Path | None:
    """The newest ``*.ckpt`` below some folders that can be read, or None. Those that cannot be read are logged.

    Looks at ``*.ckpt.old`` too, which is left where a job was killed while a folder was being replaced.
    """
    candidates = {path for folder in folders for name in ("*.ckpt", "*.ckpt.old") for path in folder.rglob(name)}
    # A link may lead to what is no longer there, and has no time to sort by.
    for path in sorted(filter(Path.exists, candidates), key=lambda path: path.stat().st_mtime_ns, reverse=True):
        problem = why_unreadable(path)
        if problem is None:
            return path
        logger.warning("Checkpoint %s cannot be read (%s); trying the one before.", path, problem)
    return None


def why_unreadable(path: Path) -> str | None:
    """What is wrong with a checkpoint, a file of torch or the folder of a sharded one. None if nothing is."""
    return _folder_problem(path) if path.is_dir() else _file_problem(path)


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
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
            complete = any(name.endswith("/data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError) as error:
        return str(error)
    if broken is not None:
        return f"{broken} is damaged"
    return None if complete else "it is no checkpoint"
