"""SDAR (arXiv 2510.06303), and TraDo and DiRL, which are trained from it, as a native transformers model.

They have the shape of Qwen3 with block-causal attention: a token sees its own completion block, on both sides, and all
earlier ones. They are not shifted: logit i predicts token i.
"""

from transformers import Qwen2Tokenizer

from dmpo_lightning.models.families import Family, register
from dmpo_lightning.models.qwen import QwenConfig, QwenModel

FAMILY = Family(
    end_tokens=("<|endoftext|>", "<|im_end|>"),
    chat_template=(
        "{% for message in messages %}"
        "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{{ '<|im_start|>assistant\n' }}"
    ),
    mask_token="<|MASK|>",
)


class SDARConfig(QwenConfig):
    """Configuration of an SDAR. Its keys are the published ones, and its defaults those of the 8B model.

    Published configurations that name neither ``block_size`` nor ``mask_token_id`` have the defaults.
    """

    model_type = "sdar"
    fixed = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}
    head_norms = True

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
    block_size: int = 4
    mask_token_id: int | None = 151669
    eos_token_id: int | list[int] | None = 151643
    pad_token_id: int | None = 151643
    bos_token_id: int | None = 151643
    tie_word_embeddings: bool = False


class SDARForMaskedDiffusion(QwenModel):
    """SDAR with its head."""

    config_class = SDARConfig

    @property
    def block_size(self) -> int:
        """As the configuration states."""
        return self.config.block_size


register(FAMILY, SDARForMaskedDiffusion, tokenizer_class=Qwen2Tokenizer)
