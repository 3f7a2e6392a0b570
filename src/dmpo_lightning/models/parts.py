"""The parts of a network that others ask for: its transformer layers, its linear layers and its head."""

from typing import Any

from torch import nn


def layers_of(network: Any) -> list[Any]:
    """The transformer layers of a model: the modules of the classes that its ``_no_split_modules`` names.

    They are compiled, checkpointed and divided among ranks one by one.

    Raises:
        ValueError: the model does not name them.
    """
    names = set(getattr(network, "_no_split_modules", None) or ())
    layers = [module for module in network.modules() if type(module).__name__ in names]
    if not layers:
        raise ValueError(f"Compiling or sharding needs a model that names its layers, got {type(network).__name__}.")
    return layers


def compile_layers(network: Any) -> None:
    """Compiles each transformer layer in place, for inputs of any length. Weights and their names stay."""
    for layer in layers_of(network):
        layer.compile(dynamic=True)


def enable_checkpointing(network: Any) -> None:
    """Has the layers recompute their activations in the backward pass (non-reentrant checkpointing).

    The method is called under the name that the installed version of transformers has for it.
    """
    enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def linear_names(model: nn.Module) -> list[str]:
    """The full names of all linear layers. Quantised layers are linear layers too."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def stacked_names(model: nn.Module) -> list[str]:
    """The full names of the weights that hold those of many experts, ``[experts out in]``."""
    return [name for name, parameter in model.named_parameters() if parameter.ndim == 3]


def head_name(model: nn.Module) -> str | None:
    """The full name of the output embedding, or None where the model names none."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return next((name for name, module in model.named_modules() if module is head), None)


def tied_head_name(model: nn.Module) -> str | None:
    """The full name of the output embedding where its weight is that of the input embedding, else None."""
    kinds = ("get_output_embeddings", "get_input_embeddings")
    head, embedding = (getattr(getattr(model, kind, lambda: None)(), "weight", None) for kind in kinds)
    return head_name(model) if head is not None and head is embedding else None
