"""SDAR (arXiv 2510.06303), and TraDo and DiRL, which are trained from it, as a native transformers model.

They have the shape of Qwen3 with block-causal attention: a token sees its own block, on both sides, and all earlier
blocks. They are not shifted: logit i predicts token i.
"""

from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Tokenizer,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MaskedLMOutput

from dmpo_lightning.models.block_causal import block_causal_mask
from dmpo_lightning.models.family import Family
from dmpo_lightning.models.head import predict
from dmpo_lightning.models.kv_cache import KeyValueCache
from dmpo_lightning.models.layers import RMSNorm, Store, attention, padded_position_ids, take
from dmpo_lightning.models.native import Geometry, at_positions, run_blocks

FAMILY = Family(
    model_type="sdar",
    end_tokens=("<|endoftext|>", "<|im_end|>"),
    chat_template=(
        "{% for message in messages %}"
        "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{{ '<|im_start|>assistant\n' }}"
    ),
    block_linears=r".*layers\.\d+\.(self_attn\.(q_proj|k_proj|v_proj|o_proj)|mlp\.(gate_proj|up_proj|down_proj))",
    mask_token="<|MASK|>",
)

_FIXED = {"attention_bias": False, "hidden_act": "silu", "use_sliding_window": False}
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
        for name, value in _FIXED.items():
            # A switch that is not implemented would be ignored without a word otherwise.
            if kwargs.get(name, value) != value:
                raise ValueError(
                    f"SDAR with {name}={kwargs[name]!r} is not supported; published checkpoints have {value!r}."
                )
        rope = kwargs.get("rope_scaling") or kwargs.get("rope_parameters") or {}
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            raise ValueError(f"SDAR with scaled rotary positions is not supported, got {rope}.")
        self.rope_theta = rope.get("rope_theta", self.rope_theta)
        super().__post_init__(**kwargs)


class SDARAttention(nn.Module):
    """Attention without biases, whose queries and keys are normalised head by head before they are rotated."""

    def __init__(self, config: SDARConfig) -> None:
        super().__init__()
        self.head_size = config.head_dim
        width, key_width = (n * self.head_size for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_size, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_size, config.rms_norm_eps)

    def forward(
        self,
        h: Tensor,
        rotary: tuple[Tensor, Tensor],
        key_mask: Tensor | None,
        store: Store | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """What attention adds to the states. With ``at`` ``[rows k]`` only to those of these columns."""
        # Queries alone are cut down: every column is still a key and a value to them.
        query, key = self.q_proj(take(h, at)), self.k_proj(h)
        query, key = (
            norm(x.unflatten(-1, (-1, self.head_size))).flatten(-2)
            for norm, x in ((self.q_norm, query), (self.k_norm, key))
        )
        return self.o_proj(attention(query, key, self.v_proj(h), self.head_size, rotary, key_mask, store, at))


class SDARMLP(nn.Module):
    """SiLU-gated MLP without biases."""

    def __init__(self, config: SDARConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class SDARBlock(GradientCheckpointingLayer):
    """Pre-norm transformer block with grouped-query attention."""

    def __init__(self, config: SDARConfig) -> None:
        super().__init__()
        self.self_attn = SDARAttention(config)
        self.mlp = SDARMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        key_mask: Tensor | None,
        store: Store | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """New states of all columns. With ``at`` ``[rows k]`` only of these, which still attend to the others."""
        x = take(x, at) + self.self_attn(self.input_layernorm(x), rotary, key_mask, store, at)
        return x + self.mlp(self.post_attention_layernorm(x))


class SDARModel(nn.Module):
    """Embeddings, blocks and final norm, under the names of the published checkpoints."""

    def __init__(self, config: SDARConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers: Any = nn.ModuleList(SDARBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        at: Tensor | None = None,
        cache: KeyValueCache | None = None,
        start: int = 0,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states, normalised: ``[rows length hidden_size]``, or those at flat indices ``at``."""
        geometry = self._geometry(input_ids, attention_mask, position_ids, cache, start)
        states = self.norm(run_blocks(self.layers, self.embed_tokens(input_ids), geometry, at))
        return at_positions(states, at, input_ids.shape[0])

    def _geometry(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: KeyValueCache | None,
        start: int,
    ) -> Geometry:
        """Positions, and the mask of the block rule in place of that of padding alone."""
        size, theta, block = self.config.head_dim, self.config.rope_theta, self.config.block_size
        if cache is not None:
            stop = start + input_ids.shape[1]
            geometry = Geometry.of(input_ids, None, None, cache, start, head_size=size, theta=theta)
            # Without padding positions are columns, and all that is in the cache comes before the end of this block.
            if not cache.is_padded and start // block == (stop - 1) // block:
                return replace(geometry, key_mask=None)
            columns, attended = cache.position_ids[:, :stop], cache.attention_mask[:, :stop]
            return replace(geometry, key_mask=block_causal_mask(columns, attended, block, first_query=start))
        if position_ids is None:
            position_ids = padded_position_ids(input_ids, attention_mask)
        geometry = Geometry.of(input_ids, attention_mask, position_ids, None, 0, head_size=size, theta=theta)
        return replace(geometry, key_mask=block_causal_mask(position_ids, attention_mask, block))


class SDARForMaskedDiffusion(PreTrainedModel):
    """SDAR with its head. It is called like `LLaDAForMaskedDiffusion`, and logit i predicts token i.

    The block rule holds for whatever it is called with. An ``attention_mask`` of queries and keys takes further keys
    away, as `Policy.completion_log_probs` does. A ``cache`` must be one that grows, and be filled from left to right.
    """

    config_class = SDARConfig
    base_model_prefix = "model"
    predicts_at_positions = True
    """Whether the forward takes ``positions`` and ``targets``, which `Policy` asks."""
    is_native = True
    """Whether the forward takes a ``cache`` and ``position_ids`` as well, which `Policy` asks."""
    lookback = 0
    """How many columns before its own the hidden state stands from which a logit is computed."""
    supports_gradient_checkpointing = True
    # The name that transformers has for blocks. `blocks_of` finds by it what to compile, checkpoint and divide.
    _no_split_modules = ["SDARBlock"]
    _supports_sdpa = True
    # In effect only where the configuration ties them.
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    main_input_name = "input_ids"

    def __init__(self, config: SDARConfig) -> None:
        super().__init__(config)
        self.model = SDARModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @property
    def block_size(self) -> int:
        """The number of positions of a block, which `Policy` asks. Models without blocks have no such attribute."""
        return self.config.block_size

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        targets: Tensor | None = None,
        logit_bias: Tensor | None = None,
        temperature: float = 1.0,
        cache: KeyValueCache | None = None,
        start: int = 0,
        position_ids: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> MaskedLMOutput | Tensor:
        """Logits or log-probs aligned to positions, with the arguments of `LLaDAForMaskedDiffusion.forward`."""
        hidden = self.model(input_ids, attention_mask, positions, cache, start, position_ids)
        return predict(self.lm_head, hidden, positions, targets, logit_bias, temperature)


# By these lines transformers builds the published folders without their remote code.
AutoConfig.register("sdar", SDARConfig)
AutoTokenizer.register(SDARConfig, tokenizer_class=Qwen2Tokenizer)
AutoModelForMaskedLM.register(SDARConfig, SDARForMaskedDiffusion)
