"""Causal models of the shapes of Llama, Qwen2 and Qwen3 that were made masked diffusion models by `adapt`.

Their tensors keep their names. The configuration says what became of the attention, which is bidirectional or
block-causal, and whether a hidden state still predicts the token behind it (arXiv 2410.17891), as Dream's does.
"""

from dmpo_lightning.models.families import Family, register
from dmpo_lightning.models.qwen import QwenConfig, QwenModel

# The tokenizer is that of the causal model, with its own template and end token.
FAMILY = Family(end_tokens=(), chat_template=None)


class AdaptedConfig(QwenConfig):
    """Configuration of an adapted causal model, in the keys of Llama and Qwen. Its defaults are those of SmolLM2-135M.

    Args:
        projection_bias: queries, keys and values have biases, as in Qwen2.
        head_norms: queries and keys are normalised head by head, as in Qwen3.
        block_size: positions of a completion block. None lets every token see all others. With blocks of 1 and the
            shift the network is the causal model.
        shift: the hidden state at position i - 1 predicts the token at position i, as in the causal model.
    """

    model_type = "adapted_causal"
    fixed = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}
    stated = (*QwenConfig.stated, "shift")

    vocab_size: int = 49153
    hidden_size: int = 576
    intermediate_size: int = 1536
    num_hidden_layers: int = 30
    num_attention_heads: int = 9
    num_key_value_heads: int = 3
    head_dim: int = 64
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-5
    rope_theta: float = 100000.0
    projection_bias: bool = False
    head_norms: bool = False
    block_size: int | None = None
    shift: bool = True
    mask_token_id: int | None = 49152
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 2
    bos_token_id: int | None = 1
    tie_word_embeddings: bool = True

    def _check_numbers(self) -> None:
        super()._check_numbers()
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"`block_size` must be at least 1, or null for none, got {self.block_size}.")


class AdaptedForMaskedDiffusion(QwenModel):
    """An adapted causal model with its head."""

    config_class = AdaptedConfig

    @property
    def block_size(self) -> int | None:
        """As the configuration states."""
        return self.config.block_size

    @property
    def lookback(self) -> int:
        """1 where the shift was kept."""
        return int(self.config.shift)


register(FAMILY, AdaptedForMaskedDiffusion)
