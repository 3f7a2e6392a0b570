"""What a Lightning strategy divides among the ranks."""

import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sharding:
    """Over how many ranks weights, gradients and optimizer states are divided. 1 keeps a copy on each.

    Args:
        name: of the strategy, for people.
        weights: ranks that share one copy of the weights.
        gradients: ranks that share one copy of the gradients.
        optimizer: ranks that share one copy of the optimizer states.
        bucketed: whether gradients are reduced through buckets, which are a second copy of them.
        master_weights: whether half-precision weights have a float32 copy beside the optimizer states (DeepSpeed).
        offloads_optimizer: whether the optimizer states lie in the memory of the machine.
    """

    name: str
    weights: int = 1
    gradients: int = 1
    optimizer: int = 1
    bucketed: bool = False
    master_weights: bool = False
    offloads_optimizer: bool = False

    @property
    def divides(self) -> bool:
        """Whether the strategy is one that divides weights, on however many ranks. Quantised ones it must not."""
        return self.name.startswith(("fsdp", "deepspeed stage 3"))


def sharding_of(strategy: str | dict[str, Any], *, devices: int, nodes: int = 1) -> Sharding:
    """The sharding rules of a Trainer's ``strategy``, which is a name or a class path with arguments.

    Raises:
        ValueError: a strategy whose rules are not known.
    """
    name, options = (strategy, {}) if isinstance(strategy, str) else (strategy["class_path"], strategy.get("init_args"))
    ranks, key, options = devices * nodes, name.rpartition(".")[2].lower(), options or {}
    offloads = "offload" in key or bool(options.get("cpu_offload") or options.get("offload_optimizer"))
    if "deepspeed" in key or "zero" in key:
        stated = re.search(r"stage_(\d)", key)
        # 2 is the default of Lightning's DeepSpeedStrategy.
        stage = int(stated[1] if stated else options.get("stage", 2))
        weights, gradients, states = (ranks if stage >= least else 1 for least in (3, 2, 1))
        name = f"deepspeed stage {stage}"
        return Sharding(name, weights, gradients, states, master_weights=True, offloads_optimizer=offloads)
    if "modelparallel" in key or "fsdp2" in key:
        # Lightning's own divides over the machines, and leaves the ranks of each to tensor parallelism.
        size = ranks if "fsdp2" in key else options.get("data_parallel_size", "auto")
        shards = nodes if size == "auto" else int(size)
        return Sharding("fsdp2", shards, shards, shards)
    if "fsdp" in key:
        plan = str(options.get("sharding_strategy", "FULL_SHARD")).rpartition(".")[2].upper()
        if plan == "NO_SHARD" or ranks == 1:
            return Sharding("fsdp (no shard)")
        # Hybrid plans divide within a machine and repeat over machines.
        shards = devices if plan.startswith(("HYBRID", "_HYBRID")) else ranks
        # SHARD_GRAD_OP keeps whole weights between forward and backward.
        weights = 1 if plan == "SHARD_GRAD_OP" else shards
        return Sharding(f"fsdp ({plan.lower()})", weights, shards, shards, offloads_optimizer=offloads)
    if "ddp" in key:
        # With views the gradients lie in the buckets themselves.
        return Sharding("ddp", bucketed=ranks > 1 and not options.get("gradient_as_bucket_view"))
    if key in ("auto", "singledevicestrategy"):
        return Sharding("ddp", bucketed=True) if ranks > 1 else Sharding("single device")
    raise ValueError(f"`plan` knows the strategies auto, ddp, fsdp, fsdp2 and deepspeed (stage 1 to 3), got {name!r}.")
