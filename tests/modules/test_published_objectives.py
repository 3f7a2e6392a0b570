"""Objectives of others: each default loss is the published one, token by token; overlays train and resume."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from dmpo_runs import Recorder, loader, overlay_options, small_dmpo, trainer, weights
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from dmpo_lightning.functional import (
    Purpose,
    block_random_masks,
    complementary_masks,
    draw_masks,
    fold_in,
    quadrature_masks,
    row_keys,
    uniforms,
)
from dmpo_lightning.objectives import BGPO, EBPO, ESPO, GDPO, GDSD, SPG, WD1, CoupledGRPO, DiffuGRPO, JustGRPO, TraceRL
from dmpo_lightning.objectives.policy_gradient import AdvantageObjective
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
    return hidden_log_probs(policy, mean_field_prompt(row, key), [True] * LENGTH, reference=reference)


def mean_field_prompt(row: RolloutRows, key: Tensor) -> RolloutRows:
    """Of 15 % of the tokens of a prompt the mask."""
    draws = uniforms(fold_in(key, Purpose.PROMPT), row.prompt_ids.shape[1])[0]
    prompt = [
        MASK if draw < 0.15 and real else int(token)
        for token, draw, real in zip(row.prompt_ids[0], draws, row.prompt_mask[0], strict=True)
    ]
    return replace(row, prompt_ids=torch.tensor([prompt]))


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


def quadrature(policy: Policy, row: RolloutRows, key: Tensor, reference: bool) -> Tensor:
    """Gauss-Legendre of three points, moved from (-1, 1) to (0, 1)."""
    masks = quadrature_masks(key, torch.ones(1, LENGTH, dtype=torch.bool))[0].tolist()
    total = torch.zeros(())
    for point, weight, mask in zip((-((3 / 5) ** 0.5), 0, (3 / 5) ** 0.5), (5 / 9, 8 / 9, 5 / 9), masks, strict=True):
        share = point * 0.5 + 0.5
        assert sum(mask) == int(share * LENGTH)
        if any(mask):
            total = total + 0.5 * weight * sum(hidden_log_probs(policy, row, mask, reference=reference)) / share
    return total


def gdpo(new: Any, old: Any, reference: Any, advantage: list[float]) -> Tensor:
    return -sum(ppo((new[i] - old[i]) / LENGTH, own, 0.5) for i, own in enumerate(advantage)) / 6


def denoised(policy: Policy, row: RolloutRows, key: Tensor, reference: bool) -> list[Tensor]:
    pairs = complementary_masks(key, torch.ones(1, LENGTH, dtype=torch.bool), pairs=2)[0].tolist()
    return [sum(sum(hidden_log_probs(policy, row, mask, reference=reference)) for mask in pair) / 2 for pair in pairs]


def gdsd(new: Any, old: Any, reference: Any, advantage: list[float]) -> Tensor:
    total = torch.zeros(())
    for i, own in enumerate(advantage):
        for one, before, anchor in zip(new[i], old[i], reference[i], strict=True):
            held = torch.clamp(one - before, math.log(1 - 4e-4), math.log(1 + 4e-4))
            total = total + (held / LENGTH - 10 * own) ** 2 / 6 + 1e-3 * (one - anchor) ** 2 / 2 / (6 * 2 * LENGTH)
    return total


def wd1(new: Any, old: Any, reference: Any, advantage: list[float]) -> Tensor:
    total = torch.zeros(())
    for prompt in range(PROMPTS):
        own = advantage[prompt * GROUP : (prompt + 1) * GROUP]
        up, down = ([math.exp(sign * each) for each in own] for sign in (1, -1))
        for i in range(GROUP):
            row = prompt * GROUP + i
            likelihood = sum(new[row][k] for k in range(min(ENDS[row] + 1, LENGTH)))
            total = total - (up[i] / sum(up) - down[i] / sum(down)) * likelihood / PROMPTS
    return total


def sandwich(policy: Policy, row: RolloutRows, key: Tensor, reference: bool) -> tuple[Tensor, Tensor]:
    """The lower bound, and half the upper plus half the lower."""
    tokens = min(int((row.completion_ids[0] != END_OF_TEXT).sum()) + 1, LENGTH)
    counted = torch.arange(LENGTH)[None] < tokens
    masks = block_random_masks(key, counted, draws=2, block_length=32, perturbation=0.15)[0].tolist()
    lower, powers = torch.zeros(()), [torch.zeros(()) for _ in range(LENGTH)]
    for draw, mask in enumerate(masks):
        hidden = mean_field_prompt(row, fold_in(key, draw))
        found = hidden_log_probs(policy, hidden, mask, reference=reference)
        masked = sum(mask[:tokens])
        lower = lower + sum(found[k] for k in range(tokens) if mask[k]) / masked / 2
        for k in range(tokens):
            if mask[k]:
                powers[k] = powers[k] + torch.exp(found[k]) ** 1.5 / (masked / tokens) / 2
    seen = [torch.log(power) for power in powers if power > 0]
    return lower, 0.5 * sum(seen) / len(seen) / 1.5 + 0.5 * lower


def spg(new: Any, old: Any, reference: Any, advantage: list[float]) -> Tensor:
    tokens = [min(end + 1, LENGTH) for end in ENDS]
    bounds = [lower if own > 0 else mixed for own, (lower, mixed) in zip(advantage, new, strict=True)]
    return -sum(n * own * each for n, own, each in zip(tokens, advantage, bounds, strict=True)) / sum(tokens)


def stable_drl(new: Any, old: Any, reference: Any, advantage: list[float]) -> Tensor:
    ratios = [min(float((now[0] - before[0]).detach()), math.log(5)) for now, before in zip(new, old, strict=True)]
    bounds = [lower if own > 0 else mixed for own, (lower, mixed) in zip(advantage, new, strict=True)]
    total = sum(math.exp(ratio) for ratio in ratios)
    return -sum(math.exp(w) / total * own * each for w, own, each in zip(ratios, advantage, bounds, strict=True))


def along_order(order: Callable[[RolloutRows], list[int]], size: int) -> Callable[..., list[list[Tensor]]]:
    """Log-probs of what each state reveals of the tokens that count."""

    def scored(policy: Policy, row: RolloutRows, key: Tensor, reference: bool) -> list[list[Tensor]]:
        steps, states = order(row), []
        distinct = sorted(set(steps))
        for first in range(0, len(distinct), size):
            chosen = distinct[first : first + size]
            mask = [step >= chosen[0] for step in steps]
            found = hidden_log_probs(policy, row, mask, reference=reference)
            ends = int((row.completion_ids[0] != END_OF_TEXT).sum())
            states.append([found[k] for k in range(LENGTH) if steps[k] in chosen and (size == 1 or k <= ends)])
        return [state for state in states if state]

    return scored


def trace_rl(new: Any, old: Any, reference: Any, advantage: list[float]) -> Tensor:
    total, states = torch.zeros(()), 0
    for i, own in enumerate(advantage):
        for now, before in zip(new[i], old[i], strict=True):
            states += 1
            for one, was in zip(now, before, strict=True):
                total = total - ppo(one - was, own, 0.2) / len(now)
                total = total + 0.01 * (torch.exp(was - one) - 1 + one - was)
    return total / states


def just_grpo(new: Any, old: Any, reference: Any, advantage: list[float]) -> Tensor:
    valid, total = sum(own != 0 for own in advantage) + 1e-5, torch.zeros(())
    for i, own in enumerate(advantage):
        for (one,) in new[i]:
            total = total - own * torch.exp(one - one.detach()) / LENGTH / valid
    return total


def elbos(policy: Policy, row: RolloutRows, key: Tensor, reference: bool) -> list[Tensor]:
    tokens = min(int((row.completion_ids[0] != END_OF_TEXT).sum()) + 1, LENGTH)
    blocks = torch.where(torch.arange(LENGTH) < tokens, 0, -1)[None]
    masks = draw_masks(key, length=LENGTH, replicates=16, blocks=blocks)[0].tolist()
    return [sum(hidden_log_probs(policy, row, mask, reference=reference)) / (sum(mask) / tokens) for mask in masks]


def ebpo(new: Any, old: Any, reference: Any, advantage: list[float]) -> Tensor:
    return -sum(ppo((sum(new[i]) - sum(old[i])) / 16, own, 0.2) for i, own in enumerate(advantage)) / 6


def bgpo(new: Any, old: Any, reference: Any, advantage: list[float]) -> Tensor:
    tokens, total = [min(end + 1, LENGTH) for end in ENDS], torch.zeros(())
    for i, own in enumerate(advantage):
        for one, before in zip(new[i], old[i], strict=True):
            moved = (one - before) / LENGTH
            ratio = torch.exp(torch.log(1 + moved) if own > 0 else moved)
            loss = torch.max(-own * ratio, -own * torch.clamp(ratio, 0.8, 1.2))
            loss = torch.min(torch.tensor(-own * 3), loss) if own < 0 else loss
            total = total + loss * tokens[i] / (sum(tokens) * 16)
    return total


def z_score(prompt: list[float], correction: int = 1, floor: float = 1e-6) -> list[float]:
    own = centred(prompt)
    spread = math.sqrt(sum(each**2 for each in own) / (len(own) - correction))
    return [each / (spread + floor) for each in own]


OBJECTIVES: dict[str, tuple[Callable[..., AdvantageObjective], Any, Callable[..., Tensor], Any]] = {
    "diffu-GRPO": (DiffuGRPO, mean_field, lambda *all_: per_token(*all_, epsilon=0.5, beta=0.04), centred),
    "coupled-GRPO": (CoupledGRPO, coupled, lambda *all_: per_token(*all_, epsilon=0.5, beta=0.01), others),
    "ESPO": (ESPO, espo_elbo, espo, others),
    "GDPO": (GDPO, quadrature, gdpo, centred),
    "GDSD": (GDSD, denoised, gdsd, others),
    "wd1": (WD1, mean_field, wd1, centred),
    "SPG": (SPG, sandwich, spg, centred),
    "StableDRL": (partial(SPG, ratio_clip=5.0), sandwich, stable_drl, centred),
    # Shorter than the published 8, as completions are.
    "TraceRL": (
        partial(TraceRL, shrink=2),
        along_order(lambda row: row.reveal_step[0].tolist(), 2),
        trace_rl,
        lambda prompt: z_score(prompt, 0, 0.0),
    ),
    "JustGRPO": (
        JustGRPO,
        along_order(lambda row: list(range(LENGTH)), 1),
        just_grpo,
        lambda prompt: z_score(prompt, 1, 1e-4),
    ),
    "EBPO": (EBPO, elbos, ebpo, z_score),
    "BGPO": (BGPO, elbos, bgpo, z_score),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_default_loss_is_the_published_one_and_so_is_its_gradient(name):
    kind, scored, published, advantages = OBJECTIVES[name]
    policy, rollouts = tiny_policy(), batch()
    policy.refresh_reference()
    head = policy.model.model.transformer.ff_out.weight
    objective, iteration = kind(), 1
    if objective.mask_draws is not None and name != "TraceRL":
        # The second masking of a buffer, in its fourth pass.
        objective, iteration = kind(mask_draws=2), 3
    rows = rollouts.rows()
    keys = fold_in(fold_in(rows.keys, Purpose.LOSS), 1)

    # Of StableDRL the behaviour policy has masks of its own.
    behaviour_keys = fold_in(rows.keys, Purpose.ELBO) if name == "StableDRL" else keys

    def all_rows(reference: bool = False, keys: Tensor = keys) -> list[Any]:
        return [scored(policy, rows[i : i + 1], keys[i : i + 1], reference) for i in range(len(rows))]

    with evaluating(policy):
        head.mul_(1.5)
        targets, _ = objective.prepare(policy, rollouts, rows_per_forward=4)
        old, reference = all_rows(keys=behaviour_keys), all_rows(reference=True)
        head += 0.05 * torch.randn(head.shape, generator=torch.Generator().manual_seed(1))
    policy.eval()
    flat = {name: target.flatten(0, 1) for name, target in targets.items()}
    loss, _ = objective.loss(policy, rows, flat, iteration=iteration, planned_rollouts=len(rows))
    advantage = [own for prompt in REWARD.tolist() for own in advantages(prompt)]
    expected = published(all_rows(), old, reference, advantage)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    parameters = list(policy.model.parameters())
    found, plain = (torch.autograd.grad(value, parameters) for value in (loss, expected))
    largest = float(max(gradient.abs().max() for gradient in plain))
    assert largest > 1e-3
    for own, other in zip(found, plain, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=2e-5 * largest)


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
