"""Makes the tokenizer and the configuration of an embedded model, `sudoku_tiny`, `countdown_tiny` or `blocks_tiny`, or
of `llada2_tiny`, a mixture of experts; its weights come from sudoku_tiny_sft.yaml or countdown_tiny_sft.yaml.

Usage: python examples/make_tiny_tokenizer.py NAME DIR
"""

import sys

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dmpo_lightning.models.llada import FAMILY, LLaDAConfig
from dmpo_lightning.models.llada2 import LLaDA2Config
from dmpo_lightning.models.sdar import SDARConfig

SPECIAL = ["<|endoftext|>", "<|startoftext|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|mdm_mask|>"]
WORDS = ["system", "user", "assistant", "<answer>", "</answer>", "\n\n", "\n", " ", *"0123456789"]
SYMBOLS = {"countdown_tiny": "+-*/="}


def main(name: str, directory: str) -> None:
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *WORDS, *SYMBOLS.get(name, ""), "<unk>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"</?answer>|system|user|assistant|\n\n|[\s\S]"), behavior="isolated"
    )
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        mask_token="<|mdm_mask|>",
        unk_token="<unk>",
        additional_special_tokens=["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = FAMILY.chat_template
    fast.save_pretrained(directory)
    ids = {
        "mask_token_id": vocabulary["<|mdm_mask|>"],
        "eos_token_id": vocabulary["<|endoftext|>"],
        "pad_token_id": vocabulary["<|endoftext|>"],
    }
    configs = {"blocks_tiny": block_causal, "llada2_tiny": mixture}
    configs.get(name, bidirectional)(ids).save_pretrained(directory)


def bidirectional(ids: dict[str, int]) -> LLaDAConfig:
    return LLaDAConfig(
        d_model=64,
        n_layers=4,
        n_heads=4,
        mlp_hidden_size=192,
        vocab_size=32,
        max_sequence_length=128,
        rope_theta=10000.0,
        architectures=["LLaDAForMaskedDiffusion"],
        **ids,
    )


IN_BLOCKS = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "intermediate_size": 192,
    "vocab_size": 32,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "block_size": 4,
    "bos_token_id": None,
}
"""Blocks of 4 tokens."""


def block_causal(ids: dict[str, int]) -> SDARConfig:
    """As many parameters as the bidirectional one."""
    return SDARConfig(architectures=["SDARForMaskedDiffusion"], **IN_BLOCKS, **ids)


def mixture(ids: dict[str, int]) -> LLaDA2Config:
    """As wide in its dense first layer. In the others a token gets two of eight experts, and the one that all share."""
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2, "moe_intermediate_size": 48}
    return LLaDA2Config(architectures=["LLaDA2ForMaskedDiffusion"], **IN_BLOCKS, **experts, **ids)


if __name__ == "__main__":
    main(*sys.argv[1:])
