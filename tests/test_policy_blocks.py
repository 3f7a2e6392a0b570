"""Log-probs of completions under a block-causal policy: all blocks in one forward, and what it must equal."""

from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from torch import nn

from dmpo_lightning.functional import draw_masks, elbo, elbo_replicates
from dmpo_lightning.policy import Policy
from helpers import END_OF_TEXT, MASK, NEVER_SAMPLED, pad_more, tiny_policy
from small_models import tiny_adapted, tiny_llada2, tiny_sdar

LENGTH = 7


def policy_of(block: int, model: Callable[..., nn.Module] = tiny_sdar) -> Policy:
    policy = tiny_policy(model=model(block_size=block))
    return policy.eval()


def prompts(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(lengths)
    ids = torch.randint(6, 25, (len(lengths), width), generator=torch.Generator().manual_seed(1))
    return ids, torch.arange(width) >= width - torch.tensor(lengths)[:, None]


def completions(rows: int) -> torch.Tensor:
    return torch.randint(6, 25, (rows, LENGTH), generator=torch.Generator().manual_seed(2))


def log_probs_block_after_block(
    policy: Policy, prompt: list[int], completion: list[int], masks: list[bool]
) -> list[float]:
    """Each block by a forward of its own: everything before it clean, nothing behind it, the block itself masked."""
    size = policy.block_size
    found = [0.0] * len(completion)
    for place, masked in enumerate(masks):
        if not masked:
            continue
        first = (len(prompt) + place) // size * size
        row = prompt + completion
        for other in range(len(completion)):
            if masks[other] and len(prompt) + other >= first:
                row[len(prompt) + other] = MASK
        logits = policy.model(torch.tensor([row[: first + size]])).logits[0, len(prompt) + place]
        logits[list(NEVER_SAMPLED)] = -torch.inf
        found[place] = logits.log_softmax(-1)[completion[place]].item()
    return found


@torch.no_grad()
@pytest.mark.parametrize("model", [tiny_sdar, tiny_adapted, tiny_llada2], ids=["plain", "shifted", "mixture"])
@pytest.mark.parametrize("block", [1, 3, 4, 16])
def test_all_blocks_in_one_forward_are_the_blocks_computed_one_after_another(block, model):
    """Prompts of every length modulo the block, in one padded batch, under several maskings each."""
    policy = policy_of(block, model)
    lengths = list(range(1, max(block, 6) + 1))
    ids, mask = prompts(lengths)
    completion = completions(len(lengths))
    masks = draw_masks(torch.arange(len(lengths)), length=LENGTH, replicates=4)
    found = policy.completion_log_probs(ids, mask, completion, masks)
    for row, length in enumerate(lengths):
        prompt = ids[row, ids.shape[1] - length :].tolist()
        for replicate in range(4):
            chosen = masks[row, replicate].tolist()
            expected = log_probs_block_after_block(policy, prompt, completion[row].tolist(), chosen)
            torch.testing.assert_close(found[row, replicate], torch.tensor(expected), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_more_left_padding_changes_no_log_prob():
    policy, (ids, mask), completion = policy_of(4), prompts([5, 2]), completions(2)
    masks = draw_masks(torch.arange(2), length=LENGTH, replicates=2)
    expected = policy.completion_log_probs(ids, mask, completion, masks)
    padded = policy.completion_log_probs(*pad_more(ids, mask, 3), completion, masks)
    torch.testing.assert_close(padded, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_log_probs_are_computed_at_chosen_positions_alone():
    policy, (ids, mask), completion = policy_of(4), prompts([5, 2]), completions(2)
    masks = draw_masks(torch.arange(2), length=LENGTH, replicates=2)
    at = masks & (torch.arange(LENGTH) > 3)
    everywhere = policy.completion_log_probs(ids, mask, completion, masks)
    found = policy.completion_log_probs(ids, mask, completion, masks, at=at)
    torch.testing.assert_close(found, everywhere * at)


@torch.no_grad()
@pytest.mark.parametrize("model", [tiny_sdar, tiny_adapted, tiny_llada2], ids=["plain", "shifted", "mixture"])
def test_in_blocks_of_one_token_the_elbo_is_the_autoregressive_log_likelihood(model):
    policy, (ids, mask), completion = policy_of(1, model), prompts([4, 4]), completions(2)
    blocks = policy.completion_blocks(mask, completion)
    masks = draw_masks(torch.arange(2), length=LENGTH, replicates=2, blocks=blocks)
    found = elbo(policy.completion_log_probs(ids, mask, completion, masks), masks, blocks)
    for row in range(2):
        known, total = ids[row].tolist(), 0.0
        for token in completion[row].tolist():
            logits = policy.model(torch.tensor([[*known, MASK]])).logits[0, -1]
            logits[list(NEVER_SAMPLED)] = -torch.inf
            total += logits.log_softmax(-1)[token].item()
            known.append(token)
        assert found[row].item() == pytest.approx(total, abs=1e-4)


def all_masks(size: int) -> list[tuple[float, list[bool]]]:
    sets = [[(m, c) for c in combinations(range(size), m)] for m in range(1, size + 1)]
    return [(1 / size / len(s), [place in c for place in range(size)]) for s in sets for _, c in s]


@torch.no_grad()
def test_the_elbo_is_the_sum_over_blocks_whose_first_begins_inside_the_prompt():
    """Six tokens of a prompt and four of a completion in blocks of four: two, and two more. All maskings, weighted."""
    policy, (ids, mask) = policy_of(4), prompts([6])
    completion = completions(1)[:, :4]
    blocks = policy.completion_blocks(mask, completion)
    assert blocks.tolist() == [[0, 0, 1, 1]]
    prompt, tokens = ids[0].tolist(), completion[0].tolist()
    exact = 0.0
    for first in (0, 2):
        for probability, chosen in all_masks(2):
            masks = [False] * 4
            masks[first : first + 2] = chosen
            values = log_probs_block_after_block(policy, prompt, tokens, masks)
            exact += probability * 2 / sum(chosen) * sum(values)
    pairs = [(p * q, a + b) for p, a in all_masks(2) for q, b in all_masks(2)]
    masks = torch.tensor([[chosen for _, chosen in pairs]])
    log_prob = policy.completion_log_probs(ids, mask, completion, masks)
    estimates = elbo_replicates(log_prob, masks, blocks)[0]
    found = sum(p * value.item() for (p, _), value in zip(pairs, estimates, strict=True))
    assert found == pytest.approx(exact, abs=1e-4)


def test_blocks_behind_that_of_the_first_end_token_do_not_count():
    policy = policy_of(4)
    mask = torch.tensor([[False, True, True], [True, True, True]])
    completion = torch.tensor([[6, 7, 8, END_OF_TEXT, 6, 6, 6, 6], [6, 7, 8, 9, 6, 6, 6, 6]])
    assert policy.completion_blocks(mask, completion).tolist() == [
        [0, 0, 1, 1, 1, 1, -1, -1],
        [0, 1, 1, 1, 1, 2, 2, 2],
    ]


def test_a_bidirectional_policy_has_no_blocks():
    policy = tiny_policy()
    assert policy.completion_blocks(torch.ones(1, 2, dtype=torch.bool), completions(1)) is None
    steps = torch.tensor([[5, 2, -1]])
    assert policy.replayed_steps(steps) is steps


def test_steps_of_a_block_causal_policy_are_replayed_beside_each_other():
    assert policy_of(4).replayed_steps(torch.tensor([[1, 0, 5, 7, 8, -1]])).tolist() == [[1, 0, 1, 3, 0, -1]]
