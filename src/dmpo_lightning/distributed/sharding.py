"""Weights that are divided among ranks, by FSDP1, FSDP2 or DeepSpeed's ZeRO-3. All ranks call these functions alike."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import wrap
from torch.distributed.tensor import DTensor

from dmpo_lightning.models.parts import layers_of


def shard_fsdp2(model: nn.Module, mesh: Any, *, half_precision: bool = False) -> None:
    """Divides a model under FSDP2. Each block is a unit and the rest is another.

    ``half_precision`` gathers and computes in bfloat16 and reduces gradients in float32.
    """
    options: dict[str, Any] = {"mesh": mesh}
    if half_precision:
        # The inputs of a unit are left alone, so that rotary tables stay in float32.
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    # From the inside out: `fully_shard` takes for a unit what no unit inside of it has taken yet.
    for block in layers_of(model):
        fully_shard(block, **options)
    fully_shard(model, **options)


def wrap_fsdp1(model: nn.Module) -> nn.Module:
    """Divides a model under FSDP1 and returns what to call instead. Each block is a unit and the rest is another.

    Called in ``configure_model``, where the options of Lightning's strategy are active.
    """
    blocks = set(layers_of(model))
    # A list, because the tree of modules changes on the way.
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child in blocks:
                setattr(parent, name, wrap(child))
    return wrap(model)


def plain_name(name: str) -> str:
    """A parameter's name without what FSDP1 puts into it."""
    return name.replace("_fsdp_wrapped_module.", "")


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copies the weights of one model to another of equal architecture, which is divided in the same way.

    Each rank copies its part.
    """
    _reshard(source)
    _reshard(target)
    # Both models are divided alike, so that parts correspond and nothing need be gathered.
    for own, other in zip(source.parameters(), target.parameters(), strict=True):
        write_part(other, own_part(own))


@torch.no_grad()
def copy_within(model: nn.Module, names: Mapping[str, str]) -> None:
    """Copies weights of a model to others of the same shapes in it. ``names`` maps where from to where to."""
    _reshard(model)
    weights = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    pairs = {id(weights[own]): (weights[own], weights[other]) for own, other in names.items()}
    if not _fsdp1_units(model):
        for own, other in pairs.values():
            write_part(other, own_part(own))
    # FSDP1 divides a unit as a whole, so that this rank's parts of two weights do not correspond.
    for unit in _fsdp1_units(model):
        with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=True):
            for parameter in _own_parameters(unit):
                if id(parameter) in pairs:
                    own, other = pairs[id(parameter)]
                    other.copy_(own)


@torch.no_grad()
def whole_weights(model: nn.Module, *, names: Collection[str] | None = None, keep: bool = True) -> dict[str, Tensor]:
    """Copies of the whole weights on the CPU, by `plain_name`: those that are trained, or those of these ``names``.

    Every rank must call it. Those that do not ``keep`` the weights get an empty dictionary.
    """
    _reshard(model)
    # By identity, because within a unit of FSDP1 a parameter has another name than within the model.
    named = [(plain_name(name), parameter) for name, parameter in model.named_parameters()]
    wanted = {id(p): name for name, p in named if (p.requires_grad if names is None else name in names)}
    weights: dict[str, Tensor] = {}

    def collect(parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            if id(parameter) in wanted:
                # One at a time, so that no device ever has to hold all weights.
                with _gathered_zero3([parameter]):
                    whole: Any = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
                    if keep:
                        weights[wanted[id(parameter)]] = whole.detach().cpu().clone()

    if not _fsdp1_units(model):
        collect(model.parameters())
    for unit in _fsdp1_units(model):
        with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False):
            collect(_own_parameters(unit))
    return {name: weights[name] for name in wanted.values() if name in weights}


@torch.no_grad()
def gradient_norm(model: nn.Module) -> Tensor:
    """The 2-norm of all gradients as one vector, the same on each rank. It is 0 where there are none.

    All ranks call it, after the gradients were averaged over them. Not for DeepSpeed, which hides gradients and knows
    their norm behind its step (`norm_of_step`).
    """
    if isinstance(model, FullyShardedDataParallel):
        # Its only way to a norm over all ranks. Clipped to infinity, gradients are multiplied by exactly 1.
        return model.clip_grad_norm_(math.inf)
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    # Under FSDP2 the parts of all ranks are added up here, in one reduction.
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Inside, every rank holds all weights and forwards need no other rank (FSDP2 and ZeRO-3).

    Raises:
        ValueError: under FSDP1, which gathers in its own forward only, or a torch without FSDP2's switch.
    """
    check_gatherable(model)
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    with ExitStack() as stack:
        stack.enter_context(_gathered_zero3(model.parameters()))
        stack.enter_context(_kept_zero3(model.parameters()))
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        try:
            yield
        finally:
            for unit in units:
                # The default of `fully_shard`: the outermost unit stays gathered behind its forward.
                unit.set_reshard_after_forward(unit is not model, recurse=False)
                unit.reshard()


def check_gatherable(model: nn.Module) -> None:
    """Raises ValueError where `gathered` cannot work."""
    if _fsdp1_units(model):
        raise ValueError(
            "`gather_for_generation` does not work under FSDP1, which gathers weights in its own forward only; use "
            "FSDP2, or FSDP1 with sharding_strategy SHARD_GRAD_OP, which keeps them between forwards."
        )


def own_part(parameter: Any) -> Any:
    """What this rank holds of a parameter that ZeRO-3 divided. Any other parameter is returned as it is."""
    return getattr(parameter, "ds_tensor", parameter)


def write_part(parameter: Any, value: Tensor) -> None:
    """Writes `own_part`. ZeRO-3 keeps small weights gathered, so these are divided again to be gathered anew."""
    own_part(parameter).copy_(value)
    if hasattr(parameter, "ds_tensor") and parameter.ds_status.name == "AVAILABLE":
        parameter.partition(has_been_updated=False)


def is_zero3(model: nn.Module) -> bool:
    """Whether ZeRO-3 has divided the weights."""
    return bool(_divided_by_zero3(model.parameters()))


def _reshard(model: nn.Module) -> None:
    """Divides what a forward has left gathered, as FSDP2 leaves the outermost unit: writes to it would be lost."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _divided_by_zero3(parameters: Iterable[nn.Parameter]) -> list[Any]:
    return [parameter for parameter in parameters if hasattr(parameter, "ds_tensor")]


def _gathered_zero3(parameters: Iterable[nn.Parameter]) -> Any:
    divided = _divided_by_zero3(parameters)
    if not divided:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(divided)


@contextmanager
def _kept_zero3(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, ZeRO-3 does not divide weights again behind a layer that has used them."""
    released = [parameter for parameter in _divided_by_zero3(parameters) if not parameter.is_external_param]
    for parameter in released:
        # DeepSpeed releases a layer's weights behind it unless others use them too, which this mark says.
        parameter.is_external_param = True
    try:
        yield
    finally:
        for parameter in released:
            parameter.is_external_param = False


def _fsdp1_units(model: nn.Module) -> list[FullyShardedDataParallel]:
    return [module for module in model.modules() if isinstance(module, FullyShardedDataParallel)]


def _own_parameters(unit: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of an FSDP1 unit that belong to no unit inside it."""
    yield from unit.parameters(recurse=False)
    for child in unit.children():
        if not isinstance(child, FullyShardedDataParallel):
            yield from _own_parameters(child)
