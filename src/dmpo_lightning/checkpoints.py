"""Finding the checkpoint that a restarted job continues from. Imports no torch."""

import logging
import zipfile
from pathlib import Path

logger = logging.getLogger(__name__)


def newest_readable(root: Path) -> Path | None:
    """The newest ``*.ckpt`` below a folder that can be read; those that cannot are logged. None if there is none."""
    found = sorted(root.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in found:
        problem = why_unreadable(path)
        if problem is None:
            return path
        logger.warning("Checkpoint %s cannot be read (%s); trying the one before.", path, problem)
    return None


def why_unreadable(path: Path) -> str | None:
    """What is wrong with a checkpoint, a file of torch or a folder of a sharded one; None if nothing is."""
    if path.is_dir():
        return None if (path / ".metadata").is_file() else "the folder has no .metadata"
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
            complete = any(name.endswith("/data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError) as error:
        return str(error)
    if broken is not None:
        return f"{broken} is damaged"
    return None if complete else "it is no checkpoint"
