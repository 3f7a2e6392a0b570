"""Which checkpoint a command takes: the newest of a run's own for ``last``, and any other that can be trusted."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from dmpo_lightning.checkpoints.contents import why_unfit
from dmpo_lightning.checkpoints.folders import newest_readable, remove_partial
from dmpo_lightning.checkpoints.safe_reading import why_unsafe

OF_LIGHTNING = ("best", "hpc")
"""Names that Lightning itself looks up among the checkpoints of the run."""


def newest_checkpoint(trainer: Trainer, module: LightningModule, *, continues: bool) -> str | None:
    """The newest usable checkpoint of all runs of that name, and in the folders of each `ModelCheckpoint`.

    Says which it is, or that there is none yet, and then returns None. Rank 0 decides for all, because other nodes may
    not see yet what it sees.

    Args:
        trainer: whose logger and callbacks say where the checkpoints are.
        module: which says what it needs of one.
        continues: whether training goes on. It needs more of a checkpoint than an evaluation.
    """
    strategy: Any = trainer.strategy
    # Lightning's own launcher starts the other ranks on this machine once rank 0 has chosen.
    if trainer.world_size == 1 or isinstance(strategy.cluster_environment, LightningEnvironment):
        return _newest_checkpoint(trainer, module, continues=continues)
    # The ranks join now. The Trainer does both again, which changes nothing for those who have joined.
    strategy.connect(module)
    strategy.setup_environment()
    first = trainer.is_global_zero
    return strategy.broadcast(_newest_checkpoint(trainer, module, continues=continues) if first else None)


def _newest_checkpoint(trainer: Trainer, module: LightningModule, *, continues: bool) -> str | None:
    folders, where = _own_folders(trainer)
    if continues:
        remove_partial(*folders)
    keys: Sequence[str] = getattr(module, "checkpoint_keys", ())
    newest = newest_readable(*folders, why_unusable=lambda path: why_unfit(path, keys=keys, continues=continues))
    rank_zero_info(f"No checkpoint in {where}: starts afresh." if newest is None else f"Continues from {newest}.")
    return None if newest is None else str(newest.absolute())


def _own_folders(trainer: Trainer) -> tuple[list[Path], str]:
    """The folders that runs of this name write their checkpoints to, and how to say which these are."""
    logger = trainer.logger
    root = Path((logger and logger.save_dir) or trainer.default_root_dir)
    # Where Lightning's `ModelCheckpoint` writes, which is below a version if there is a logger. Only there: next to
    # the versions there may be runs of other names.
    if logger is None:
        folders, where = [root / "checkpoints"], [root / "checkpoints"]
    else:
        runs = root / str(logger.name)
        # A link leads to one of the others.
        folders = sorted(each for each in runs.glob("*/checkpoints") if not each.parent.is_symlink())
        where = [runs / "*" / "checkpoints"]
    # A `ModelCheckpoint` may write anywhere.
    callbacks = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    own = [Path(callback.dirpath) for callback in callbacks if callback.dirpath]
    return [*folders, *own], " and ".join(map(str, [*where, *own]))


def is_elsewhere(path: str) -> bool:
    """Whether a checkpoint is named by an address, of the web or of a registry of models."""
    return "://" in path or path.startswith("registry")


def why_untrusted(path: str, *, weights_only: bool = False) -> str | None:
    """Why a checkpoint that is named on the command line may not be opened unless it is trusted. None if it may.

    Args:
        path: of a file or folder, a URL, or a name of Lightning's.
        weights_only: whether Lightning was told to read data alone, as it does by itself only on this machine.
    """
    trust = "if you trust who wrote it, add --trust_checkpoint"
    if path in OF_LIGHTNING:
        return None
    if is_elsewhere(path):
        return (
            None if weights_only else f"it is not on this machine, where it could be checked; download it, or {trust}."
        )
    problem = why_unsafe(Path(path))
    return None if problem is None else f"{problem}; {trust}."
