"""LLaDA (arXiv 2502.09992) as a native transformers model, with the parameter names of the published checkpoints."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MaskedLMOutput

from dmpo_lightning.models.configuration import check_switches, rotary_base
from dmpo_lightning.models.family import Family
from dmpo_lightning.models.head import predict
from dmpo_lightning.models.kv_cache import KeyValueCache
from dmpo_lightning.models.layers import RMSNorm, Store, attention, take
from dmpo_lightning.models.native import Geometry, at_positions, run_blocks

FAMILY = Family(
    model_type="llada",
    end_tokens=("<|endoftext|>", "<|eot_id|>"),
    # The template adds the bos token itself, so that tokenising must not. It ends in an expression, because Jinja
    # strips a trailing newline of the template's own text.
    chat_template=(
        "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
        "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    ),
    block_linears=r".*transformer\.blocks\.\d+\.(q_proj|k_proj|v_proj|attn_out|ff_proj|up_proj|ff_out)",
)

_FIXED = {
    "activation_type": "silu",
    "block_type": "llama",
    "layer_norm_type": "rms",
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
"""Switches that the published configuration has, but that all published LLaDA models set alike."""


class LLaDAConfig(PreTrainedConfig):
    """Configuration of a LLaDA. Its keys and defaults are those of the published 8B model.

    Raises:
        ValueError: numbers of heads that do not divide the width, or each other, or into even head sizes. A switch that
            no published LLaDA sets so. A mixture of experts, which calls itself a LLaDA too.
    """

    model_type = "llada"
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
    initializer_range: float = 0.02
    mask_token_id: int | None = 126336
    eos_token_id: int | list[int] | None = 126081
    pad_token_id: int | None = 126081
    bos_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.n_kv_heads = self.n_heads if self.n_kv_heads is None else self.n_kv_heads
        self.embedding_size = self.vocab_size if self.embedding_size is None else self.embedding_size
        # Even head sizes, because rotary positions pair a head's dimensions.
        if self.d_model % self.n_heads or self.n_heads % self.n_kv_heads or (self.d_model // self.n_heads) % 2:
            raise ValueError(
                "`n_heads` must divide `d_model` into even head sizes and be a multiple of `n_kv_heads`, "
                f"got {self.n_heads}, {self.d_model} and {self.n_kv_heads}."
            )
        # Its other keys would be read as those of a dense model of other sizes.
        if kwargs.get("num_experts"):
            raise ValueError(
                f"LLaDA-MoE is not supported: its router and its {kwargs['num_experts']} experts per layer are not "
                "built here. Use a dense LLaDA (GSAI-ML/LLaDA-8B-Instruct, LLaDA-1.5)."
            )
        check_switches("LLaDA", _FIXED, {"tie_word_embeddings": self.tie_word_embeddings} | kwargs)
        self.rope_theta = rotary_base("LLaDA", kwargs, self.rope_theta)
        super().__post_init__(**kwargs)


class LLaDABlock(GradientCheckpointingLayer):
    """Pre-norm transformer block with bidirectional attention and a SiLU-gated MLP."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        width, head_size = config.d_model, config.d_model // config.n_heads
        key_heads = config.n_kv_heads or config.n_heads
        self.head_size = head_size
        self.attn_norm = RMSNorm(width, config.rms_norm_eps)
        self.ff_norm = RMSNorm(width, config.rms_norm_eps)
        self.q_proj = nn.Linear(width, config.n_heads * head_size, bias=False)
        self.k_proj = nn.Linear(width, key_heads * head_size, bias=False)
        self.v_proj = nn.Linear(width, key_heads * head_size, bias=False)
        self.attn_out = nn.Linear(config.n_heads * head_size, width, bias=False)
        self.ff_proj = nn.Linear(width, config.mlp_hidden_size, bias=False)
        self.up_proj = nn.Linear(width, config.mlp_hidden_size, bias=False)
        self.ff_out = nn.Linear(config.mlp_hidden_size, width, bias=False)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        key_mask: Tensor | None,
        store: Store | None = None,
        at: Tensor | None = None,
    ) -> Tensor:
        """New states of all columns. With ``at`` ``[rows k]`` only of these, which still attend to the others."""
        h = self.attn_norm(x)
        # Queries alone are cut down: every column is still a key and a value to them.
        mixed = attention(
            self.q_proj(take(h, at)), self.k_proj(h), self.v_proj(h), self.head_size, rotary, key_mask, store, at
        )
        x = take(x, at) + self.attn_out(mixed)
        h = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))


