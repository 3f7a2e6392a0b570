"""What Dream, iLLaDA and SDAR share, of the shape of Qwen and Llama and under their tensor names: blocks to head."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MaskedLMOutput

from dmpo_lightning.models.configuration import head_size
from dmpo_lightning.models.head import predict
from dmpo_lightning.models.kv_cache import KeyValueCache
from dmpo_lightning.models.layers import RMSNorm, Store, attention, take
from dmpo_lightning.models.native import Geometry, at_positions, run_blocks

BLOCK_LINEARS = r".*layers\.\d+\.(self_attn\.(q_proj|k_proj|v_proj|o_proj)|mlp\.(gate_proj|up_proj|down_proj))"
"""The linear layers of the blocks, which adapters adapt."""


class GatedMLP(nn.Module):
    """SiLU-gated MLP without biases."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class GroupedAttention(nn.Module):
    """Attention whose heads share keys and values in groups.

    With ``bias`` the projections of query, key and value have one. The output projection never has.
    """

    def __init__(self, config: Any, *, bias: bool = False) -> None:
        super().__init__()
        self.head_size = head_size(config)
        width, key_width = (n * self.head_size for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, key_width, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, key_width, bias=bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def normalised(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys, heads side by side, as they are rotated. Families may normalise them."""
        return query, key

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
        query, key = self.normalised(self.q_proj(take(h, at)), self.k_proj(h))
        return self.o_proj(attention(query, key, self.v_proj(h), self.head_size, rotary, key_mask, store, at))


class QwenBlock(GradientCheckpointingLayer):
    """Pre-norm transformer block around an attention of the family's own.

    Families derive a class of their own, because `_no_split_modules` names blocks by their class.
    """

    def __init__(self, config: Any, attention: nn.Module) -> None:
        super().__init__()
        self.self_attn = attention
        self.mlp = GatedMLP(config)
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


class QwenModel(nn.Module):
    """Embeddings, blocks and final norm, under the names of the published checkpoints."""

    block_class: Any
    """Constructs a block from the configuration."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers: Any = nn.ModuleList(self.block_class(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def geometry(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: KeyValueCache | None,
        start: int,
    ) -> Geometry:
        """Positions, and who sees whom: every token all that are not padding."""
        size, theta = head_size(self.config), self.config.rope_theta
        return Geometry.of(input_ids, attention_mask, position_ids, cache, start, head_size=size, theta=theta)

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
        geometry = self.geometry(input_ids, attention_mask, position_ids, cache, start)
        states = self.norm(run_blocks(self.layers, self.embed_tokens(input_ids), geometry, at))
        return at_positions(states, at, input_ids.shape[0])


class QwenForMaskedDiffusion(PreTrainedModel):
    """The model with its head. It is called like `LLaDAForMaskedDiffusion`, and logit i predicts token i."""

    base_model_prefix = "model"
    model_class: Any
    """Constructs the model below the head from the configuration."""
    predicts_at_positions = True
    """Whether the forward takes ``positions`` and ``targets``, which `Policy` asks."""
    is_native = True
    """Whether the forward takes a ``cache`` and ``position_ids`` as well, which `Policy` asks."""
    lookback = 0
    """How many columns before its own the hidden state stands from which a logit is computed.

    A forward with a cache that computes some columns has to begin this many columns earlier.
    """
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    main_input_name = "input_ids"
    # In effect only where the configuration ties them.
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def state_positions(self, input_ids: Tensor, positions: Tensor | None) -> Tensor | None:
        """The flat indices of the hidden states that predict the tokens at ``positions``. None is all in order."""
        return positions

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
        at = self.state_positions(input_ids, positions)
        hidden = self.model(input_ids, attention_mask, at, cache, start, position_ids)
        return predict(self.lm_head, hidden, positions, targets, logit_bias, temperature)
