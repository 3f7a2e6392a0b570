"""Low-rank adapters on the right layers, through PEFT."""

import re
import warnings
from typing import TYPE_CHECKING, Any

from torch import nn

from dmpo_lightning.models.families import family_of_model

if TYPE_CHECKING:
    from peft import PeftModel


class LoRA:
    """How to adapt a model (LoRA, arXiv 2106.09685).

    Args:
        r: rank.
        alpha: scale, applied as alpha / r.
        dropout: on the adapters' input, in training only.
        targets: names or last name parts of the modules to adapt; None takes all linear layers of the blocks of a known
            family, and never the head.

    Raises:
        ValueError: a rank below 1, a dropout outside [0, 1); when applied: a target that matches no linear layer.
    """

    def __init__(
        self, *, r: int = 128, alpha: int = 64, dropout: float = 0.05, targets: list[str] | None = None
    ) -> None:
        if r < 1:
            raise ValueError(f"`r` must be at least 1, got {r}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"`dropout` must be in [0, 1), got {dropout}.")
        self.r, self.alpha, self.dropout, self.targets = r, alpha, dropout, targets

    def apply(self, model: nn.Module, source: str | None = None) -> "PeftModel":
        """The model with fresh adapters; its own weights are frozen. ``source`` is noted as the adapter's base."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=self.r, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=self._target_modules(model)
        )
        adapted = get_peft_model(model, config)
        if source is not None:
            adapted.peft_config["default"].base_model_name_or_path = source
        return adapted  # type: ignore[return-value,unused-ignore]

    def _target_modules(self, model: nn.Module) -> list[str]:
        linears = linear_names(model)
        if self.targets is None:
            return block_linear_names(model)
        for target in self.targets:
            if not any(name == target or name.endswith(f".{target}") for name in linears):
                kinds = sorted({name.rpartition(".")[2] for name in linears})
                raise ValueError(
                    f"LoRA target {target!r} matches no linear layer of {type(model).__name__}, which has "
                    f"{', '.join(kinds)}; "
                    "leave `targets` out to adapt all linear layers of the blocks."
                )
        return [name for name in linears if any(name == t or name.endswith(f".{t}") for t in self.targets)]


def linear_names(model: nn.Module) -> list[str]:
    """Full names of all linear layers, quantised ones too."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def block_linear_names(model: nn.Module) -> list[str]:
    """Full names of the linear layers inside the blocks of a known family.

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
    """The model with a saved PEFT adapter, trainable; warns of block layers that the adapter leaves as they are.

    Adapters of d1 and DMPO name Llama's layers, of which LLaDA has only some: they load, with that warning.
    """
    from peft import PeftModel

    expected = block_linear_names(model)
    adapted = PeftModel.from_pretrained(model, directory, is_trainable=True)
    found = {
        name.partition("base_model.model.")[2].rpartition(".lora_A")[0]
        for name, _ in adapted.named_parameters()
        if ".lora_A." in name
    }
    lacking = sorted({name.rpartition(".")[2] for name in expected if name not in found})
    if lacking:
        warnings.warn(
            f"The adapter in {directory!r} leaves these linear layers of the blocks without adapters: "
            f"{', '.join(lacking)}.",
            stacklevel=2,
        )
    return adapted
