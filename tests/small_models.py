"""Backbones other than LLaDA, and tokenizers, made of nothing: no download, no file."""

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from dmpo_lightning.models.adapted import AdaptedConfig, AdaptedForMaskedDiffusion
from dmpo_lightning.models.dream import DreamConfig, DreamForMaskedDiffusion
from dmpo_lightning.models.illada import ILLaDAConfig, ILLaDAForMaskedDiffusion
from dmpo_lightning.models.llada2 import LLaDA2Config, LLaDA2ForMaskedDiffusion
from dmpo_lightning.models.sdar import SDARConfig, SDARForMaskedDiffusion
from dmpo_lightning.models.sdar_moe import SDARMoeConfig, SDARMoeForMaskedDiffusion

BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BERT_VOCABULARY = 24
"""Embeddings of the small BERTs; the tokenizer's words end at 15."""


SMALL = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
"""Of the models that have the shape of Qwen or Llama."""
IDS = {
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "mask_token_id": 5,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "rope_theta": 7000.0,
    "rms_norm_eps": 1e-3,
}
"""As in the embedded tokenizer; rotary base and epsilon are nobody's default."""


def tiny_dream(seed: int = 0, **changes) -> DreamForMaskedDiffusion:
    """Two layers of width 32 with grouped keys, and biases that are not zero; ids as in the embedded tokenizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DreamForMaskedDiffusion(DreamConfig(**(SMALL | IDS | changes)))
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                torch.nn.init.normal_(parameter, std=0.3)
    return model


def tiny_illada(seed: int = 0, **changes) -> ILLaDAForMaskedDiffusion:
    """Two layers of width 32 with grouped keys, and norms that are not 1; the head is the embedding."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ILLaDAForMaskedDiffusion(ILLaDAConfig(**(SMALL | IDS | changes)))
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def tiny_sdar(seed: int = 0, **changes) -> SDARForMaskedDiffusion:
    """Two layers of width 32 with grouped keys, head norms that are not 1, and heads wider than the width's share."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SDARForMaskedDiffusion(SDARConfig(**(SMALL | IDS | {"head_dim": 12, "block_size": 4} | changes)))
        for name, parameter in model.named_parameters():
            if "q_norm" in name or "k_norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def tiny_adapted(seed: int = 0, **changes) -> AdaptedForMaskedDiffusion:
    """Shifted blocks of four in the shape of Llama, of two layers of width 32 with grouped keys."""
    shape = {"head_dim": 12, "block_size": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AdaptedForMaskedDiffusion(AdaptedConfig(**(SMALL | IDS | shape | changes)))


def tiny_sdar_moe(seed: int = 0, **changes) -> SDARMoeForMaskedDiffusion:
    """A `tiny_sdar` with six experts in each layer, of which a token gets two."""
    mixture = {"moe_intermediate_size": 16, "num_experts": 6, "num_experts_per_tok": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = {"head_dim": 12, "block_size": 4}
        model = SDARMoeForMaskedDiffusion(SDARMoeConfig(**(SMALL | IDS | shape | mixture | changes)))
        for name, parameter in model.named_parameters():
            if "q_norm" in name or "k_norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


SMALL_MIXTURE = SMALL | {
    "head_dim": 16,
    "moe_intermediate_size": 16,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
}


def tiny_llada2(seed: int = 0, **changes) -> LLaDA2ForMaskedDiffusion:
    """Blocks of four in two layers of width 32, of which the second has eight experts in pairs, and biases for them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LLaDA2ForMaskedDiffusion(LLaDA2Config(**(SMALL_MIXTURE | IDS | {"block_size": 4} | changes)))
        for name, tensor in model.state_dict().items():
            if "norm" in name:
                torch.nn.init.uniform_(tensor, 0.5, 1.5)
            elif name.endswith("expert_bias"):
                torch.nn.init.normal_(tensor, std=0.1)
    return model


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids of a vocabulary of 32."""
    return torch.randint(0, 32, (rows, length), generator=torch.Generator().manual_seed(seed))


def word_tokenizer(words: tuple[str, ...], **special: str) -> PreTrainedTokenizerFast:
    """Splits at white space; ids in the order of ``words``."""
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def bert_tokenizer() -> PreTrainedTokenizerFast:
    """Special tokens 0 to 4, the digits 5 to 14, one word."""
    return word_tokenizer(
        (*BERT_SPECIAL, *"0123456789", "and"),
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def tiny_bert(seed: int = 0) -> PreTrainedModel:
    config = BertConfig(
        vocab_size=BERT_VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=32,
        initializer_range=0.3,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForMaskedLM(config)


def tiny_modernbert(seed: int = 0) -> PreTrainedModel:
    config = ModernBertConfig(
        vocab_size=BERT_VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=32,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        cls_token_id=2,
        sep_token_id=3,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ModernBertForMaskedLM(config)
