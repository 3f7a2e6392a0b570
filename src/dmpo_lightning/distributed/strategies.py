"""Lightning's strategies that divide weights or states, and checkpoints that are complete or absent under all of them.

A file or folder is written beside the old one, and takes its place when it is complete.
"""

from functools import partial
from pathlib import Path
from typing import Any, Literal

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from dmpo_lightning.checkpoints.reading import UnfitCheckpointError, checked, facts_beside_weights, why_damaged
from dmpo_lightning.checkpoints.writing import complete, partial_name, remove, write_file
from dmpo_lightning.distributed.internals import divide_data_among_all_ranks, set_timeout_of_all_groups
from dmpo_lightning.distributed.ranks import gather_ranks


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

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        """As Lightning does it, of a local file once all of it was found to be as it was written.

        Raises:
            UnfitCheckpointError: it is damaged, or no checkpoint.
        """
        load = partial(super().load_checkpoint, path, *args, **options)
        try:
            return checked(path, load) if Path(path).is_file() else load()
        except ValueError as error:
            raise UnfitCheckpointError(f"Checkpoint {str(path)!r}: {error}; take the one before it.") from error


def write_whole_files(strategy: Any) -> None:
    """Gives a strategy `WholeFiles` in the place of Lightning's own. A plugin of one's own stays."""
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = WholeFiles()


class WholeFolders:
    """Writes a checkpoint under another name first, so that a job that is killed while it saves loses nothing."""

    def save_checkpoint(self: Any, checkpoint: Any, filepath: Any, storage_options: Any = None) -> None:
        """As Lightning's strategy does it. All ranks call it."""
        target = Path(self.broadcast(str(filepath)))
        if self.is_global_zero:
            # What a job that was killed has left, a folder or a file, which must be gone before any rank writes.
            remove(partial_name(target))
        self.barrier()
        super().save_checkpoint(checkpoint, partial_name(target), storage_options)  # type: ignore[misc]
        self.barrier()
        if self.is_global_zero:
            # All parts are written by now, and behind the next barrier every rank finds the new name.
            complete(partial_name(target), target)
        self.barrier()

    def load_checkpoint(self: Any, checkpoint_path: Any, *args: Any, **options: Any) -> Any:
        """As Lightning's strategy does it. All ranks call it.

        Raises:
            UnfitCheckpointError: it is damaged, or one of another model or adapter. torch and DeepSpeed would raise any
                error in the midst of reading it.
        """
        # The ranks of a machine share its files, and all hear what one of them has found.
        own = why_damaged(Path(checkpoint_path), part=self.local_rank, parts=self.num_processes)
        for problem in filter(None, gather_ranks(own)):
            raise UnfitCheckpointError(f"Checkpoint {str(checkpoint_path)!r}: {problem}; take the one before it.")
        check_fit = getattr(self.lightning_module, "check_fit", None)
        # Other strategies read the weights once the module has looked at them.
        if check_fit is not None and self.restore_checkpoint_after_setup:
            check_fit(facts_beside_weights(Path(checkpoint_path)) or {})
        return super().load_checkpoint(checkpoint_path, *args, **options)  # type: ignore[misc]


class FSDP2Strategy(WholeFolders, ModelParallelStrategy):
    """FSDP2 over all ranks of all nodes: weights, gradients and optimizer states divided block by block.

    Args:
        options: ``save_distributed_checkpoint``, ``process_group_backend`` and ``timeout`` of Lightning's
            `ModelParallelStrategy`.

    Example:
        >>> from dmpo_lightning import FSDP2Strategy
        >>> strategy = FSDP2Strategy(save_distributed_checkpoint=True)
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(tensor_parallel_size=1, **options)

    def setup_environment(self) -> None:
        """As Lightning does it. The data-parallel size is the number of ranks, which is known only now."""
        # Lightning's own default divides over the machines, and leaves the ranks of each to tensor parallelism.
        divide_data_among_all_ranks(self)
        super().setup_environment()


class FSDP1Strategy(WholeFolders, FSDPStrategy):
    """FSDP1 with checkpoint folders of one part per rank. See Lightning's `FSDPStrategy` for the arguments.

    `PolicyModule` wraps the blocks, so that no ``auto_wrap_policy`` is needed.

    Example:
        >>> from dmpo_lightning import FSDP1Strategy
        >>> strategy = FSDP1Strategy(sharding_strategy="FULL_SHARD", state_dict_type="full")
    """

    def __init__(self, *, state_dict_type: Literal["full", "sharded"] = "sharded", **options: Any) -> None:
        super().__init__(state_dict_type=state_dict_type, **options)


class ZeROStrategy(WholeFolders, DeepSpeedStrategy):
    """DeepSpeed's ZeRO. See Lightning's `DeepSpeedStrategy` for the arguments.

    ``timeout`` holds for the process groups too that DeepSpeed adds. The gradients of accumulated batches are averaged.
    Under Lightning's own strategy they are divided by the number of batches twice, by Lightning and by DeepSpeed.

    Example:
        >>> from dmpo_lightning import ZeROStrategy
        >>> strategy = ZeROStrategy(stage=2, offload_optimizer=True)
    """

    def init_deepspeed(self) -> None:
        """As Lightning does it, and in time."""
        super().init_deepspeed()
        set_timeout_of_all_groups(self)

    def backward(self, closure_loss: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        """As Lightning does it. DeepSpeed is told that the loss has been divided already."""
        assert self.lightning_module is not None
        if self.lightning_module.automatic_optimization:
            # Adam and clipping hide the second division, plain gradient descent showed it
            # (docs/decisions/025-zero-accumulation.md).
            kwargs["scale_wrt_gas"] = False
        return super().backward(closure_loss, optimizer, *args, **kwargs)


def divides_weights(strategy: Any) -> bool:
    """Whether a forward needs the other ranks: FSDP1, FSDP2 and DeepSpeed's stage 3."""
    is_zero_3 = isinstance(strategy, DeepSpeedStrategy) and strategy.zero_stage_3
    return is_zero_3 or isinstance(strategy, FSDPStrategy | ModelParallelStrategy)
