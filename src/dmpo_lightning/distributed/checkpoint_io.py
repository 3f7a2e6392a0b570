"""Checkpoint files that are complete or absent, under strategies that write one file."""

from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from dmpo_lightning.checkpoints.folders import write_file


class WholeFiles(TorchCheckpointIO):
    """Writes a file beside the old one, which it replaces when it is on the disk.

    Lightning's own writes into the temporary folder of the machine first. Where that lies on another file system, a job
    that is killed or a disk that is full leaves a part of a checkpoint in the place of the one before.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """As Lightning does it, in local files.

        Raises:
            OSError: the file cannot be written. The one before is as it was.
        """
        # A store of objects shows none before it is complete. An option is refused in Lightning's words.
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_file(checkpoint, Path(path))


def write_whole_files(strategy: Any) -> None:
    """Gives a strategy `WholeFiles` in the place of Lightning's own. A plugin of one's own stays."""
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = WholeFiles()
