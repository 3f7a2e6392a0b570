"""iLLaDA (arXiv 2606.25331) as a native transformers model.

It has the shape of Llama with bidirectional attention, grouped keys and a tied head. It is not shifted: logit i
predicts token i.
"""

from typing import Any

from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

from dmpo_lightning.models.configuration import check_heads, check_switches, rotary_base
from dmpo_lightning.models.family import Family
from dmpo_lightning.models.qwen import BLOCK_LINEARS, GroupedAttention, QwenBlock, QwenForMaskedDiffusion, QwenModel

FAMILY = Family(
    model_type="illada",
    # A turn and a text end alike, with the tokenizer's own eos token.
    end_tokens=(),
    # The tokenizer of the Instruct model carries its own.
    chat_template=None,
    block_linears=BLOCK_LINEARS,
    mask_token="<[MASK]>",
)

_FIXED = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "layer_norm_eps": None}
"""Switches that the published code has, in the setting that has the published number of parameters."""
_STATED = ("rope_theta", "rms_norm_eps")
"""Keys without which the published code would take values that are not known here."""


class ILLaDAConfig(PreTrainedConfig):
    """Configuration of an iLLaDA, with the keys that the published code reads.

    Sizes and tokens are those of the published 8B models, which name no ``mask_token_id``. ``rope_theta`` and
    ``rms_norm_eps`` are those of Seed-Coder-8B, which has the same shape and vocabulary, and hold for new models alone:
    a config.json has to state them. Dropout is that of pre-training and is not applied.

    Raises:
        ValueError: numbers of heads that do not divide the width, or each other, or into even head sizes. A switch that
            is not built.
    """

    model_type = "illada"

    vocab_size: int = 155136
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-6
    rope_theta: float = 500000.0
    initializer_range: float = 0.02
    mask_token_id: int | None = 5
    eos_token_id: int | list[int] | None = 2
    pad_token_id: int | None = 1
    bos_token_id: int | None = 0
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        check_heads(self, kwargs)
        check_switches("iLLaDA", _FIXED, kwargs)
        self.rope_theta = rotary_base("iLLaDA", kwargs, self.rope_theta)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration that a config.json holds.

        Raises:
            ValueError: it states no ``rope_theta`` or no ``rms_norm_eps``. A model with other ones would be wrong
                without a word.
        """
        rope = [config_dict.get(name) or {} for name in ("rope_scaling", "rope_parameters")]
        missing = [name for name in _STATED if all(each.get(name) is None for each in (config_dict, *rope))]
        if missing:
            raise ValueError(f"The config.json of an iLLaDA must state {' and '.join(missing)}.")
        return super().from_dict(config_dict, **kwargs)


class ILLaDABlock(QwenBlock):
    """Pre-norm transformer block with bidirectional grouped-query attention without biases."""

    def __init__(self, config: ILLaDAConfig) -> None:
        super().__init__(config, GroupedAttention(config))


class ILLaDAModel(QwenModel):
    """Embeddings, blocks and final norm, under the names of the published checkpoints."""

    block_class = ILLaDABlock


class ILLaDAForMaskedDiffusion(QwenForMaskedDiffusion):
    """iLLaDA with its head. It is called like `LLaDAForMaskedDiffusion`."""

    config_class = ILLaDAConfig
    model_class = ILLaDAModel
    # The name that transformers has for blocks. `blocks_of` finds by it what to compile, checkpoint and divide.
    _no_split_modules = ["ILLaDABlock"]


# By these lines transformers builds the published folders without their remote code.
AutoConfig.register("illada", ILLaDAConfig)
AutoTokenizer.register(ILLaDAConfig, tokenizer_class=PreTrainedTokenizerFast)
AutoModelForMaskedLM.register(ILLaDAConfig, ILLaDAForMaskedDiffusion)
