"""The blocks of a network, which are compiled, checkpointed and divided among ranks one by one."""

from typing import Any


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
