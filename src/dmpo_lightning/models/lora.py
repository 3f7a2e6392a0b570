"""Low-rank adapters (LoRA) through PEFT: fresh ones, those of a folder, and merged ones.

They adapt the linear layers of the transformer blocks, and never the head by accident.
"""

import copy
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dmpo_lightning.models.families import FAMILIES
from dmpo_lightning.models.parts import head_name, layers_of, linear_names, stacked_names, tied_head_name
from dmpo_lightning.models.verification import named_problem, read_object, verify_tensors

if TYPE_CHECKING:
    from peft import PeftModel


class LoRA:
    """How to adapt a model with low-rank adapters (LoRA, arXiv 2106.09685).

    Args:
        r: the rank.
        alpha: the scale, which is applied as alpha / r.
        dropout: the dropout on the adapters' input, in training only.
        targets: full names, or last parts of names, of the modules to adapt. The head is adapted only where its full
            name is given. None takes all linear layers of the transformer blocks, for which the
            model must be of a known family.
        experts: adapt the routed experts of a mixture (LLaDA2, SDAR-MoE) as well, each with an adapter of this rank.
            Routers are never adapted. PEFT adapts stacked weights as a whole, which takes a layer of them in memory
            once more.

    Raises:
        ValueError: the rank is below 1, the dropout is outside [0, 1) or above 0 with ``experts``, or ``targets`` is
            empty. When applied: a target matches no linear layer, or there are no experts.

    Example:
        >>> from dmpo_lightning import LoRA, load_model
        >>> network = LoRA(r=8, alpha=16).apply(load_model("sudoku_tiny"), "sudoku_tiny")
        >>> network.peft_config["default"].r
        8
    """

    def __init__(
        self,
        *,
        r: int = 128,
        alpha: int = 64,
        dropout: float = 0.05,
        targets: list[str] | None = None,
        experts: bool = False,
    ) -> None:
        if r < 1:
            raise ValueError(f"`r` must be at least 1, got {r}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"`dropout` must be in [0, 1), got {dropout}.")
        if targets is not None and not targets:
            raise ValueError("`targets` must name at least one module, got none; leave it out for all linear layers.")
        if experts and dropout:
            raise ValueError(f"`experts` needs `dropout` 0, as weights are adapted and no inputs, got {dropout}.")
        self.r, self.alpha, self.dropout, self.targets, self.experts = r, alpha, dropout, targets, experts

    def apply(
        self, model: nn.Module, source: str | None = None, *, seed: int = 0, revision: str | None = None
    ) -> "PeftModel":
        """Gives the model fresh adapters that are drawn from ``seed``, and freezes its own weights.

        ``source`` is where the model came from, in which ``revision``. Saved adapters name them as their base.
        """
        from peft import LoraConfig, get_peft_model

        experts = stacked_names(model) if self.experts else None
        if experts == []:
            raise ValueError(
                f"LoRA with `experts` needs a mixture of experts (LLaDA2, SDAR-MoE), got {type(model).__name__}."
            )
        config = LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_names(model),
            target_parameters=experts,
        )
        # All ranks draw the same adapter, and nobody else's draws move (docs/decisions/009-fresh-adapters.md).
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapted = get_peft_model(model, config)
        if source is not None:
            adapted.peft_config["default"].base_model_name_or_path = source
            adapted.peft_config["default"].revision = revision
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
        # LLaDA's head is called ff_out, like the last linear of each of its layers.
        matched = {
            target: [name for name in names if name == target or (name.endswith(f".{target}") and name != head)]
            for target in self.targets
        }
        for target, layers in matched.items():
            if not layers:
                kinds = sorted({name.rpartition(".")[2] for name in names})
                raise ValueError(
                    f"LoRA target {target!r} matches no linear layer of {type(model).__name__}, which has "
                    f"{', '.join(kinds)}; leave `targets` out to adapt those of all transformer blocks."
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


def block_linear_names(model: nn.Module) -> list[str]:
    """The full names of the linear layers in the transformer blocks of a model of a known family.

    Raises:
        ValueError: the model belongs to no known family.
    """
    if not _is_known(model):
        raise ValueError(
            f"LoRA has no default targets for {type(model).__name__}; name them with `targets`, for example from "
            f"{', '.join(sorted({name.rpartition('.')[2] for name in linear_names(model)}))}."
        )
    inside = {module for layer in layers_of(model) for module in layer.modules()}
    return [name for name in linear_names(model) if model.get_submodule(name) in inside]


def _is_known(model: Any) -> bool:
    return getattr(getattr(model, "config", None), "model_type", "") in FAMILIES


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (Path(folder) / "adapter_config.json").is_file()


def base_of(folder: str) -> tuple[str, str | None]:
    """What a folder's adapter names as its base, and in which revision.

    Raises:
        ValueError: it names none, or an adapter.
    """
    file = Path(folder) / "adapter_config.json"
    stated = read_object(file)
    base, revision = stated.get("base_model_name_or_path"), stated.get("revision")
    if not isinstance(base, str) or not base or is_adapter(base):
        raise ValueError(
            f"Adapter file {str(file)!r} must name its base in `base_model_name_or_path`, got {base!r}; set it to the "
            "whole model that the adapter was trained on."
        )
    return base, None if revision is None else str(revision)


def load_adapter(model: nn.Module, directory: str) -> "PeftModel":
    """The model with a saved PEFT adapter, which stays trainable.

    Warns of linear layers of the transformer blocks that the adapter leaves as they are. Adapters of d1 and DMPO name
    Llama's layers, of which LLaDA has only some, and load with that warning. The task that they name is left out.

    Raises:
        ValueError: it is no LoRA, is not understood, adapts a head that is the embedding too, or `verify_tensors` finds
            its file wrong.
    """
    from peft import get_peft_model_state_dict

    # Asked before PEFT puts its own layers in the place of the model's.
    tied_head, expected = tied_head_name(model), block_linear_names(model) if _is_known(model) else []
    adapted = with_stored_adapter(model, directory)
    # By default PEFT would ask the hub whether the base's embeddings grew.
    tensors = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    names = {name.removeprefix("base_model.model.").rpartition(".lora_A")[0] for name in tensors}
    check_adapted(model, tied_head, names)
    verify_tensors(directory, tensors, stem="adapter_model")
    adapted.load_adapter(directory, "default", is_trainable=True)
    lacking = sorted({name.rpartition(".")[2] for name in expected if name not in names})
    if lacking:
        warnings.warn(
            f"The adapter in {directory!r} leaves these linear layers of transformer blocks without adapters: "
            f"{', '.join(lacking)}.",
            stacklevel=2,
        )
    return adapted


def with_stored_adapter(model: nn.Module, directory: str) -> "PeftModel":
    """The model with an adapter of the shape of a saved one, trainable. Its weights are not read.

    Raises:
        ValueError: it is no LoRA, or not understood.
    """
    from peft import PeftConfig, PeftModel

    file = Path(directory) / "adapter_config.json"
    if (kind := read_object(file).get("peft_type")) != "LORA":
        raise ValueError(f"Adapter file {str(file)!r} must be of the `peft_type` 'LORA', got {kind!r}.")
    with named_problem(f"Adapter file {str(file)!r} does not fit {type(model).__name__}"):
        config = PeftConfig.from_pretrained(directory)
        # Those adapters also call their task causal language modelling. For that, PEFT would wrap the model in a class
        # that passes arguments on which no masked language model takes.
        config.task_type, config.inference_mode = None, False
        return PeftModel(model, config)


class MergedCopy:
    """A copy of an adapted model whose adapted layers have weights of their own, with the adapters merged in.

    All other tensors are those of the model itself, not copies, so that the copy costs no more than the adapted layers
    and follows every change to the rest. `refresh` follows changes to the adapters.

    This is not a module, and the copy in it is thereby no part of the parameters, the state or the device moves of a
    module that holds it.

    Raises:
        ValueError: the layers cannot be merged into, see `check`.
    """

    def __init__(self, model: Any) -> None:
        self.check(model)
        base = model.get_base_model()
        adapted = dict(_adapted(base))
        own = {id(layer.base_layer.weight) for layer in adapted.values()}
        shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers()) if id(tensor) not in own}
        # A deep copy takes what its memo holds for already copied, and what it then refers to is the original tensor.
        self.model: nn.Module = copy.deepcopy(base, shared)
        # In place of PEFT's layer, which would add the adapters once more, stands the linear layer inside of it.
        for name in adapted:
            parent, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, self.model.get_submodule(name).base_layer)
        self.model.eval()

    @staticmethod
    def check(model: Any) -> None:
        """Raises ValueError where an adapted layer is quantised or sharded: nothing can be merged into its weights."""
        for name, layer in _adapted(model.get_base_model()):
            weight = getattr(layer.base_layer, "weight", None)
            if type(layer.base_layer) is not nn.Linear or type(weight) is not nn.Parameter:
                raise ValueError(
                    f"Adapters cannot be merged for sampling into {name}, a {type(layer.base_layer).__name__} with a "
                    f"{type(weight).__name__}: leave `sample_merged` out with quantised or sharded weights or experts."
                )

    @torch.no_grad()
    def refresh(self, model: Any) -> None:
        """Merges the adapters, as they are now, into the copy's weights. The model is only read."""
        for name, layer in _adapted(model.get_base_model()):
            delta = sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
            weight: Any = self.model.get_submodule(name).weight
            # Added in the adapters' dtype, and rounded once to that of the weights.
            weight.copy_(layer.base_layer.weight.to(delta.dtype) + delta)


def _adapted(base: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in base.named_modules() if isinstance(module, LoraLayer))
