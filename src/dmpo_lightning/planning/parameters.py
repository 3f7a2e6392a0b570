"""Parameters by module type, counted on the meta device."""

import re
from collections import Counter
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dmpo_lightning.models.loading import EMBEDDED_MODELS
from dmpo_lightning.planning.settings import Adapter

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

PUBLISHED = (
    ("GSAI-ML/LLaDA-8B-", "dmpo_lightning.models.llada:LLaDAConfig"),
    ("GSAI-ML/LLaDA-1.5", "dmpo_lightning.models.llada:LLaDAConfig"),
    ("Dream-org/Dream-v0-", "dmpo_lightning.models.dream:DreamConfig"),
    ("apple/DiffuCoder-7B-", "dmpo_lightning.models.dream:DreamConfig"),
)
"""Hub ids by their beginning, and the class whose defaults are their published configuration; all are bfloat16."""


@dataclass(frozen=True)
class Linear:
    """A linear layer of the model, the head included."""

    name: str
    in_features: int
    out_features: int
    in_block: bool

    @property
    def leaf(self) -> str:
        """The last part of its name."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Architecture:
    """Sizes of a transformer, and its parameters by module type."""

    name: str
    dtype: str
    """Of the checkpoint's weights."""
    width: int
    blocks: int
    heads: int
    key_heads: int
    head_size: int
    mlp_width: int
    vocab_size: int
    max_length: int
    parameters: dict[str, int]
    """By module type: ``wte``, ``blocks.q_proj``, ..."""
    linears: tuple[Linear, ...]
    head_parameters: int
    largest_parameter: int

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.parameters.values())

    @property
    def block_linears(self) -> tuple[Linear, ...]:
        """Linear layers inside the blocks: the targets of LoRA and of quantisation."""
        return tuple(linear for linear in self.linears if linear.in_block)

    @property
    def block_linear_parameters(self) -> int:
        """Weights of the blocks' linear layers, biases aside."""
        return sum(linear.in_features * linear.out_features for linear in self.block_linears)

    @property
    def block_parameters(self) -> int:
        """Parameters of one block."""
        return sum(count for name, count in self.parameters.items() if "." in name) // self.blocks


@dataclass(frozen=True)
class Parameters:
    """What is there and what is trained, by module type."""

    total: dict[str, int]
    trainable: dict[str, int]

    @property
    def total_count(self) -> int:
        """All parameters, adapters included."""
        return sum(self.total.values())

    @property
    def trainable_count(self) -> int:
        """Parameters that the optimizer sees."""
        return sum(self.trainable.values())


def count_parameters(architecture: Architecture, adapter: Adapter | None) -> Parameters:
    """All weights are trained without an adapter; with one, r x (in + out) numbers per adapted layer.

    Raises:
        ValueError: an adapter target that matches no linear layer.
    """
    if adapter is None:
        return Parameters(dict(architecture.parameters), dict(architecture.parameters))
    trainable: Counter[str] = Counter()
    for linear in adapted_linears(architecture, adapter):
        trainable[f"{_module_type(linear.name)} (LoRA)"] += adapter.r * (linear.in_features + linear.out_features)
    return Parameters(architecture.parameters | trainable, dict(trainable))


def adapted_linears(architecture: Architecture, adapter: Adapter) -> tuple[Linear, ...]:
    """The layers that an adapter targets: all linear layers of the blocks, or those it names.

    Raises:
        ValueError: a target that matches nothing.
    """
    if adapter.targets is None:
        return architecture.block_linears
    for target in adapter.targets:
        if not any(_is_named(linear, target) for linear in architecture.linears):
            known = ", ".join(sorted({linear.leaf for linear in architecture.linears}))
            raise ValueError(
                f"LoRA target {target!r} matches no linear layer of {architecture.name}, which has {known}."
            )
    return tuple(linear for linear in architecture.linears if any(_is_named(linear, t) for t in adapter.targets))


def _is_named(linear: Linear, target: str) -> bool:
    return linear.name == target or linear.name.endswith(f".{target}")


