"""Lightning's strategies with checkpoints, files or folders, that are written beside the old ones and take their place
when they are complete.
"""

import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch import strategies
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch.distributed import distributed_c10d

from dmpo_lightning.checkpoints.folders import complete_folder, partial_name

TIMEOUT = timedelta(minutes=30)


class WholeFolders:
    """Writes a checkpoint under another name first. A job that is killed while it saves loses nothing."""

    def save_checkpoint(self: Any, checkpoint: Any, filepath: Any, storage_options: Any = None) -> None:
        """As Lightning's strategy does it; all ranks call it."""
        target = Path(self.broadcast(str(filepath)))
        if self.is_global_zero:
            shutil.rmtree(partial_name(target), ignore_errors=True)  # of a job that was killed
        self.barrier()
        super().save_checkpoint(checkpoint, partial_name(target), storage_options)  # type: ignore[misc]
        self.barrier()
        if self.is_global_zero:
            complete_folder(partial_name(target), target)
        self.barrier()


class DDPStrategy(WholeFolders, strategies.DDPStrategy):
    """Lightning's, whose files it would copy from the node's own temporary folder over the old ones."""


class FSDP2Strategy(WholeFolders, ModelParallelStrategy):
    """FSDP2 over all ranks of all nodes: weights, gradients and optimizer states divided block by block.

    Args:
        save_distributed_checkpoint: each rank writes its part into a folder; False gathers everything into one file.
        process_group_backend: None takes nccl on GPUs, gloo elsewhere.
        timeout: of one collective operation, after which ranks end whose partner died without a word.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta = TIMEOUT,
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        """The data-parallel size is the number of ranks, which is known only now."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


class FSDP1Strategy(WholeFolders, FSDPStrategy):
    """FSDP1 with checkpoint folders, one part per rank; see Lightning's `FSDPStrategy`. `PolicyModule` wraps the
    blocks, so ``auto_wrap_policy`` stays unset.
    """

    def __init__(
        self,
        sharding_strategy: str = "FULL_SHARD",
        state_dict_type: str = "sharded",
        cpu_offload: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta = TIMEOUT,
    ) -> None:
        super().__init__(
            sharding_strategy=sharding_strategy,  # type: ignore[arg-type]
            state_dict_type=state_dict_type,  # type: ignore[arg-type]
            cpu_offload=cpu_offload,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )


class ZeROStrategy(WholeFolders, DeepSpeedStrategy):
    """DeepSpeed's ZeRO; see Lightning's `DeepSpeedStrategy` for the arguments. ``timeout`` holds for the process groups
    too that DeepSpeed adds, to which it gives torch's own of half an hour. Of accumulated batches the gradients are
    averaged; under Lightning's strategy they are divided by their number twice, by Lightning and by DeepSpeed.
    """

    def init_deepspeed(self) -> None:
        """As Lightning does it."""
        super().init_deepspeed()
        if self._timeout is not None:
            for group in list(distributed_c10d._world.pg_map):
                distributed_c10d._set_pg_timeout(self._timeout, group)

    def backward(self, closure_loss: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        """As Lightning does it."""
        assert self.lightning_module is not None
        if self.lightning_module.automatic_optimization:  # the loss has been divided
            kwargs["scale_wrt_gas"] = False
        return super().backward(closure_loss, optimizer, *args, **kwargs)
