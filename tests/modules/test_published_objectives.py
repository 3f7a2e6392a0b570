"""Objectives of others: each default loss is the published one, token by token; overlays train and resume."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dmpo_runs import Recorder, loader, overlay_options, small_dmpo, trainer, weights
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from dmpo_lightning.functional import Purpose, complementary_masks, fold_in, row_keys, uniforms
from dmpo_lightning.objectives import ESPO, CoupledGRPO, DiffuGRPO
from dmpo_lightning.policy import Policy, evaluating
from dmpo_lightning.rewards.scores import Scores
from dmpo_lightning.rollout import PromptBatch, RolloutRows, Rollouts
from helpers import END_OF_TEXT, MASK, tiny_policy

PROMPTS, GROUP, LENGTH = 2, 3, 6
ENDS = [2, 6, 3, 1, 5, 4]
"""Where each completion has its end token; the second has none."""
REWARD = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.0, 2.0]])


def batch() -> Rollouts:
    completions = torch.tensor([[8 + (5 * row + 3 * k) % 11 for k in range(LENGTH)] for row in range(6)])
    for row, end in enumerate(ENDS):
        completions[row, end:] = END_OF_TEXT
    prompts = PromptBatch(
        torch.tensor([[7, 9, 12, 10], [0, 8, 8, 11]]),
        torch.tensor([[True] * 4, [False, True, True, True]]),
        torch.arange(PROMPTS),
        [{}] * PROMPTS,
        torch.zeros(PROMPTS, dtype=torch.bool),
    )
    order = torch.tensor([[2, 0, 1, 1, 3, 2], [0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]])
    return Rollouts(
        prompts=prompts,
        completion_ids=completions.view(PROMPTS, GROUP, LENGTH),
        keys=row_keys(0, torch.arange(PROMPTS), group_size=GROUP, buffer=0),
        reveal_step=torch.stack((order, order.flip(-1))),
        sampled_log_prob=torch.zeros(PROMPTS, GROUP, LENGTH),
        scores=Scores({}, REWARD, failures=0),
        order_is_independent=False,
        temperature=1.0,
    )


def hidden_log_probs(policy: Policy, row: RolloutRows, mask: list[bool], *, reference: bool) -> list[Tensor]:
    """Log-probs of the completion's tokens where they are hidden, 0 elsewhere, from the logits of one row."""
    ids, width = row.completion_ids[0], row.prompt_ids.shape[1]
    noisy = [MASK if hidden else int(token) for token, hidden in zip(ids, mask, strict=True)]
    whole = torch.cat((row.prompt_ids[0], torch.tensor(noisy)))[None]
    attended = torch.cat((row.prompt_mask[0], torch.ones(LENGTH, dtype=torch.bool)))[None]
    found = []
    for place in range(LENGTH):
        logits = policy.logits(whole, attended, torch.tensor([width + place]), reference=reference)[0]
        found.append(logits[ids[place]] - logits.logsumexp(0) if mask[place] else torch.zeros(()))
    return found


# What each method scores of one rollout, and its loss from that. ------------------------------------------------------


def mean_field(policy: Policy, row: RolloutRows, key: Tensor, reference: bool) -> list[Tensor]:
    draws = uniforms(fold_in(key, Purpose.PROMPT), row.prompt_ids.shape[1])[0]
    prompt = [
        MASK if draw < 0.15 and real else int(token)
        for token, draw, real in zip(row.prompt_ids[0], draws, row.prompt_mask[0], strict=True)
    ]
    row = replace(row, prompt_ids=torch.tensor([prompt]))
    return hidden_log_probs(policy, row, [True] * LENGTH, reference=reference)


def coupled(policy: Policy, row: RolloutRows, key: Tensor, reference: bool) -> list[Tensor]:
    *draws, last = uniforms(key, LENGTH + 1)[0].tolist()
    share = 0.2 + 0.6 * last
    first = [draw < share for draw in draws]
    everything, one, two = (
        hidden_log_probs(policy, row, mask, reference=reference)
        for mask in ([True] * LENGTH, first, [not hidden for hidden in first])
    )
    return [(everything[k] + (one[k] / share if first[k] else two[k] / (1 - share))) / 2 for k in range(LENGTH)]


def espo_elbo(policy: Policy, row: RolloutRows, key: Tensor, reference: bool) -> Tensor:
    total = torch.zeros(())
    for first, second in complementary_masks(key, torch.ones(1, LENGTH, dtype=torch.bool), pairs=2)[0].tolist():
        share = sum(first) / (LENGTH + 1)
        one, two = (hidden_log_probs(policy, row, mask, reference=reference) for mask in (first, second))
        for k in range(LENGTH):
            total = total + (one[k] / share if first[k] else two[k] / (LENGTH / (LENGTH + 1) - share)) / 2
    return total / 2


