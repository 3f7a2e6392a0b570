"""Random policies over any vocabulary, prompts for them, and calls of the plain decoding."""

import torch
from benchmarks.plain import Generated, generate

from dmpo_lightning.data.prompts import pad_left
from dmpo_lightning.policy import Policy
from helpers import tiny_model
from small_models import word_tokenizer

LENGTH, BLOCK = 16, 8
CACHES = ["none", "prefix", "dual"]


def policy_of(vocab_size: int, seed: int = 0, *, width: int = 32, layers: int = 2, sharpness: float = 1.0) -> Policy:
    """Large weights spread the confidences, ``sharpness`` raises them; mask token and last three ids are banned."""
    mask = vocab_size - 4
    model = tiny_model(
        seed,
        vocab_size=vocab_size,
        d_model=width,
        n_layers=layers,
        mlp_hidden_size=2 * width,
        initializer_range=0.4,
        mask_token_id=mask,
    )
    model.get_output_embeddings().weight.data.mul_(sharpness)
    words = (*(f"w{number}" for number in range(mask)), "[MASK]")
    return Policy(
        model.eval(), word_tokenizer(words, unk_token="w0", pad_token="w0", mask_token="[MASK]"), with_reference=False
    )


def prompts_of(rows: int, vocab_size: int, *, padded: bool, same: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    prompts = [
        torch.randint(1, vocab_size - 4, (9 - 2 * (row % 4) if padded else 9,), generator=generator).tolist()
        for row in range(rows)
    ]
    return pad_left(prompts[:1] * rows if same else prompts, 0)


def plain(policy: Policy, prompts: tuple[torch.Tensor, torch.Tensor], **options) -> Generated:
    settings = {
        "completion_length": LENGTH,
        "block_length": BLOCK,
        "mask_token_id": policy.facts.mask_token_id,
        "ban": ban_of(policy),
    }
    return generate(policy.model, *prompts, **(settings | options))


def ban_of(policy: Policy) -> torch.Tensor:
    ban = torch.zeros(policy.facts.vocab_size)
    ban[list(policy.facts.banned_token_ids)] = -torch.inf
    return ban
