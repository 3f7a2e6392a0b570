"""Tiny policies and prompts shared by the tests."""

import zipfile
from types import SimpleNamespace

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from dmpo_lightning.data.prompts import pad_left
from dmpo_lightning.data.tokens import tokenize_prompt
from dmpo_lightning.models.head import log_probs_of
from dmpo_lightning.models.llada import LLaDAConfig, LLaDAForMaskedDiffusion
from dmpo_lightning.models.loading import load_tokenizer
from dmpo_lightning.policy import Policy
from dmpo_lightning.rollout import PromptBatch

MASK, END_OF_TEXT, END_OF_TURN = 5, 0, 2
"""Of the embedded tokenizer, whose ids end at 24."""
NEVER_SAMPLED = (5, 25, 26, 27, 28, 29, 30, 31)
"""The mask token and the ids that the embedded tokenizer does not have, in a vocabulary of 32."""


def tiny_config(**changes) -> LLaDAConfig:
    """Two layers of width 32; weights large enough that tokens depend visibly on their context."""
    settings = {
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "mlp_hidden_size": 48,
        "vocab_size": 32,
        "max_sequence_length": 64,
        "rope_theta": 10000.0,
        "initializer_range": 0.3,
        "mask_token_id": MASK,
        "eos_token_id": END_OF_TEXT,
        "pad_token_id": END_OF_TEXT,
    }
    return LLaDAConfig(**(settings | changes))


def tiny_model(seed: int = 0, **changes) -> LLaDAForMaskedDiffusion:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LLaDAForMaskedDiffusion(tiny_config(**changes))


def tiny_policy(seed: int = 0, *, model: nn.Module | None = None, **options) -> Policy:
    """A randomly initialised LLaDA (or ``model``) with the embedded tokenizer."""
    return Policy(tiny_model(seed) if model is None else model, load_tokenizer("sudoku_tiny"), **options)


def lora_policy(seed: int = 0, *, dropout: float = 0.0) -> Policy:
    """`tiny_policy` with adapters on two of the seven linears that already differ from the base."""
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=dropout, init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return tiny_policy(model=get_peft_model(tiny_model(seed), config))


class FixedLogits(nn.Module):
    """A backbone whose logits depend on the place in the sequence alone: ``table[place]``, or ``table`` everywhere."""

    predicts_at_positions = True

    def __init__(self, table: torch.Tensor, *, mask_token_id: int | None = MASK) -> None:
        super().__init__()
        self.table = nn.Parameter(table.float())
        self.config = SimpleNamespace(vocab_size=table.shape[-1], mask_token_id=mask_token_id)

    def forward(self, ids, mask, positions=None, targets=None, logit_bias=None, temperature=1.0):
        table = self.table if self.table.ndim == 2 else self.table.expand(ids.shape[1], -1)
        logits = table.expand(ids.shape[0], -1, -1).flatten(0, 1)[positions]
        logits = logits if logit_bias is None else logits + logit_bias
        return logits if targets is None else log_probs_of(logits, targets, temperature)


def perturb(module: nn.Module, scale: float = 0.1, seed: int = 0) -> None:
    """Adds noise to every trainable parameter, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)


def prompt_batch(policy: Policy, prompts: list[str], index: list[int] | None = None) -> PromptBatch:
    """The prompts as a data module would hand them out."""
    ids, mask = pad_left([tokenize_prompt(policy.tokenizer, prompt) for prompt in prompts], policy.facts.pad_token_id)
    index = list(range(len(prompts))) if index is None else index
    examples = [{"prompt": prompt} for prompt in prompts]
    return PromptBatch(ids, mask, torch.tensor(index), examples, torch.zeros(len(prompts), dtype=torch.bool))


def pad_more(ids: torch.Tensor, mask: torch.Tensor, amount: int, filler: int = 17) -> tuple[torch.Tensor, torch.Tensor]:
    """The same prompts with ``amount`` more columns of left padding, filled with an arbitrary token."""
    return nn.functional.pad(ids, (amount, 0), value=filler), nn.functional.pad(mask, (amount, 0), value=False)


def flip(path, *, entry="/data/0"):
    """One bit, in the middle of an entry of an archive."""
    with zipfile.ZipFile(path) as archive:
        (info,) = [each for each in archive.infolist() if each.filename.endswith(entry)]
    content = bytearray(path.read_bytes())
    # Behind the entry's own head, which is padded.
    name, extra = (int.from_bytes(content[info.header_offset + at :][:2], "little") for at in (26, 28))
    content[info.header_offset + 30 + name + extra + info.file_size // 2] ^= 0x40
    path.write_bytes(content)
