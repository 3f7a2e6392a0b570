"""LLaDA (arXiv 2502.09992) as a native transformers model, with the parameter names of the published checkpoints."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from dmpo_lightning.models.families import Family, register
from dmpo_lightning.models.layers import RMSNorm, RotaryTables, Store, attention, take
from dmpo_lightning.models.native import NativeConfig, NativeModel

FAMILY = Family(
    end_tokens=("<|endoftext|>", "<|eot_id|>"),
    # The template adds the bos token itself, so that tokenising must not. It ends in an expression, because Jinja
    # strips a trailing newline of the template's own text.
    chat_template=(
        "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
        "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    ),
)


class LLaDAConfig(NativeConfig):
    """Configuration of a LLaDA. Its keys and defaults are those of the published 8B model."""

    model_type = "llada"
    fixed = {
        "activation_type": "silu",
        "block_type": "llama",
        "layer_norm_type": "rms",
        "multi_query_attention": False,
        "alibi": False,
        "attention_layer_norm": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "input_emb_norm": False,
        "rope": True,
        "rope_full_precision": True,
        "scale_logits": False,
        "tie_word_embeddings": False,
        "weight_tying": False,
    }
    attribute_map = {
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
    }

    d_model: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    mlp_hidden_size: int = 12288
    vocab_size: int = 126464
    embedding_size: int | None = None
    max_sequence_length: int = 4096
    rope_theta: float = 500000.0
    rms_norm_eps: float = 1e-5
    mask_token_id: int | None = 126336
    eos_token_id: int | list[int] | None = 126081
    pad_token_id: int | None = 126081
    bos_token_id: int | None = None
    tie_word_embeddings: bool = False

    @property
    def logit_width(self) -> int:
        """The number of logits per position: the embedding, and thereby the head, may be wider than the vocabulary."""
        return self.embedding_size or self.vocab_size

    def __post_init__(self, **kwargs: Any) -> None:
        self.n_kv_heads = self.n_heads if self.n_kv_heads is None else self.n_kv_heads
        self.embedding_size = self.vocab_size if self.embedding_size is None else self.embedding_size
        super().__post_init__(**kwargs)


class LLaDALayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer with bidirectional attention and a SiLU-gated MLP."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        width, inner, self.head_size = config.d_model, config.mlp_hidden_size, config.head_size
        key_width = (config.n_kv_heads or config.n_heads) * self.head_size
        self.attn_norm = RMSNorm(width, config.rms_norm_eps)
        self.ff_norm = RMSNorm(width, config.rms_norm_eps)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, key_width, bias=False)
        self.v_proj = nn.Linear(width, key_width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.ff_out = nn.Linear(inner, width, bias=False)

    def forward(
        self, x: Tensor, rotary: RotaryTables, mask: Tensor | None, store: Store | None = None, at: Tensor | None = None
    ) -> Tensor:
        """New states of all columns. With ``at`` ``[rows k]`` only of these, which still attend to the others."""
        h = self.attn_norm(x)
        # Queries alone are cut down: every column is still a key and a value to them.
        projected = self.q_proj(take(h, at)), self.k_proj(h), self.v_proj(h)
        query, key, value = (each.unflatten(-1, (-1, self.head_size)) for each in projected)
        x = take(x, at) + self.attn_out(attention(query, key, value, rotary, mask, store, at))
        h = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))


class LLaDAForMaskedDiffusion(NativeModel):
    """LLaDA with its head.

    Example:
        ```python
        model = LLaDAForMaskedDiffusion.from_pretrained("GSAI-ML/LLaDA-8B-Instruct", dtype=torch.bfloat16)
        logits = model(input_ids, attention_mask).logits
        ```
    """

    config_class = LLaDAConfig
    # What transformers asks for, and `layers_of` finds by it what to compile, checkpoint and divide.
    _no_split_modules = ["LLaDALayer"]

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        parts = {
            "wte": nn.Embedding(config.logit_width, config.d_model),
            "blocks": nn.ModuleList(LLaDALayer(config) for _ in range(config.n_layers)),
            "ln_f": RMSNorm(config.d_model, config.rms_norm_eps),
            # Called like the last linear of each layer, as published. `LoRA` sees to it that this is no trap.
            "ff_out": nn.Linear(config.d_model, config.logit_width, bias=False),
        }
        self.model: Any = nn.ModuleDict({"transformer": nn.ModuleDict(parts)})
        self.post_init()

    def layers_and_norm(self) -> tuple[Any, Any]:
        """As published."""
        return self.model.transformer["blocks"], self.model.transformer["ln_f"]

    def get_input_embeddings(self) -> nn.Module:
        return self.model.transformer["wte"]

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.transformer["wte"] = value

    def get_output_embeddings(self) -> nn.Module:
        return self.model.transformer["ff_out"]

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.model.transformer["ff_out"] = value


register(FAMILY, LLaDAForMaskedDiffusion)
