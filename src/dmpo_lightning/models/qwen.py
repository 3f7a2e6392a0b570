"""The shape of Qwen and Llama, which Dream, iLLaDA and SDAR share under its tensor names."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from dmpo_lightning.models.layers import RMSNorm, RotaryTables, Store, attention, take
from dmpo_lightning.models.native import NativeConfig, NativeModel


class QwenConfig(NativeConfig):
    """A configuration in the keys of Qwen and Llama, and what its attention has beside the projections."""

    projection_bias = False
    """Whether the projections to queries, keys and values have biases, as in Qwen2. The one back never has."""
    head_norms = False
    """Whether queries and keys are normalised head by head before they are rotated, as in Qwen3."""


class GroupedAttention(nn.Module):
    """Attention whose heads share keys and values in groups."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.head_size = config.head_size
        width, key_width = (n * self.head_size for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.projection_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=config.projection_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=config.projection_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.q_norm, self.k_norm = (
            RMSNorm(self.head_size, config.rms_norm_eps) if config.head_norms else nn.Identity() for _ in range(2)
        )

    def forward(
        self, h: Tensor, rotary: RotaryTables, mask: Tensor | None, store: Store | None = None, at: Tensor | None = None
    ) -> Tensor:
        """What attention adds to the states. With ``at`` ``[rows k]`` only to those of these columns."""
        # Queries alone are cut down: every column is still a key and a value to them.
        projected = self.q_proj(take(h, at)), self.k_proj(h), self.v_proj(h)
        query, key, value = (x.unflatten(-1, (-1, self.head_size)) for x in projected)
        return self.o_proj(attention(self.q_norm(query), self.k_norm(key), value, rotary, mask, store, at))


class GatedMLP(nn.Module):
    """SiLU-gated MLP without biases."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class QwenLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer."""

    def __init__(self, config: Any, mlp: nn.Module) -> None:
        super().__init__()
        self.self_attn = GroupedAttention(config)
        self.mlp = mlp
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rotary: RotaryTables, mask: Tensor | None, store: Store | None = None, at: Tensor | None = None
    ) -> Tensor:
        """New states of all columns. With ``at`` ``[rows k]`` only of these, which still attend to the others."""
        x = take(x, at) + self.self_attn(self.input_layernorm(x), rotary, mask, store, at)
        return x + self.mlp(self.post_attention_layernorm(x))


class QwenModel(NativeModel):
    """Embeddings, layers, norm and head, where transformers' own accessors find them."""

    # What transformers asks for, and `layers_of` finds by it what to compile, checkpoint and divide.
    _no_split_modules = ["QwenLayer"]
    # In effect only where the configuration ties them.
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model: Any = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(
                    QwenLayer(config, self.mlp_of(config)) for _ in range(config.num_hidden_layers)
                ),
                "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @staticmethod
    def mlp_of(config: Any) -> nn.Module:
        """What a new layer has behind its attention."""
        return GatedMLP(config.hidden_size, config.intermediate_size)

    def layers_and_norm(self) -> tuple[Any, Any]:
        """As published."""
        return self.model.layers, self.model.norm
