"""Strategies as the tests use them: on CPUs, in gloo process groups. FSDP1 and DeepSpeed refuse CPUs; the
subclasses here pass those guards and change nothing else.
"""

from datetime import timedelta

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ParallelStrategy

from dmpo_lightning.distributed.strategies import FSDP1Strategy, FSDP2Strategy, ZeROStrategy


class FSDP1OnCPU(FSDP1Strategy):
    """With ``device_id`` of the CPU, which has no index."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.kwargs["device_id"] = torch.device("cpu")

    def model_sharded_context(self):
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.wrap import enable_wrap

        return enable_wrap(
            wrapper_cls=FullyShardedDataParallel,
            cpu_offload=self.cpu_offload,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            **self.kwargs,
        )


class DeepSpeedOnCPU:
    """Its device has an index, which DeepSpeed wants to hear. Stage 3 divides small weights too."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)

    def setup_environment(self) -> None:
        ParallelStrategy.setup_environment(self)
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else compiled at first use, for a minute
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()


class ZeROOnCPU(DeepSpeedOnCPU, ZeROStrategy):
    pass


class LightningsZeROOnCPU(DeepSpeedOnCPU, DeepSpeedStrategy):
    pass


def strategy(kind: str, *, timeout: float = 60):
    options = {"process_group_backend": "gloo", "timeout": timedelta(seconds=timeout)}
    if kind == "auto":
        return kind
    if kind == "ddp":
        return DDPStrategy(**options)
    if kind in ("fsdp2", "fsdp2_full"):
        return FSDP2Strategy(save_distributed_checkpoint=kind == "fsdp2", **options)
    if kind == "fsdp1":
        return FSDP1OnCPU(**options)
    if kind == "zero2 of lightning":
        return LightningsZeROOnCPU(stage=2, **options)
    return ZeROOnCPU(stage=int(kind[-1]), **options)
