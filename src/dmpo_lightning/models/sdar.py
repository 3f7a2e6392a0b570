"""SDAR (arXiv 2510.06303), and TraDo and DiRL, which are trained from it, as a native transformers model.

They have the shape of Qwen3 with block-causal attention: a token sees its own block, on both sides, and all earlier
blocks. They are not shifted: logit i predicts token i.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedConfig,
    Qwen2Tokenizer,
)

from dmpo_lightning.models.block_causal import block_causal_mask
from dmpo_lightning.models.configuration import check_switches, rotary_base
from dmpo_lightning.models.family import Family
from dmpo_lightning.models.kv_cache import KeyValueCache
from dmpo_lightning.models.layers import RMSNorm, padded_position_ids
from dmpo_lightning.models.native import Geometry
from dmpo_lightning.models.qwen import BLOCK_LINEARS, GroupedAttention, QwenBlock, QwenForMaskedDiffusion, QwenModel

FAMILY = Family(
    model_type="sdar",
    end_tokens=("<|endoftext|>", "<|im_end|>"),
    chat_template=(
        "{% for message in messages %}"
        "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{{ '<|im_start|>assistant\n' }}"
    ),
    block_linears=BLOCK_LINEARS,
    mask_token="<|MASK|>",
)

_FIXED = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}
"""Switches that the published configuration has, but that all published models set alike."""


class SDARConfig(PreTrainedConfig):
    """Configuration of an SDAR. Its keys are the published ones, and its defaults those of the 8B model.

    Published configurations that name neither ``block_size`` nor ``mask_token_id`` have the defaults.

    Raises:
        ValueError: numbers of heads that do not divide each other, an odd head size, a block of no positions. A switch
            that no published model sets so.
    """

    model_type = "sdar"

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 12288
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1000000.0
    initializer_range: float = 0.02
    block_size: int = 4
    mask_token_id: int | None = 151669
    eos_token_id: int | list[int] | None = 151643
    pad_token_id: int | None = 151643
    bos_token_id: int | None = 151643
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        # Even head sizes, because rotary positions pair a head's dimensions.
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise ValueError(
                "`num_attention_heads` must be a multiple of `num_key_value_heads`, and `head_dim` even, got "
                f"{self.num_attention_heads}, {self.num_key_value_heads} and {self.head_dim}."
            )
        if self.block_size < 1:
            raise ValueError(f"`block_size` must be at least 1, got {self.block_size}.")
        check_switches("SDAR", _FIXED, kwargs)
        self.rope_theta = rotary_base("SDAR", kwargs, self.rope_theta)
        super().__post_init__(**kwargs)


class SDARAttention(GroupedAttention):
    """Attention without biases, whose queries and keys are normalised head by head before they are rotated."""

    def __init__(self, config: SDARConfig) -> None:
        super().__init__(config)
        self.q_norm = RMSNorm(self.head_size, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_size, config.rms_norm_eps)

    def normalised(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Each head by itself."""
        query, key = (
            norm(x.unflatten(-1, (-1, self.head_size))).flatten(-2)
            for norm, x in ((self.q_norm, query), (self.k_norm, key))
        )
        return query, key


class SDARBlock(QwenBlock):
    """Pre-norm transformer block with block-causal grouped-query attention."""

    def __init__(self, config: SDARConfig) -> None:
        super().__init__(config, SDARAttention(config))


class SDARModel(QwenModel):
    """Embeddings, blocks and final norm, under the names of the published checkpoints."""

    block_class = SDARBlock

    def geometry(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: KeyValueCache | None,
        start: int,
    ) -> Geometry:
        """Positions, and the mask of the block rule in place of that of padding alone."""
        block = self.config.block_size
        if cache is not None:
            stop = start + input_ids.shape[1]
            geometry = super().geometry(input_ids, None, None, cache, start)
            # Without padding positions are columns, and all that is in the cache comes before the end of this block.
            if not cache.is_padded and start // block == (stop - 1) // block:
                return replace(geometry, key_mask=None)
            columns, attended = cache.position_ids[:, :stop], cache.attention_mask[:, :stop]
            return replace(geometry, key_mask=block_causal_mask(columns, attended, block, first_query=start))
        if position_ids is None:
            position_ids = padded_position_ids(input_ids, attention_mask)
        geometry = super().geometry(input_ids, attention_mask, position_ids, None, 0)
        return replace(geometry, key_mask=block_causal_mask(position_ids, attention_mask, block))


class SDARForMaskedDiffusion(QwenForMaskedDiffusion):
    """SDAR with its head. It is called like `LLaDAForMaskedDiffusion`, and logit i predicts token i.

    The block rule holds for whatever it is called with. An ``attention_mask`` of queries and keys takes further keys
    away, as `Policy.completion_log_probs` does. A ``cache`` must be one that grows, and be filled from left to right.
    """

    config_class = SDARConfig
    model_class = SDARModel
    # The name that transformers has for blocks. `blocks_of` finds by it what to compile, checkpoint and divide.
    _no_split_modules = ["SDARBlock"]

    @property
    def block_size(self) -> int:
        """The number of positions of a block, which `Policy` asks. Models without blocks have no such attribute."""
        return self.config.block_size


# By these lines transformers builds the published folders without their remote code.
AutoConfig.register("sdar", SDARConfig)
AutoTokenizer.register(SDARConfig, tokenizer_class=Qwen2Tokenizer)
AutoModelForMaskedLM.register(SDARConfig, SDARForMaskedDiffusion)