def ppo(log_ratio: Tensor, advantage: float, epsilon: float) -> Tensor:
    ratio = torch.exp(log_ratio)
    return torch.min(ratio * advantage, torch.clamp(ratio, 1 - epsilon, 1 + epsilon) * advantage)


def others(prompt: list[float]) -> list[float]:
    return [own - (sum(prompt) - own) / (len(prompt) - 1) for own in prompt]


def centred(prompt: list[float]) -> list[float]:
    return [own - sum(prompt) / len(prompt) for own in prompt]


def per_token(new: Any, old: Any, reference: Any, advantage: list[float], *, epsilon: float, beta: float) -> Tensor:
    """Over all tokens up to and with the first end token, of all rollouts together."""
    total, tokens = torch.zeros(()), 0
    for i, end in enumerate(ENDS):
        for k in range(min(end + 1, LENGTH)):
            ahead = reference[i][k] - new[i][k]
            kl = torch.exp(ahead) - ahead - 1
            total = total + beta * kl - ppo(new[i][k] - old[i][k], advantage[i], epsilon)
            tokens += 1
    return total / tokens


def espo(new: Any, old: Any, reference: Any, advantage: list[float]) -> Tensor:
    total = torch.zeros(())
    for i, own in enumerate(advantage):
        total = total - ppo((new[i] - old[i]) / LENGTH, own, 0.2) / 6
        total = total + 1e-3 * (new[i] - reference[i]) ** 2 / 2 / (6 * LENGTH)
    return total


PUBLISHED: dict[type, tuple[Callable[..., Any], Callable[..., Tensor], Callable[..., list[float]]]] = {
    DiffuGRPO: (mean_field, lambda *all_: per_token(*all_, epsilon=0.5, beta=0.04), centred),
    CoupledGRPO: (coupled, lambda *all_: per_token(*all_, epsilon=0.5, beta=0.01), others),
    ESPO: (espo_elbo, espo, others),
}
ON_ONE_MASKING: set[type] = set()
"""Those without maskings that differ from pass to pass."""


@pytest.mark.parametrize("kind", PUBLISHED)
def test_the_default_loss_is_the_published_one_and_so_is_its_gradient(kind):
    scored, published, advantages = PUBLISHED[kind]
    policy, rollouts = tiny_policy(), batch()
    policy.refresh_reference()
    head = policy.model.model.transformer.ff_out.weight
    objective, iteration = (kind(), 0) if kind in ON_ONE_MASKING else (kind(mask_draws=2), 3)
    rows = rollouts.rows()
    keys = fold_in(fold_in(rows.keys, Purpose.LOSS), iteration % 2)

    def all_rows(reference: bool = False) -> list[Any]:
        return [scored(policy, rows[i : i + 1], keys[i : i + 1], reference) for i in range(len(rows))]

    with evaluating(policy):
        head.mul_(1.5)
        targets, _ = objective.prepare(policy, rollouts, rows_per_forward=4)
        old, reference = all_rows(), all_rows(reference=True)
        head += 0.05 * torch.randn(head.shape, generator=torch.Generator().manual_seed(1))
    policy.eval()
    flat = {name: target.flatten(0, 1) for name, target in targets.items()}
    loss, _ = objective.loss(policy, rows, flat, iteration=iteration, planned_rollouts=len(rows))
    advantage = [own for prompt in REWARD.tolist() for own in advantages(prompt)]
    expected = published(all_rows(), old, reference, advantage)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    parameters = list(policy.model.parameters())
    for own, plain in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(own, plain, rtol=1e-3, atol=1e-6)
    assert torch.autograd.grad(published(all_rows(), old, reference, advantage), head)[0].abs().max() > 1e-4


# As a user has them: by the overlay, in a run. ------------------------------------------------------------------------

OVERLAYS = sorted((Path(__file__).parents[2] / "configs" / "objectives").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_every_overlay_trains_and_resumes_within_and_between_buffers_bit_for_bit(tmp_path, overlay):
    """Two buffers of two prompts, two steps each."""
    options = {**overlay_options(overlay), "group_size": 2, "random_weights": True}
    whole, record = small_dmpo("sudoku_tiny", **options), Recorder()
    before = weights(whole).clone()
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    run = {"max_steps": 4, "callbacks": [record, save], "enable_checkpointing": True}
    trainer(tmp_path, **run).fit(whole, loader())
    assert not torch.equal(weights(whole), before)
    for stop in (1, 2):
        resumed, rest = small_dmpo("sudoku_tiny", **options), Recorder()
        checkpoint = tmp_path / f"step={stop}.ckpt"
        trainer(tmp_path, max_steps=4, callbacks=[rest]).fit(resumed, loader(), ckpt_path=checkpoint, weights_only=True)
        assert rest.losses == record.losses[stop:]
        assert torch.equal(weights(resumed), weights(whole))
