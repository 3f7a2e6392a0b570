"""A network on the meta device, from its configuration alone: no weights are read, and none are held."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dmpo_lightning.models.backbone import Backbone
from dmpo_lightning.models.loading import (
    EMBEDDED_MODELS,
    check_quantizable,
    dtype_of,
    fetch,
    read_config,
    with_named_block,
)
from dmpo_lightning.models.lora import base_of, is_adapter, with_stored_adapter
from dmpo_lightning.models.parts import head_name, linear_names, stacked_names

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

_SDAR_1_7B = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16}
_LLADA2_FLASH = {
    "hidden_size": 4096,
    "intermediate_size": 9216,
    "moe_intermediate_size": 1024,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
PUBLISHED: tuple[tuple[tuple[str, ...], str, dict[str, int]], ...] = (
    (("GSAI-ML/LLaDA-8B-", "GSAI-ML/LLaDA-1.5"), "llada", {}),
    (("GSAI-ML/iLLaDA-8B-",), "illada", {}),
    (("Dream-org/Dream-v0-", "apple/DiffuCoder-7B-"), "Dream", {}),
    (("JetLM/SDAR-8B-", "Gen-Verse/TraDo-8B-", "OpenMOSS-Team/DiRL-8B-"), "sdar", {}),
    (("JetLM/SDAR-4B-", "Gen-Verse/TraDo-4B-"), "sdar", {"hidden_size": 2560, "intermediate_size": 9728}),
    (("JetLM/SDAR-1.7B-",), "sdar", _SDAR_1_7B),
    (("JetLM/SDAR-30B-A3B-",), "sdar_moe", {}),
    (("inclusionAI/LLaDA2.0-mini", "inclusionAI/LLaDA2.1-mini"), "llada2_moe", {}),
    (("inclusionAI/LLaDA2.0-flash", "inclusionAI/LLaDA2.1-flash"), "llada2_moe", _LLADA2_FLASH),
)
"""Hub ids by their beginning, their family, and where the published configuration differs from the family's default.

All are bfloat16.
"""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Per weight: 4 bits, one 8-bit scale per 64 weights, one float32 scale per 256 of those (double quantisation)."""


def without_weights(backbone: Backbone) -> Backbone:
    """The backbone that builds the same network on the meta device. Under `torch.device("meta")` it needs no memory.

    Raises:
        ValueError: no configuration can be had, or an unknown ``dtype``.
    """
    from transformers import AutoModelForMaskedLM

    source = str(backbone.model)
    base = base_of(source)[0] if is_adapter(source) else source
    config, stored = read_model_config(base)
    # Fresh weights are drawn in float32, whatever the checkpoint's type is (`load_model`).
    dtype = dtype_of(backbone.dtype, getattr(torch, "float32" if backbone.random_weights else stored))
    with torch.device("meta"):
        model: Any = AutoModelForMaskedLM.from_config(config, dtype=dtype)
        if backbone.quantization is not None:
            check_quantizable(model)
            quantize(model)
        if base != source:
            model = with_stored_adapter(model, source)
    name = str(dtype).removeprefix("torch.")
    return replace(backbone, model=model, tokenizer=stand_in_tokenizer(config), dtype=name, compile_blocks=False)


def stand_in_tokenizer(config: Any) -> "PreTrainedTokenizerBase":
    """A tokenizer of four tokens, in place of the model's, which cannot be had without its files."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    width, mask = getattr(config, "logit_width", config.vocab_size), getattr(config, "mask_token_id", None) or 3
    # Unknown tokens are 0 in a rehearsal, which therefore must not end completions.
    tokens = {0: "<unknown>", width - 1: "<last>", (1 if mask != 1 else 2): "<end>", mask: "<mask>"}
    words = Tokenizer(WordLevel({token: number for number, token in tokens.items()}, unk_token="<unknown>"))
    names = {"pad_token": "<unknown>", "eos_token": "<end>", "mask_token": "<mask>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


def read_model_config(source: str) -> tuple["PreTrainedConfig", str]:
    """The configuration of a hub id, a folder or an embedded model, and the type of its weights.

    Raises:
        ValueError: no configuration can be had.
    """
    from huggingface_hub import hf_hub_download
    from transformers import AutoConfig

    # The published models are known without the hub, so that planning needs no network.
    for beginnings, model_type, differences in PUBLISHED:
        if source.startswith(beginnings) and not Path(source).is_dir():
            config = AutoConfig.for_model(model_type, **differences)
            return with_named_block(config, source, differences), "bfloat16"
    if Path(source).exists() or source in EMBEDDED_MODELS:
        folder = Path(fetch(source))
    else:
        try:
            folder = Path(hf_hub_download(source, "config.json")).parent
        # The hub's errors are of many classes, all of these two kinds.
        except (OSError, ValueError) as error:
            known = ", ".join(f"{each}*" for beginnings, *_ in PUBLISHED for each in beginnings)
            raise ValueError(
                f"`plan` needs the configuration of {source!r}, which is neither a folder nor to be had from the hub. "
                f"Known without network: {known}, {', '.join(EMBEDDED_MODELS)}."
            ) from error
    config = read_config(folder, source)
    return config, str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")


def counted(model: nn.Module) -> tuple[int, int]:
    """The numbers of all and of trained parameters. A head that is the embedding counts once.

    A reference that is a frozen adapter is counted as memory, and not as part of the network.
    """
    kept = [each for name, each in model.named_parameters() if each.requires_grad or ".lora_" not in name]
    counts = [(getattr(each, "unpacked", each.numel()), each.requires_grad) for each in kept]
    return sum(count for count, _ in counts), sum(count for count, is_trained in counts if is_trained)


def active(model: Any) -> int:
    """How many parameters a token goes through: of routed experts those that it is sent to."""
    routed, config = sum(model.get_parameter(name).numel() for name in stacked_names(model)), model.config
    left_out = routed and routed // config.num_experts * (config.num_experts - config.num_experts_per_tok)
    return counted(model)[0] - left_out


def quantize(model: nn.Module) -> None:
    """Does to a network on the meta device what loading it in 4 bits and PEFT's preparation do to a real one.

    All linear layers but the head are stored in 4 bits, and all else is raised to float32.
    """
    head = head_name(model)
    for name in linear_names(model):
        if name != head:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, FourBitLinear(model.get_submodule(name)))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()


class FourBitLinear(nn.Linear):
    """Stands for bitsandbytes' layer, whose kernels need real numbers. It stores as much and multiplies in bfloat16."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
        stored = torch.empty(int(layer.weight.numel() * NF4_BYTES), dtype=torch.uint8, device="meta")
        packed: Any = nn.Parameter(stored, requires_grad=False)
        packed.unpacked = layer.weight.numel()
        self.weight = packed

    def forward(self, x: Tensor) -> Tensor:
        def unpacked(shape: Sequence[int]) -> Tensor:
            return self.weight.new_empty(shape, dtype=torch.bfloat16)

        half = x.bfloat16()
        # The weights are unpacked once in each direction, and not kept.
        with torch.autograd.graph.saved_tensors_hooks(lambda weights: weights.shape, unpacked):
            product = nn.functional.linear(half, unpacked((self.out_features, self.in_features))).to(x.dtype)
        return product if self.bias is None else product + self.bias.to(x.dtype)
