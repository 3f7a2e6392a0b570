"""Dream (arXiv 2508.15487) and DiffuCoder as a native transformers model.

They have the shape of Qwen2 with bidirectional attention. They are *shifted*: as in the autoregressive model that they
were trained from, the hidden state at position i - 1 predicts the token at position i.
"""

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedConfig,
    Qwen2Tokenizer,
)

from dmpo_lightning.models.family import Family
from dmpo_lightning.models.kv_cache import KeyValueCache
from dmpo_lightning.models.layers import Store, attention, take
from dmpo_lightning.models.native import Geometry
from dmpo_lightning.models.qwen import BLOCK_LINEARS, QwenBlock, QwenForMaskedDiffusion, QwenModel

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
    block_linears=BLOCK_LINEARS,
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


class DreamBlock(QwenBlock):
    """Pre-norm transformer block with bidirectional grouped-query attention."""

    def __init__(self, config: DreamConfig) -> None:
        super().__init__(config, DreamAttention(config))


class DreamModel(QwenModel):
    """Embeddings, blocks and final norm, under the names of the published checkpoints."""

    block_class = DreamBlock

    def geometry(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: KeyValueCache | None,
        start: int,
    ) -> Geometry:
        """Every token sees all that are not padding."""
        head_size, theta = self.config.hidden_size // self.config.num_attention_heads, self.config.rope_theta
        return Geometry.of(input_ids, attention_mask, position_ids, cache, start, head_size=head_size, theta=theta)


class DreamForMaskedDiffusion(QwenForMaskedDiffusion):
    """Dream with its head. It is called like `LLaDAForMaskedDiffusion`, and logit i predicts token i.

    The published model's own logit i predicts token i + 1. The shift is undone here, so that nobody else needs to know.
    """

    config_class = DreamConfig
    model_class = DreamModel
    lookback = 1
    # The name that transformers has for blocks. `blocks_of` finds by it what to compile, checkpoint and divide.
    _no_split_modules = ["DreamBlock"]

    def state_positions(self, input_ids: Tensor, positions: Tensor | None) -> Tensor:
        """The flat indices one column to the left."""
        length = input_ids.shape[1]
        columns = torch.arange(input_ids.numel(), device=input_ids.device).view_as(input_ids)
        # All positions are listed as well, because their states are shifted: the first counts twice, the last never.
        wanted = columns if positions is None else positions
        # The first column has no left neighbour in its row and, as in the published code, predicts itself.
        return wanted - (wanted % length > 0).long()


class DreamTokenizer(Qwen2Tokenizer):
    """Qwen2's tokenizer under the name that published folders give it, which otherwise comes with remote code."""


# By these lines transformers builds the published folders without their remote code.
AutoConfig.register("Dream", DreamConfig)
AutoTokenizer.register(DreamConfig, tokenizer_class=DreamTokenizer)
AutoModelForMaskedLM.register(DreamConfig, DreamForMaskedDiffusion)
