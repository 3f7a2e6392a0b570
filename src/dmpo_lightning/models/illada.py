"""iLLaDA (arXiv 2606.25331) as a native transformers model.

It has the shape of Llama with bidirectional attention, grouped keys and a tied head. It is not shifted: logit i
predicts token i.
"""

from transformers import PreTrainedTokenizerFast

from dmpo_lightning.models.families import Family, register
from dmpo_lightning.models.qwen import QwenConfig, QwenModel

FAMILY = Family(
    # A turn and a text end alike, with the tokenizer's own eos token.
    end_tokens=(),
    # The tokenizer of the Instruct model carries its own.
    chat_template=None,
    mask_token="<[MASK]>",
)


class ILLaDAConfig(QwenConfig):
    """Configuration of an iLLaDA, with the keys that the published code reads.

    Sizes and tokens are those of the published 8B models, which name no ``mask_token_id``. ``rope_theta`` and
    ``rms_norm_eps`` are those of Seed-Coder-8B, which has the same shape and vocabulary, and hold for new models alone:
    a config.json has to state them. Dropout is that of pre-training and is not applied.
    """

    model_type = "illada"
    # In the setting that has the published number of parameters.
    fixed = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "layer_norm_eps": None}

    vocab_size: int = 155136
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-6
    rope_theta: float = 500000.0
    mask_token_id: int | None = 5
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    tie_word_embeddings: bool = True


class ILLaDAForMaskedDiffusion(QwenModel):
    """iLLaDA with its head."""

    config_class = ILLaDAConfig


register(FAMILY, ILLaDAForMaskedDiffusion, tokenizer_class=PreTrainedTokenizerFast)
