"""A policy divided among ranks, as the strategy of a Trainer asks for it."""

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from dmpo_lightning.distributed.sharding import shard_fsdp2, wrap_fsdp1
from dmpo_lightning.models.backbone import Backbone
from dmpo_lightning.modules.averages import refuse_divided
from dmpo_lightning.policy import Policy


def divide(policy: Policy, backbone: Backbone, trainer: Trainer) -> None:
    """Divides each block, and the rest, among the ranks under FSDP1 and FSDP2. The reference is divided alike.

    Called in ``configure_model`` of a strategy that divides weights.

    Raises:
        ValueError: quantised weights, or weights that are to be averaged.
    """
    strategy = trainer.strategy
    refuse_divided(trainer)
    if backbone.quantization is not None:
        raise ValueError(
            f"`quantization` needs whole layers on each rank, but {type(strategy).__name__} divides them; use DDP "
            "(`--config strategies/ddp.yaml`), or leave it out."
        )
    if isinstance(strategy, ModelParallelStrategy):
        mesh, half = strategy.device_mesh["data_parallel"], trainer.precision == "bf16-mixed"
        for network in policy.networks:
            shard_fsdp2(network, mesh, half_precision=half)
    elif isinstance(strategy, FSDPStrategy):
        # FSDP1 flattens a unit into one tensor, which has one dtype.
        strategy.precision_plugin.convert_module(policy)
        # Under FSDP1 Lightning moves no module to its device: the units move themselves, and what is outside of them,
        # such as the banned tokens, stays behind.
        policy.to_device_of_units(strategy.root_device)
        policy.model = wrap_fsdp1(policy.model)
        if policy.reference.model is not None:
            policy.reference.model = wrap_fsdp1(policy.reference.model)
