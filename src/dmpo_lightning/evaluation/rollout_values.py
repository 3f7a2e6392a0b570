"""What rollouts look like: length, end, variety, repetition, how sure the policy was, and whether rewards differ."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dmpo_lightning.distributed.ranks import gather_ranks, means_over_ranks
from dmpo_lightning.functional import equal_reward_groups
from dmpo_lightning.policy import Policy
from dmpo_lightning.rollout import Rollouts

NGRAM = 4
"""Tokens of what counts as a repetition. Shorter ones recur in any good text."""


def rollout_means(policy: Policy, rollouts: Rollouts, diagnostics: Mapping[str, Tensor]) -> dict[str, float]:
    """What is logged of a rollout buffer: means over the rollouts of all ranks, whose prompts may be of different
    tasks, and the number of rollouts that could not be scored. Every rank must call it.
    """
    values = {f"reward/{name}": value for name, value in rollouts.components.items()}
    values |= rollout_values(policy, rollouts) | dict(diagnostics)
    # The spread is taken within groups, because weights compare rollouts of one prompt only.
    values |= {"reward/total": rollouts.reward, "reward/spread": rollouts.reward.std(-1)}
    return means_over_ranks(values) | {"reward/failures": float(sum(gather_ranks(rollouts.scores.failures)))}


def rollout_values(policy: Policy, rollouts: Rollouts) -> dict[str, Tensor]:
    """Values to average over rollouts, or over groups where there is one for each, under the names that are logged.

    ``docs/metrics.md`` says what the names mean.
    """
    completions = rollouts.completions
    ids = rollouts.completion_ids.flatten(0, 1)
    lengths = policy.effective_length(ids)
    # Positions that an early exit filled in were not drawn, and their log-prob of 0 says nothing of the policy.
    drawn = (rollouts.reveal_step >= 0).flatten(0, 1)
    empty = [float(not text.strip()) for texts in completions for text in texts]
    distinct = [len(set(texts)) / len(texts) for texts in completions]
    return {
        "policy/entropy": -rollouts.sampled_log_prob.flatten(0, 1)[drawn],
        "completion/length": lengths.float(),
        "completion/truncated": (lengths == ids.shape[-1]).float(),
        "completion/empty": torch.tensor(empty, dtype=torch.float32),
        "completion/distinct": torch.tensor(distinct, dtype=torch.float32),
        "completion/repetition": repeated_share(ids, lengths),
        "reward/informative_groups": (~equal_reward_groups(rollouts.reward)).float(),
    }


def repeated_share(
    ids: Int[Tensor, "rows length"], lengths: Int[Tensor, " rows"], *, n: int = NGRAM
) -> Float[Tensor, " rows"]:
    """The share of a row's n-grams that occurred in it before: 0 where all differ, near 1 in an endless loop.

    Only the first ``lengths`` tokens of each row are read. Of fewer than n tokens there is no n-gram, and the share is
    0.
    """
    if ids.shape[-1] < n:
        return torch.zeros(len(ids), dtype=torch.float32, device=ids.device)
    # One number for each n-gram. Two that differ share it with a chance of about 2**-64, so that no text is compared.
    codes = torch.zeros_like(ids[:, n - 1 :], dtype=torch.int64)
    for offset in range(n):
        codes = codes * 6364136223846793005 + ids[:, offset : ids.shape[-1] - n + 1 + offset] + 1442695040888963407
    counts = (lengths - n + 1).clamp(min=0)
    inside = torch.arange(codes.shape[-1], device=ids.device) < counts[:, None]
    # What is behind the end goes behind everything, so that equal n-grams become neighbours among the first `counts`.
    ordered = codes.masked_fill(~inside, torch.iinfo(torch.int64).max).sort(-1).values
    recurs = (ordered[:, 1:] == ordered[:, :-1]) & inside[:, 1:]
    # In float32, whatever a Trainer has made the default.
    return recurs.sum(-1).float() / counts.clamp(min=1)
