"""The tabular policy as a model behind the real `Policy`, so that samplers and objectives run on it unchanged."""

from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from dmpo_lightning.policy import Policy
from dmpo_lightning.rewards.reward import Reward
from dmpo_lightning.rollout import PromptBatch
from oracle.tabular import LENGTH, MASK, VALUES, context_index

PROMPT = VALUES + 1
TOKENS = ("0", "1", "[MASK]", "?")


class TabularModel(nn.Module):
    """Reads the completion only; the prompt token is never predicted."""

    predicts_at_positions = True

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=len(TOKENS), mask_token_id=MASK)
        self.table = nn.Parameter(table.clone())

    def forward(
        self,
        ids: Tensor,
        attention_mask: Tensor,
        *,
        positions: Tensor,
        targets: Tensor | None = None,
        logit_bias: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        completion = self.table[context_index(ids[:, -LENGTH:])]
        values = torch.nn.functional.pad(completion, (0, len(TOKENS) - VALUES), value=-torch.inf)
        logits = torch.nn.functional.pad(values, (0, 0, ids.shape[1] - LENGTH, 0)).flatten(0, 1)[positions] + logit_bias
        if targets is None:
            return logits
        return (logits / temperature).log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)


def tabular_policy(behaviour: Tensor, reference: Tensor) -> Policy:
    """A policy that starts at one table, with another as its reference."""
    words = Tokenizer(models.WordLevel({token: index for index, token in enumerate(TOKENS)}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, mask_token="[MASK]", unk_token="?", pad_token="?")
    policy = Policy(TabularModel(reference.float()), tokenizer)
    policy.model.table.data.copy_(behaviour)
    return policy


def prompts(batch: int) -> PromptBatch:
    """The same one-token prompt several times, under different prompt ids."""
    return PromptBatch(
        prompt_ids=torch.full((batch, 1), PROMPT),
        prompt_mask=torch.ones(batch, 1, dtype=torch.bool),
        prompt_index=torch.arange(batch),
        examples=[{}] * batch,
        is_filler=torch.zeros(batch, dtype=torch.bool),
    )


def tabular_reward(reward: Tensor) -> Reward:
    """Looks the completion up in ``reward [completion]``."""
    return Reward(lambda _, completion: float(reward[int(completion.replace(" ", ""), 2)]))
