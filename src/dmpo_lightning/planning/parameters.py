"""Sizes and parameters of a model, read from its configuration and counted on the meta device."""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dmpo_lightning.models.loading import EMBEDDED_MODELS, fetch, read_config, with_named_block
from dmpo_lightning.models.lora import LoRA
from dmpo_lightning.models.parts import tied_head_name

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_SDAR_4B = {"hidden_size": 2560, "intermediate_size": 9728}
_SDAR_1_7B = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16}
PUBLISHED: tuple[tuple[str, str, dict[str, int]], ...] = (
    ("GSAI-ML/LLaDA-8B-", "llada", {}),
    ("GSAI-ML/LLaDA-1.5", "llada", {}),
    ("GSAI-ML/iLLaDA-8B-", "illada", {}),
    ("Dream-org/Dream-v0-", "Dream", {}),
    ("apple/DiffuCoder-7B-", "Dream", {}),
    ("JetLM/SDAR-1.7B-", "sdar", _SDAR_1_7B),
    ("JetLM/SDAR-4B-", "sdar", _SDAR_4B),
    ("JetLM/SDAR-8B-", "sdar", {}),
    ("Gen-Verse/TraDo-4B-", "sdar", _SDAR_4B),
    ("Gen-Verse/TraDo-8B-", "sdar", {}),
    ("OpenMOSS-Team/DiRL-8B-", "sdar", {}),
)
"""Hub ids by their beginning, their family, and where the published configuration differs from the family's default.

All are bfloat16.
"""


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
    """Sizes of a transformer, and its parameters by module type.

    ``block_size`` is that of a block-causal model. ``dtype`` is that of the checkpoint's weights. ``parameters`` counts
    by module type: ``wte``, ``blocks.q_proj`` and so on, and a head that is the embedding once. ``model`` is the
    network itself on the meta device, which holds no weights.
    """

    name: str
    dtype: str
    width: int
    blocks: int
    heads: int
    key_heads: int
    head_size: int
    mlp_width: int
    vocab_size: int
    max_length: int
    parameters: dict[str, int]
    linears: tuple[Linear, ...]
    head_parameters: int
    head_is_embedding: bool
    largest_parameter: int
    block_size: int | None
    model: nn.Module = field(repr=False, compare=False)

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.parameters.values())

    @property
    def normalises_heads(self) -> bool:
        """Whether queries and keys are normalised head by head."""
        return any(name.endswith("q_norm") for name in self.parameters)

    @property
    def block_linears(self) -> tuple[Linear, ...]:
        """Linear layers inside the blocks, which quantisation stores in 4 bits."""
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


def count_parameters(architecture: Architecture, adapter: LoRA | None) -> Parameters:
    """Parameters by module type, in all and trained ones.

    Without an adapter all weights are trained. With one, each adapted layer adds r x (in + out) numbers, and only those
    are trained.

    Raises:
        ValueError: an adapter target that matches no linear layer.
    """
    if adapter is None:
        return Parameters(dict(architecture.parameters), dict(architecture.parameters))
    trainable: Counter[str] = Counter()
    for linear in adapted_linears(architecture, adapter):
        trainable[f"{_module_type(linear.name)} (LoRA)"] += adapter.r * (linear.in_features + linear.out_features)
    return Parameters(architecture.parameters | trainable, dict(trainable))


def adapted_linears(architecture: Architecture, adapter: LoRA) -> tuple[Linear, ...]:
    """The layers that an adapter targets, as `LoRA` itself chooses them.

    Raises:
        ValueError: what `LoRA.target_names` raises.
    """
    # LoRA itself is asked, so that plan and training cannot differ. A bare ff_out, for one, leaves LLaDA's head alone.
    names = set(adapter.target_names(architecture.model))
    return tuple(linear for linear in architecture.linears if linear.name in names)


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

    # An 8B model is built in moments and holds no memory, and is counted as it would be loaded.
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
        head_size=getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads,
        mlp_width=shape.intermediate_size,
        vocab_size=getattr(shape, "logit_width", shape.vocab_size),
        max_length=shape.max_position_embeddings,
        parameters=_by_type(model),
        linears=_linears(model),
        head_parameters=0 if head is None else sum(parameter.numel() for parameter in head.parameters()),
        head_is_embedding=tied_head_name(model) is not None,
        largest_parameter=max(parameter.numel() for parameter in model.parameters()),
        block_size=getattr(model, "block_size", None) if getattr(model, "is_native", False) else None,
        model=model,
    )


def _by_type(model: nn.Module) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counts[_module_type(name.rpartition(".")[0])] += parameter.numel()
    return dict(counts)


def _module_type(module: str) -> str:
    """The name without the block's number: ``blocks.q_proj`` of ``model.transformer.blocks.3.q_proj``.

    Where nothing is numbered it is the last part.
    """
    numbered = re.search(r"(\w+)\.\d+\.(.+)$", module)
    return f"{numbered[1]}.{numbered[2]}" if numbered else module.rpartition(".")[2]


def _linears(model: nn.Module) -> tuple[Linear, ...]:
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return tuple(
        Linear(name, linear.in_features, linear.out_features, in_block=bool(re.search(r"\.\d+\.", name)))
        for name, linear in linears
    )


def _read_config(source: str) -> tuple["PreTrainedConfig", str]:
    from transformers import AutoConfig

    if Path(source).is_dir() or source in EMBEDDED_MODELS:
        return _stored_config(source)
    # The published models are known without the hub, so that planning needs no network.
    for beginning, model_type, differences in PUBLISHED:
        if source.startswith(beginning):
            config = AutoConfig.for_model(model_type, **differences)
            return with_named_block(config, source, differences), "bfloat16"
    return _hub_config(source)


def _stored_config(source: str) -> tuple["PreTrainedConfig", str]:
    folder = Path(fetch(source))
    if not (folder / "config.json").is_file():
        raise ValueError(f"`plan` needs the model's config.json, and the folder {str(folder)!r} has none.")
    return _load_config(folder, source)


def _hub_config(source: str) -> tuple["PreTrainedConfig", str]:
    from huggingface_hub import hf_hub_download

    try:
        folder = Path(hf_hub_download(source, "config.json")).parent
    # The hub's errors are of many classes, all of these two kinds.
    except (OSError, ValueError) as error:
        known = ", ".join(f"{beginning}*" for beginning, *_ in PUBLISHED)
        raise ValueError(
            f"`plan` needs the configuration of {source!r}, which is neither a folder nor to be had from the hub. "
            f"Known without network: {known}, {', '.join(EMBEDDED_MODELS)}."
        ) from error
    return _load_config(folder, source)


def _load_config(folder: Path, source: str) -> tuple["PreTrainedConfig", str]:
    config = read_config(folder, source)
    dtype = getattr(config, "dtype", None) or "float32"
    return config, str(dtype).removeprefix("torch.")
