"""LLaDA2.0 (arXiv 2512.15745) and LLaDA2.1 as a native transformers model: block-causal, with mixtures of experts.

A token sees its own completion block of 32, on both sides, and all earlier ones. They are not shifted: logit i predicts
token i.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from dmpo_lightning.models.families import Family, register
from dmpo_lightning.models.layers import RMSNorm, RotaryTables, Store, attention, take
from dmpo_lightning.models.mixture import Experts, MixtureMLP, Router, check_experts, stack_on_loading
from dmpo_lightning.models.native import NativeConfig, NativeModel
from dmpo_lightning.models.qwen import GatedMLP

FAMILY = Family(
    end_tokens=("<|endoftext|>", "<|role_end|>"),
    # Published tokenizers carry their own.
    chat_template=None,
    mask_token="<|mask|>",
)


class LLaDA2Config(NativeConfig):
    """Configuration of a LLaDA2. Its keys are the published ones, and its defaults those of LLaDA2.0-mini.

    Published configurations name neither ``block_size`` nor ``mask_token_id``, and have the defaults.

    Raises:
        ValueError: experts that their groups do not divide, or widths that are no multiples of 8.
    """

    model_type = "llada2_moe"
    fixed = {
        "use_bias": False,
        "use_qkv_bias": False,
        "use_qk_norm": True,
        "use_rmsnorm": True,
        "hidden_act": "silu",
        "norm_head": False,
        "norm_softmax": False,
        "norm_topk_prob": True,
        "score_function": "sigmoid",
        "router_dtype": "fp32",
        "moe_router_enable_expert_bias": True,
        "using_split_qkv_in_self_attention": False,
        "tie_word_embeddings": False,
    }
    routing = ("num_experts_per_tok", "n_group", "topk_group", "routed_scaling_factor")
    stated = (*NativeConfig.stated, *routing, "partial_rotary_factor")

    vocab_size: int = 157184
    hidden_size: int = 2048
    intermediate_size: int = 5120
    moe_intermediate_size: int = 512
    num_hidden_layers: int = 20
    first_k_dense_replace: int = 1
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    head_dim: int = 128
    num_experts: int = 256
    num_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 2.5
    max_position_embeddings: int = 16384
    rms_norm_eps: float = 1e-6
    rope_theta: float = 600000.0
    partial_rotary_factor: float = 0.5
    block_size: int = 32
    mask_token_id: int | None = 156895
    eos_token_id: int | list[int] | None = 156892
    pad_token_id: int | None = 156892
    bos_token_id: int | None = None
    tie_word_embeddings: bool = False

    def _check_numbers(self) -> None:
        super()._check_numbers()
        group, rest = divmod(self.num_experts, self.n_group)
        if rest or group < 2 or self.topk_group > self.n_group or self.num_experts_per_tok > self.topk_group * group:
            raise ValueError(
                "`num_experts` of LLaDA2 must be `n_group` groups of at least two, of which `topk_group` hold "
                f"`num_experts_per_tok`, got {self.num_experts}, {self.n_group}, {self.topk_group} and "
                f"{self.num_experts_per_tok}."
            )
        check_experts(self)


class GroupedRouter(Router):
    """Chooses among the best groups of experts, in float32 whatever the states are and whatever autocast says."""

    expert_bias: Tensor

    def __init__(self, config: LLaDA2Config) -> None:
        super().__init__(config)
        self.groups, self.kept_groups = config.n_group, config.topk_group
        self.scale = config.routed_scaling_factor
        # Balances the load of the experts. Pre-training moved it without a gradient, and nothing does now.
        self.register_buffer("expert_bias", torch.zeros(config.num_experts))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """The bias stays in float32 where a whole module is cast, as by a Trainer's precision."""
        bias = self.expert_bias
        super()._apply(fn, recurse)
        self.expert_bias = (
            self.expert_bias if self.expert_bias.dtype == bias.dtype else bias.to(self.expert_bias.device)
        )
        return self

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(h.device.type, enabled=False):
            scores = F.linear(h.float(), self.weight.float()).sigmoid()
        biased = scores + self.expert_bias
        # A group counts by its two best experts, and only those of the best groups are chosen from.
        grouped = biased.unflatten(-1, (self.groups, -1))
        kept = grouped.topk(2).values.sum(-1).topk(self.kept_groups).indices
        is_left_out = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(-1, kept, False)
        chosen = grouped.masked_fill(is_left_out[..., None], -torch.inf).flatten(-2).topk(self.k).indices
        # The bias decides who is chosen, and not how much it counts.
        weights = scores.gather(-1, chosen)
        return chosen, self.scale * (weights / (weights.sum(-1, keepdim=True) + 1e-20))


