"""Dream (arXiv 2508.15487) and DiffuCoder as a native transformers model.

They have the shape of Qwen2 with bidirectional attention. They are *shifted*: as in the autoregressive model that they
were trained from, the hidden state at position i - 1 predicts the token at position i.
"""

from transformers import Qwen2Tokenizer

from dmpo_lightning.models.families import Family, register
from dmpo_lightning.models.qwen import QwenConfig, QwenModel

FAMILY = Family(
    end_tokens=("<|endoftext|>", "<|im_end|>"),
    chat_template=(
        "{% if messages[0]['role'] != 'system' %}"
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        "{% for message in messages %}"
        "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{{ '<|im_start|>assistant\n' }}"
    ),
)


class DreamConfig(QwenConfig):
    """Configuration of a Dream. Its keys and defaults are those of the published 7B models."""

    model_type = "Dream"
    fixed = {"hidden_act": "silu"}
    projection_bias = True

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1000000.0
    mask_token_id: int | None = 151666
    eos_token_id: int | list[int] | None = 151643
    pad_token_id: int | None = 151643
    bos_token_id: int | None = 151665
    tie_word_embeddings: bool = False


class DreamForMaskedDiffusion(QwenModel):
    """Dream with its head. Logit i predicts token i.

    The published model's own logit i predicts token i + 1. The shift is undone here, so that nobody else needs to know.
    """

    config_class = DreamConfig

    @property
    def lookback(self) -> int:
        """Shifted by one."""
        return 1


class DreamTokenizer(Qwen2Tokenizer):
    """Qwen2's tokenizer under the name that published folders give it, which otherwise comes with remote code."""


register(FAMILY, DreamForMaskedDiffusion, tokenizer_class=DreamTokenizer)
