"""Dream (arXiv 2508.15487) and DiffuCoder as a native transformers model.

They have the shape of Qwen2 with bidirectional attention. They are *shifted*: as in the autoregressive model that they
were trained from, the hidden state at position i - 1 predicts the token at position i.
"""

from typing import Any

import torch
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

from dmpo_lightning.models.family import Family
from dmpo_lightning.models.head import predict
from dmpo_lightning.models.kv_cache import KeyValueCache
from dmpo_lightning.models.layers import RMSNorm, Store, attention, take
from dmpo_lightning.models.native import Geometry, at_positions, run_blocks

FAMILY = Family(
    model_type="Dream",
    end_tokens=("<|endoftext|>", "<|im_end|>"),
    chat_template=(
        "{% if messages[0]['role'] != 'system' %}"
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        "{% for message in messages %}"
        "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{{ '<|im_start|>assistant\n' }}"
    ),
    block_linears=r".*layers\.\d+\.(self_attn\.(q_proj|k_proj|v_proj|o_proj)|mlp\.(gate_proj|up_proj|down_proj))",
)


class DreamConfig(PreTrainedConfig):
    """Configuration of a Dream. Its keys and defaults are those of the published 7B models.

    Raises:
        ValueError: numbers of heads that do not divide the width, or each other, or into even head sizes.
    """

    model_type = "Dream"

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1000000.0
    initializer_range: float = 0.02
    mask_token_id: int | None = 151666
    eos_token_id: int | list[int] | None = 151643
    pad_token_id: int | None = 151643
    bos_token_id: int | None = 151665
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: object) -> None:
        heads, width = self.num_attention_heads, self.hidden_size
        # Even head sizes, because rotary positions pair a head's dimensions.
        if width % heads or heads % self.num_key_value_heads or (width // heads) % 2:
            raise ValueError(
                "`num_attention_heads` must divide `hidden_size` into even head sizes and be a multiple of "
                f"`num_key_value_heads`, got {heads}, {width} and {self.num_key_value_heads}."
            )
        super().__post_init__(**kwargs)


class DreamAttention(nn.Module):
    """Attention whose projections of query, key and value have biases, and whose output projection has none."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        self.head_size = config.hidden_size // config.num_attention_heads
        key_width = config.num_key_value_heads * self.head_size
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, key_width)
        self.v_proj = nn.Linear(config.hidden_size, key_width)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

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
        queries = take(h, at)
        return self.o_proj(
            attention(self.q_proj(queries), self.k_proj(h), self.v_proj(h), self.head_size, rotary, key_mask, store, at)
        )


class DreamMLP(nn.Module):
    """SiLU-gated MLP without biases."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class DreamBlock(GradientCheckpointingLayer):
    """Pre-norm transformer block with bidirectional grouped-query attention."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        self.self_attn = DreamAttention(config)
        self.mlp = DreamMLP(config)
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


class DreamModel(nn.Module):
    """Embeddings, blocks and final norm, under the names of the published checkpoints."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers: Any = nn.ModuleList(DreamBlock(config) for _ in range(config.num_hidden_layers))
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
        """Final hidden states, normalised but not shifted: ``[rows length hidden_size]``, or those at flat indices."""
        head_size, theta = self.config.hidden_size // self.config.num_attention_heads, self.config.rope_theta
        geometry = Geometry.of(input_ids, attention_mask, position_ids, cache, start, head_size=head_size, theta=theta)
        states = self.norm(run_blocks(self.layers, self.embed_tokens(input_ids), geometry, at))
        return at_positions(states, at, input_ids.shape[0])


class DreamForMaskedDiffusion(PreTrainedModel):
    """Dream with its head. It is called like `LLaDAForMaskedDiffusion`, and logit i predicts token i.

    The published model's own logit i predicts token i + 1. The shift is undone here, so that nobody else needs to know.
    """

    config_class = DreamConfig
    base_model_prefix = "model"
    predicts_at_positions = True
    """Whether the forward takes ``positions`` and ``targets``, which `Policy` asks."""
    is_native = True
    """Whether the forward takes a ``cache`` and ``position_ids`` as well, which `Policy` asks."""
    lookback = 1
    """How many columns before its own the hidden state stands from which a logit is computed.

    A forward with a cache that computes some columns has to begin this many columns earlier.
    """
    supports_gradient_checkpointing = True
    # The name that transformers has for blocks. `blocks_of` finds by it what to compile, checkpoint and divide.
    _no_split_modules = ["DreamBlock"]
    _supports_sdpa = True
    main_input_name = "input_ids"

    def __init__(self, config: DreamConfig) -> None:
        super().__init__(config)
        self.model = DreamModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

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
        length = input_ids.shape[1]
        columns = torch.arange(input_ids.numel(), device=input_ids.device).view_as(input_ids)
        # All positions are listed as well, because their states are shifted: the first counts twice, the last never.
        wanted = columns if positions is None else positions
        # The hidden state one column to the left in the same row; the first column has no left neighbour and, as in the
        # published code, predicts itself.
        behind = wanted - (wanted % length > 0).long()
        hidden = self.model(input_ids, attention_mask, behind, cache, start, position_ids)
        return predict(self.lm_head, hidden, positions, targets, logit_bias, temperature)


class DreamTokenizer(Qwen2Tokenizer):
    """Qwen2's tokenizer under the name that published folders give it, which otherwise comes with remote code."""


# By these lines transformers builds the published folders without their remote code.
AutoConfig.register("Dream", DreamConfig)
AutoTokenizer.register(DreamConfig, tokenizer_class=DreamTokenizer)
AutoModelForMaskedLM.register(DreamConfig, DreamForMaskedDiffusion)