class FusedAttention(nn.Module):
    """Attention with one projection to queries, keys and values, and norms per head."""

    def __init__(self, config: LLaDA2Config) -> None:
        super().__init__()
        self.heads = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
        self.head_size = config.head_size
        self.query_key_value = nn.Linear(config.hidden_size, sum(self.heads) * self.head_size, bias=False)
        self.query_layernorm = RMSNorm(self.head_size, config.rms_norm_eps)
        self.key_layernorm = RMSNorm(self.head_size, config.rms_norm_eps)
        self.dense = nn.Linear(self.heads[0] * self.head_size, config.hidden_size, bias=False)

    def forward(
        self, h: Tensor, rotary: RotaryTables, mask: Tensor | None, store: Store | None = None, at: Tensor | None = None
    ) -> Tensor:
        """What attention adds to the states. With ``at`` ``[rows k]`` only to those of these columns."""
        query, key, value = self.query_key_value(h).unflatten(-1, (-1, self.head_size)).split(self.heads, -2)
        query, key = self.query_layernorm(take(query, at)), self.key_layernorm(key)
        return self.dense(attention(query, key, value, rotary, mask, store, at))


def mixture(config: LLaDA2Config) -> MixtureMLP:
    """Routed experts, and those that all tokens share."""
    shared = GatedMLP(config.hidden_size, config.moe_intermediate_size * config.num_shared_experts)
    return MixtureMLP(GroupedRouter(config), Experts(config), shared)


class LLaDA2Layer(GradientCheckpointingLayer):
    """Pre-norm transformer layer. The first ones have an MLP in the place of experts."""

    def __init__(self, config: LLaDA2Config, number: int) -> None:
        super().__init__()
        is_dense = number < config.first_k_dense_replace
        self.attention = FusedAttention(config)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size) if is_dense else mixture(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rotary: RotaryTables, mask: Tensor | None, store: Store | None = None, at: Tensor | None = None
    ) -> Tensor:
        """New states of all columns. With ``at`` ``[rows k]`` only of these, which still attend to the others."""
        x = take(x, at) + self.attention(self.input_layernorm(x), rotary, mask, store, at)
        return x + self.mlp(self.post_attention_layernorm(x))


class LLaDA2ForMaskedDiffusion(NativeModel):
    """LLaDA2 with its head."""

    config_class = LLaDA2Config
    # What transformers asks for, and `layers_of` finds by it what to compile, checkpoint and divide.
    _no_split_modules = ["LLaDA2Layer"]
    _keep_in_fp32_modules_strict = {"expert_bias"}

    def __init__(self, config: LLaDA2Config) -> None:
        super().__init__(config)
        self.model: Any = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(LLaDA2Layer(config, number) for number in range(config.num_hidden_layers)),
                "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GroupedRouter):
            init.zeros_(module.expert_bias)

    @property
    def block_size(self) -> int:
        """As the configuration states."""
        return self.config.block_size

    def layers_and_norm(self) -> tuple[Any, Any]:
        """As published."""
        return self.model.layers, self.model.norm

    def get_input_embeddings(self) -> nn.Module:
        return self.model.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model["word_embeddings"] = value


register(FAMILY, LLaDA2ForMaskedDiffusion, tokenizer_class=PreTrainedTokenizerFast)
stack_on_loading(LLaDA2Config.model_type)
