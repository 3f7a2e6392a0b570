"""Builds a model as it is trained: loaded, quantised, adapted, and with its activations recomputed where asked for."""

from typing import Any

from torch import nn

from dmpo_lightning.models.loading import load_model
from dmpo_lightning.models.lora import LoRA


def build_network(
    model: str | nn.Module, *, adapter: LoRA | None, gradient_checkpointing: bool = False, **loading: Any
) -> nn.Module:
    """Loads ``model`` if it is a name, and adapts it if there is an ``adapter``.

    ``loading`` holds further options of `load_model`.

    Raises:
        ValueError: quantisation without an adapter to train, an adapter for a model that already carries one, or what
            `load_model` raises.
    """
    network = load_model(model, **loading) if isinstance(model, str) else model
    has_adapter = hasattr(network, "peft_config")
    if adapter is not None and has_adapter:
        raise ValueError(f"{model!r} already carries an adapter, which will be trained; leave `adapter` out.")
    if loading.get("quantization") is not None and adapter is None and not has_adapter:
        raise ValueError("`quantization` freezes the model, which leaves nothing to train; set `adapter` as well.")
    if gradient_checkpointing:
        enable_checkpointing(network)
    if adapter is None:
        return network
    return adapter.apply(network, model if isinstance(model, str) else None, seed=loading.get("seed", 0))


def blocks_of(network: Any) -> list[Any]:
    """The transformer blocks of a model: the modules of the classes that its ``_no_split_modules`` names.

    Raises:
        ValueError: the model does not name its blocks.
    """
    names = set(getattr(network, "_no_split_modules", None) or ())
    blocks = [module for module in network.modules() if type(module).__name__ in names]
    if not blocks:
        raise ValueError(f"Compiling or sharding needs a model that names its blocks, got {type(network).__name__}.")
    return blocks


def compile_blocks(network: Any) -> None:
    """Compiles each block in place, for inputs of any length. Weights, and their names, stay as they are."""
    for block in blocks_of(network):
        block.compile(dynamic=True)


def enable_checkpointing(network: Any) -> None:
    """Has the blocks recompute their activations in the backward pass (non-reentrant checkpointing).

    The method is called under the name that the installed version of transformers has for it.
    """
    current = hasattr(network, "activation_checkpointing_enable")
    enable = network.activation_checkpointing_enable if current else network.gradient_checkpointing_enable
    enable({"use_reentrant": False})