class LLaDAModel(nn.Module):
    """Embeddings, blocks, final norm and head, under the published name ``model.transformer``.

    The head is held here but not run.
    """

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.config = config
        vocab_size = config.embedding_size or config.vocab_size
        self.transformer: Any = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, config.d_model),
                "blocks": nn.ModuleList(LLaDABlock(config) for _ in range(config.n_layers)),
                "ln_f": RMSNorm(config.d_model, config.rms_norm_eps),
                # Called like the last layer of a block, as published. `LoRA` sees to it that this is no trap.
                "ff_out": nn.Linear(config.d_model, vocab_size, bias=False),
            }
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        at: Tensor | None = None,
        cache: KeyValueCache | None = None,
        start: int = 0,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Final hidden states, normalised: ``[rows length d_model]``, or those at flat indices ``at``."""
        head_size, theta = self.config.d_model // self.config.n_heads, self.config.rope_theta
        geometry = Geometry.of(input_ids, attention_mask, position_ids, cache, start, head_size=head_size, theta=theta)
        x = run_blocks(self.transformer["blocks"], self.transformer["wte"](input_ids), geometry, at)
        return at_positions(self.transformer["ln_f"](x), at, input_ids.shape[0])


class LLaDAForMaskedDiffusion(PreTrainedModel):
    """LLaDA with its head. Logit i predicts token i.

    Example:
        ```python
        model = LLaDAForMaskedDiffusion.from_pretrained("GSAI-ML/LLaDA-8B-Instruct", dtype=torch.bfloat16)
        logits = model(input_ids, attention_mask).logits
        ```
    """

    config_class = LLaDAConfig
    base_model_prefix = "model"
    predicts_at_positions = True
    """Whether the forward takes ``positions`` and ``targets``, which `Policy` asks."""
    is_native = True
    """Whether the forward takes a ``cache`` and ``position_ids`` as well, which `Policy` asks."""
    lookback = 0
    """How many columns before its own the hidden state stands from which a logit is computed."""
    supports_gradient_checkpointing = True
    # The name that transformers has for blocks. `blocks_of` finds by it what to compile, checkpoint and divide.
    _no_split_modules = ["LLaDABlock"]
    _supports_sdpa = True
    main_input_name = "input_ids"

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        self.model = LLaDAModel(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.transformer["wte"]

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.transformer["wte"] = value

    def get_output_embeddings(self) -> nn.Module:
        return self.model.transformer["ff_out"]

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.model.transformer["ff_out"] = value

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
        """Logits at all positions, or logits or log-probs at those asked for.

        Args:
            input_ids: ``[rows length]``.
            attention_mask: ``[rows length]``, 1 or True where attended. Left padding is masked and takes no position.
            positions: flat indices into ``rows x length``, of any shape. The head is computed there only. In the shape
                ``[rows k]`` each row's indices must lie in that row, and the last block is computed there only too.
            targets: token ids shaped like ``positions``. Their float32 log-probs are returned instead of logits.
            logit_bias: ``[vocab]``, added to the logits. Minus infinity bans a token.
            temperature: divides the logits before log-probs are taken. Logits that are returned are not divided.
            cache: keys and values of all columns. ``input_ids`` are then those of the columns from ``start`` on, and
                the cache's own mask takes the place of ``attention_mask``.
            start: the first column of ``input_ids``, with a cache.
            position_ids: ``[rows length]``. None counts attended tokens. With them ``attention_mask`` may also be
                ``[rows length length]``, queries by keys.
            return_dict: accepted because transformers passes it, and ignored.

        Returns:
            `MaskedLMOutput` without ``positions``, and a tensor of logits or log-probs with it.
        """
        hidden = self.model(input_ids, attention_mask, positions, cache, start, position_ids)
        return predict(self.get_output_embeddings(), hidden, positions, targets, logit_bias, temperature)


# By these lines transformers builds the published folders without their remote code.
AutoConfig.register("llada", LLaDAConfig)
AutoModelForMaskedLM.register(LLaDAConfig, LLaDAForMaskedDiffusion)
