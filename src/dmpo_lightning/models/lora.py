"""Low-rank adapters (LoRA) through PEFT, on the layers of the blocks and never by accident on the head."""

import re
import warnings
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dmpo_lightning.models.families import family_of_model

if TYPE_CHECKING:
    from peft import PeftModel


class LoRA:
    """How to adapt a model with low-rank adapters (LoRA, arXiv 2106.09685).

    Args:
        r: the rank.
        alpha: the scale, which is applied as alpha / r.
        dropout: the dropout on the adapters' input, in training only.
        targets: full names, or last parts of names, of the modules to adapt. The head is adapted only where its full
            name is given. None takes all linear layers of the blocks, for which the model must be of a known family.

    Raises:
        ValueError: the rank is below 1, the dropout is outside [0, 1), or ``targets`` is empty. When applied: a target
            matches no linear layer.
    """

    def __init__(
        self, *, r: int = 128, alpha: int = 64, dropout: float = 0.05, targets: list[str] | None = None
    ) -> None:
        if r < 1:
            raise ValueError(f"`r` must be at least 1, got {r}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"`dropout` must be in [0, 1), got {dropout}.")
        if targets is not None and not targets:
            raise ValueError("`targets` must name at least one module, got none; leave it out for all of the blocks.")
        self.r, self.alpha, self.dropout, self.targets = r, alpha, dropout, targets

    def apply(self, model: nn.Module, source: str | None = None, *, seed: int = 0) -> "PeftModel":
        """Gives the model fresh adapters that are drawn from ``seed``, and freezes its own weights.

        ``source`` is where the model came from. Saved adapters name it as their base.
        """
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=self.r, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=self.target_names(model)
        )
        # All ranks draw the same adapter, and nobody else's draws move (docs/decisions/009-fresh-adapters.md).
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapted = get_peft_model(model, config)
        if source is not None:
            adapted.peft_config["default"].base_model_name_or_path = source
        return adapted  # type: ignore[return-value,unused-ignore]

    def target_names(self, model: nn.Module) -> list[str]:
        """Full names of the linear layers of ``model`` that `apply` adapts.

        Weights are not looked at, so a model on the meta device can be asked too.

        Raises:
            ValueError: a target that matches no linear layer, or a head that is the embedding too, or no targets for a
                model of no known family.
        """
        if self.targets is None:
            return block_linear_names(model)
        names, head = linear_names(model), head_name(model)
        matched = {target: matching_names(target, names, head=head) for target in self.targets}
        for target, layers in matched.items():
            if not layers:
                kinds = sorted({name.rpartition(".")[2] for name in names})
                raise ValueError(
                    f"LoRA target {target!r} matches no linear layer of {type(model).__name__}, which has "
                    f"{', '.join(kinds)}; leave `targets` out to adapt all linear layers of the blocks."
                )
        wanted = {name for layers in matched.values() for name in layers}
        check_adapted(model, tied_head_name(model), wanted)
        return [name for name in names if name in wanted]


def check_adapted(model: nn.Module, tied_head: str | None, adapted: Collection[str]) -> None:
    """Raises ValueError where a head that is the embedding too is ``adapted``: merging would change both."""
    if tied_head in adapted:
        raise ValueError(
            f"LoRA cannot adapt {tied_head!r} of {type(model).__name__}: its weight is that of the embedding too "
            "(`tie_word_embeddings`), and a merged adapter would change both. Leave it out of `targets`."
        )


def tied_head_name(model: nn.Module) -> str | None:
    """The full name of the output embedding where its weight is that of the input embedding, else None."""
    kinds = ("get_output_embeddings", "get_input_embeddings")
    head, embedding = (getattr(getattr(model, kind, lambda: None)(), "weight", None) for kind in kinds)
    return head_name(model) if head is not None and head is embedding else None


def matching_names(target: str, names: list[str], *, head: str | None) -> list[str]:
    """Those of the full ``names`` that ``target`` is, or whose last parts it is. The head only by its full name."""
    # LLaDA's head is called ff_out, like the last linear layer of each of its blocks.
    return [name for name in names if name == target or (name.endswith(f".{target}") and name != head)]


def head_name(model: nn.Module) -> str | None:
    """The full name of the output embedding, or None where the model names none."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return next((name for name, module in model.named_modules() if module is head), None)


def linear_names(model: nn.Module) -> list[str]:
    """The full names of all linear layers. Quantised layers are linear layers too."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def block_linear_names(model: nn.Module) -> list[str]:
    """The full names of the linear layers in the blocks of a model of a known family.

    Raises:
        ValueError: the model belongs to no known family.
    """
    config: Any = getattr(model, "config", None)
    family = family_of_model(getattr(config, "model_type", ""))
    if family is None:
        raise ValueError(
            f"LoRA has no default targets for {type(model).__name__}; name them with `targets`, for example from "
            f"{', '.join(sorted({name.rpartition('.')[2] for name in linear_names(model)}))}."
        )
    return [name for name in linear_names(model) if re.fullmatch(family.block_linears, name)]


def load_adapter(model: nn.Module, directory: str) -> "PeftModel":
    """The model with a saved PEFT adapter, which stays trainable.

    Warns of linear layers of the blocks that the adapter leaves as they are. Adapters of d1 and DMPO name Llama's
    layers, of which LLaDA has only some, and load with that warning. The task that they name is left out.

    Raises:
        ValueError: it adapts a head that is the embedding too.
    """
    from peft import PeftConfig, PeftModel

    # Asked before PEFT puts its own layers in the place of the model's.
    tied_head = tied_head_name(model)
    known = family_of_model(getattr(model.config, "model_type", "")) is not None
    expected = block_linear_names(model) if known else []
    config = PeftConfig.from_pretrained(directory)
    # Those adapters also call their task causal language modelling. For that, PEFT would wrap the model in a class that
    # passes arguments on which no masked language model takes.
    config.task_type = None
    adapted = PeftModel.from_pretrained(model, directory, is_trainable=True, config=config)
    adapted_names = {
        name.partition("base_model.model.")[2].rpartition(".lora_A")[0]
        for name, _ in adapted.named_parameters()
        if ".lora_A." in name
    }
    check_adapted(model, tied_head, adapted_names)
    lacking = sorted({name.rpartition(".")[2] for name in expected if name not in adapted_names})
    if lacking:
        warnings.warn(
            f"The adapter in {directory!r} leaves these linear layers of the blocks without adapters: "
            f"{', '.join(lacking)}.",
            stacklevel=2,
        )
    return adapted