def read_architecture(source: str) -> Architecture:
    """Sizes and parameters of a hub id, a folder or an embedded model, from its configuration alone.

    Raises:
        ValueError: no configuration can be had.
    """
    config, dtype = _read_config(source)
    return describe(config, name=source, dtype=dtype)


def describe(config: "PreTrainedConfig", *, name: str, dtype: str) -> Architecture:
    """Builds the model of a configuration on the meta device and measures it."""
    from transformers import AutoModelForMaskedLM

    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(config)
    shape: Any = config
    heads = shape.num_attention_heads
    head = model.get_output_embeddings()
    return Architecture(
        name=name,
        dtype=dtype,
        width=shape.hidden_size,
        blocks=shape.num_hidden_layers,
        heads=heads,
        key_heads=getattr(shape, "num_key_value_heads", None) or heads,
        head_size=getattr(shape, "head_dim", None) or shape.hidden_size // heads,
        mlp_width=shape.intermediate_size,
        vocab_size=getattr(shape, "embedding_size", None) or shape.vocab_size,
        max_length=shape.max_position_embeddings,
        parameters=_by_type(model),
        linears=_linears(model),
        head_parameters=0 if head is None else sum(parameter.numel() for parameter in head.parameters()),
        largest_parameter=max(parameter.numel() for parameter in model.parameters()),
    )


def _by_type(model: nn.Module) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counts[_module_type(name.rpartition(".")[0])] += parameter.numel()
    return dict(counts)


def _module_type(module: str) -> str:
    """``blocks.q_proj`` of ``model.transformer.blocks.3.q_proj``; the last part where nothing is numbered."""
    numbered = re.search(r"(\w+)\.\d+\.(.+)$", module)
    return f"{numbered[1]}.{numbered[2]}" if numbered else module.rpartition(".")[2]


def _linears(model: nn.Module) -> tuple[Linear, ...]:
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return tuple(
        Linear(name, linear.in_features, linear.out_features, in_block=bool(re.search(r"\.\d+\.", name)))
        for name, linear in found
    )


def _read_config(source: str) -> tuple["PreTrainedConfig", str]:
    if Path(source).is_dir() or source in EMBEDDED_MODELS:
        return _stored_config(source)
    for beginning, home in PUBLISHED:
        if source.startswith(beginning):
            return _published_config(source, home), "bfloat16"
    return _hub_config(source)


def _published_config(source: str, home: str) -> "PreTrainedConfig":
    module, _, name = home.partition(":")
    try:
        config: PreTrainedConfig = getattr(import_module(module), name)()
    except ImportError as error:
        raise ValueError(f"`plan` cannot describe {source!r}: {module} is not there yet.") from error
    return config


def _stored_config(source: str) -> tuple["PreTrainedConfig", str]:
    from dmpo_lightning.models.loading import fetch

    folder = Path(fetch(source))
    if not (folder / "config.json").is_file():
        raise ValueError(f"`plan` needs the model's config.json, and the folder {str(folder)!r} has none.")
    return _load_config(str(folder))


def _hub_config(source: str) -> tuple["PreTrainedConfig", str]:
    try:
        return _load_config(source)
    except OSError as error:
        known = ", ".join(f"{beginning}*" for beginning, _ in PUBLISHED)
        raise ValueError(
            f"`plan` needs the configuration of {source!r}, which is neither a folder nor to be had from the hub. "
            f"Known without network: {known}, {', '.join(EMBEDDED_MODELS)}."
        ) from error


def _load_config(where: str) -> tuple["PreTrainedConfig", str]:
    from transformers import AutoConfig

    for _, home in PUBLISHED:
        _register(home.partition(":")[0])
    config = AutoConfig.from_pretrained(where)
    dtype = getattr(config, "dtype", None) or "float32"
    return config, str(dtype).removeprefix("torch.")


def _register(module: str) -> None:
    """Importing a native backbone registers it with transformers; one that does not exist yet registers nothing."""
    try:
        import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
