"""Which checkpoint a run takes: the newest of its own for ``last``, and any other that can be trusted."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from dmpo_lightning.checkpoints.reading import newest_readable, why_unfit, why_unsafe
from dmpo_lightning.checkpoints.writing import remove_partial
from dmpo_lightning.commands.mistakes import is_elsewhere
from dmpo_lightning.modules.run_directory import own_directories


def check_trusted(path: str) -> None:
    """Raises ValueError for a checkpoint that could run code where it is opened."""
    elsewhere = "it is not on this machine, where it could be checked; download it"
    problem = elsewhere if is_elsewhere(path) else why_unsafe(Path(path))
    if problem is not None:
        raise ValueError(f"`--ckpt_path {path}`: {problem}; if you trust who wrote it, add --trust_checkpoint.")


def newest_checkpoint(trainer: Trainer, module: LightningModule, *, continues: bool) -> str | None:
    """The newest usable checkpoint of all runs of that name, and in the folders of each `ModelCheckpoint`.

    Says which it is, or that there is none yet, and then returns None. Rank 0 decides for all, because other nodes may
    not see yet what it sees (docs/decisions/027-last-checkpoint.md).

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
    # Where Lightning's `ModelCheckpoint` writes. Next to the runs there may be those of other names.
    directories, place = own_directories(trainer)
    if trainer.logger is None:
        # There own programs write, whose runs have no directories.
        directories.append(Path(trainer.default_root_dir))
    folders = [each / "checkpoints" for each in directories]
    # A `ModelCheckpoint` may write anywhere.
    callbacks = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    own = [Path(callback.dirpath) for callback in callbacks if callback.dirpath]
    if continues:
        remove_partial(*folders, *own)
    keys: Sequence[str] = getattr(module, "checkpoint_keys", ())
    newest = newest_readable(*folders, *own, why_unusable=lambda path: why_unfit(path, keys=keys, continues=continues))
    where = " and ".join(map(str, [place / "checkpoints", *own]))
    rank_zero_info(f"No checkpoint in {where}: starts afresh." if newest is None else f"Continues from {newest}.")
    return None if newest is None else str(newest.absolute())
