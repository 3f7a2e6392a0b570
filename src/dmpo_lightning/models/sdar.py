"""SDAR (arXiv 2510.06303), and TraDo and DiRL, which are trained from it, as a native transformers model.

They have the shape of Qwen3 with block-causal attention: a token sees its own completion block, on both sides, and all
earlier ones. They are not shifted: logit i predicts token i.
"""

from torch import Tensor
from transformers import Qwen2Tokenizer

from dmpo_lightning.models.families import Family, register
from dmpo_lightning.models.layers import block_causal_mask
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
    """SDAR with its head.

    The block rule holds for whatever it is called with. An ``attention_mask`` of queries and keys takes further keys
    away, as `Policy.completion_log_probs` does. A ``cache`` must be one that grows, and be filled from left to right.
    """

    config_class = SDARConfig

    @property
    def block_size(self) -> int:
        """The positions of a completion block, which `Policy` asks. Models without blocks have no such attribute."""
        return self.config.block_size

    def mask(self, position_ids: Tensor, attended: Tensor | None, first_query: int = 0) -> Tensor | None:
        """The block rule, with padding taken away."""
        # Without padding positions are columns, and all that there is comes before the end of the only block asked for.
        if attended is None and first_query // self.block_size == (position_ids.shape[1] - 1) // self.block_size:
            return None
        return block_causal_mask(position_ids, attended, self.block_size, first_query=first_query)


register(FAMILY, SDARForMaskedDiffusion, tokenizer_class=Qwen2Tokenizer)
