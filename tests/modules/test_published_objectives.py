"""Objectives of others: each default loss is the published one, token by token; overlays train and resume."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from dmpo_runs import Recorder, loader, overlay_options, small_dmpo, trainer, weights
from lightning.pytorch.callbacks import ModelCheckpoint

from dmpo_lightning import functional as F
from dmpo_lightning.objectives import BGPO, EBPO, ESPO, GDPO, GDSD, SPG, WD1, CoupledGRPO, DiffuGRPO, JustGRPO, TraceRL
from dmpo_lightning.policy import evaluating
from dmpo_lightning.rewards.scores import Scores
from dmpo_lightning.rollout import PromptBatch, Rollouts
from helpers import END_OF_TEXT, MASK, tiny_policy

PROMPTS, GROUP, LENGTH, ROWS = 2, 3, 6, range(6)
ENDS = [2, 6, 3, 1, 5, 4]
"""Where each completion has its end token; the second has none."""
COUNTED = [min(end + 1, LENGTH) for end in ENDS]
REWARD = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.0, 2.0]])
ORDER = [[2, 0, 1, 1, 3, 2], [0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]] * 2
EVERYWHERE = torch.ones(1, LENGTH, dtype=torch.bool)


def batch():
    completions = torch.tensor([[8 + (5 * row + 3 * k) % 11 for k in range(LENGTH)] for row in ROWS])
    for row, end in enumerate(ENDS):
        completions[row, end:] = END_OF_TEXT
    prompts = PromptBatch(
        torch.tensor([[7, 9, 12, 10], [0, 8, 8, 11]]),
        torch.tensor([[True] * 4, [False, True, True, True]]),
        torch.arange(PROMPTS),
        [{}] * PROMPTS,
        torch.zeros(PROMPTS, dtype=torch.bool),
    )
    return Rollouts(
        prompts=prompts,
        completion_ids=completions.view(PROMPTS, GROUP, LENGTH),
        keys=F.row_keys(0, torch.arange(PROMPTS), group_size=GROUP, buffer=0),
        reveal_step=torch.tensor(ORDER).view(PROMPTS, GROUP, LENGTH),
        sampled_log_prob=torch.zeros(PROMPTS, GROUP, LENGTH),
        scores=Scores({}, REWARD, failures=0),
        order_is_independent=False,
        temperature=1.0,
    )


def hidden_log_probs(policy, row, reference, mask, perturbed_by=None):
    """Log-probs of a completion's tokens where they are hidden, 0 elsewhere, from the logits of one row."""
    ids, prompt = row.completion_ids[0], row.prompt_ids[0].tolist()
    if perturbed_by is not None:
        draws = F.uniforms(F.fold_in(perturbed_by, F.Purpose.PROMPT), len(prompt))[0]
        for k, real in enumerate(row.prompt_mask[0]):
            prompt[k] = MASK if real and draws[k] < 0.15 else prompt[k]
    noisy = [MASK if hidden else int(token) for token, hidden in zip(ids, mask, strict=True)]
    attended = torch.cat((row.prompt_mask[0], EVERYWHERE[0]))[None]
    places = torch.arange(len(prompt), len(prompt) + LENGTH)
    logits = policy.logits(torch.tensor([prompt + noisy]), attended, places, reference=reference)
    return [logits[k][ids[k]] - logits[k].logsumexp(0) if mask[k] else torch.zeros(()) for k in range(LENGTH)]


# What each method scores of rollout i, which ``see`` shows at a masking, and its loss from that for all. --------------


def mean_field(see, i, key):
    return see([True] * LENGTH, key)


def coupled(see, i, key):
    *draws, last = F.uniforms(key, LENGTH + 1)[0].tolist()
    share = 0.2 + 0.6 * last
    first = [draw < share for draw in draws]
    everything, one, two = see([True] * LENGTH), see(first), see([not hidden for hidden in first])
    return [(everything[k] + (one[k] / share if first[k] else two[k] / (1 - share))) / 2 for k in range(LENGTH)]


def espo_elbo(see, i, key):
    total = torch.zeros(())
    for first, second in F.complementary_masks(key, EVERYWHERE, pairs=2)[0].tolist():
        share, one, two = sum(first) / (LENGTH + 1), see(first), see(second)
        for k in range(LENGTH):
            total = total + (one[k] / share if first[k] else two[k] / (LENGTH / (LENGTH + 1) - share)) / 2
    return total / 2


def quadrature(see, i, key):
    """Gauss-Legendre of three points, moved from (-1, 1) to (0, 1)."""
    masks, total = F.quadrature_masks(key, EVERYWHERE)[0].tolist(), torch.zeros(())
    for point, weight, mask in zip((-((3 / 5) ** 0.5), 0, (3 / 5) ** 0.5), (5 / 9, 8 / 9, 5 / 9), masks, strict=True):
        assert sum(mask) == int((point * 0.5 + 0.5) * LENGTH)
        if any(mask):
            total = total + 0.5 * weight * sum(see(mask)) / (point * 0.5 + 0.5)
    return total


def denoised(see, i, key):
    pairs = F.complementary_masks(key, EVERYWHERE, pairs=2)[0].tolist()
    return [sum(sum(see(mask)) for mask in pair) / 2 for pair in pairs]


def sandwich(see, i, key):
    """The lower bound, and half the upper plus half the lower."""
    tokens, lower, powers = COUNTED[i], torch.zeros(()), [torch.zeros(()) for _ in range(LENGTH)]
    counted = torch.arange(LENGTH)[None] < tokens
    masks = F.block_random_masks(key, counted, draws=2, block_length=32, perturbation=0.15)[0].tolist()
    for draw, mask in enumerate(masks):
        found = see(mask, F.fold_in(key, draw))
        for k in range(tokens):
            if mask[k]:
                lower = lower + found[k] / sum(mask[:tokens]) / 2
                powers[k] = powers[k] + torch.exp(found[k]) ** 1.5 / (sum(mask[:tokens]) / tokens) / 2
    seen = [torch.log(power) for power in powers if power > 0]
    return lower, 0.5 * sum(seen) / len(seen) / 1.5 + 0.5 * lower


def trajectory(see, i, key):
    """What each state of two steps reveals, up to the end."""
    steps, states = sorted(set(ORDER[i])), []
    for first in range(0, len(steps), 2):
        found = see([step >= steps[first] for step in ORDER[i]])
        states.append([found[k] for k in range(COUNTED[i]) if ORDER[i][k] in steps[first : first + 2]])
    return [state for state in states if state]


def left_to_right(see, i, key):
    return [see([place >= k for place in range(LENGTH)])[k] for k in range(LENGTH)]


def elbos(see, i, key):
    blocks = torch.where(torch.arange(LENGTH) < COUNTED[i], 0, -1)[None]
    masks = F.draw_masks(key, length=LENGTH, replicates=16, blocks=blocks)[0].tolist()
    return [sum(see(mask)) / (sum(mask) / COUNTED[i]) for mask in masks]


def ppo(log_ratio, advantage, epsilon):
    ratio = torch.exp(log_ratio)
    return torch.min(ratio * advantage, torch.clamp(ratio, 1 - epsilon, 1 + epsilon) * advantage)


def per_token(new, old, reference, advantage, *, beta):
    """Over all tokens up to and with the first end token, of all rollouts together."""
    total = torch.zeros(())
    for i in ROWS:
        for k in range(COUNTED[i]):
            ahead = reference[i][k] - new[i][k]
            total = total + beta * (torch.exp(ahead) - ahead - 1) - ppo(new[i][k] - old[i][k], advantage[i], 0.5)
    return total / sum(COUNTED)


def per_completion(new, old, reference, advantage, *, epsilon, length=LENGTH, beta=0.0):
    total = torch.zeros(())
    for i in ROWS:
        kl = (new[i] - reference[i]) ** 2 / 2 / LENGTH
        total = total + beta * kl - ppo((new[i] - old[i]) / length, advantage[i], epsilon)
    return total / 6


def gdsd(new, old, reference, advantage):
    total = torch.zeros(())
    for i in ROWS:
        for one, before, anchor in zip(new[i], old[i], reference[i], strict=True):
            held = torch.clamp(one - before, math.log(1 - 4e-4), math.log(1 + 4e-4))
            total = total + (held / LENGTH - 10 * advantage[i]) ** 2 / 6
            total = total + 1e-3 * (one - anchor) ** 2 / 2 / (6 * 2 * LENGTH)
    return total


def wd1(new, old, reference, advantage):
    total = torch.zeros(())
    for i in ROWS:
        own = advantage[i // GROUP * GROUP : i // GROUP * GROUP + GROUP]
        up, down = (math.exp(sign * advantage[i]) / sum(math.exp(sign * each) for each in own) for sign in (1, -1))
        total = total - (up - down) * sum(new[i][: COUNTED[i]]) / PROMPTS
    return total


def spg(new, old, reference, advantage, *, ratios=False):
    shares = [min(math.exp((new[i][0] - old[i][0]).detach()), 5.0) for i in ROWS] if ratios else COUNTED
    return -sum(shares[i] / sum(shares) * advantage[i] * new[i][0 if advantage[i] > 0 else 1] for i in ROWS)


def trace_rl(new, old, reference, advantage):
    total, states = torch.zeros(()), sum(map(len, new))
    for i in ROWS:
        for now, before in zip(new[i], old[i], strict=True):
            for one, was in zip(now, before, strict=True):
                total = total - ppo(one - was, advantage[i], 0.2) / len(now)
                total = total + 0.01 * (torch.exp(was - one) - 1 + one - was)
    return total / states


def just_grpo(new, old, reference, advantage):
    valid = sum(own != 0 for own in advantage) + 1e-5
    return -sum(advantage[i] * torch.exp(one - one.detach()) for i in ROWS for one in new[i]) / LENGTH / valid


def bgpo(new, old, reference, advantage):
    total = torch.zeros(())
    for i, own in enumerate(advantage):
        for one, before in zip(new[i], old[i], strict=True):
            moved = (one - before) / LENGTH
            ratio = torch.exp(torch.log(1 + moved) if own > 0 else moved)
            loss = torch.max(-own * ratio, -own * torch.clamp(ratio, 0.8, 1.2))
            loss = torch.min(torch.tensor(-own * 3), loss) if own < 0 else loss
            total = total + loss * COUNTED[i] / (sum(COUNTED) * 16)
    return total


def centred(prompt):
    return [own - sum(prompt) / len(prompt) for own in prompt]


def others(prompt):
    return [own - (sum(prompt) - own) / (len(prompt) - 1) for own in prompt]


def z_score(prompt, correction=1, floor=1e-6):
    spread = math.sqrt(sum(each**2 for each in centred(prompt)) / (len(prompt) - correction))
    return [each / (spread + floor) for each in centred(prompt)]


OBJECTIVES = {
    "diffu-GRPO": (DiffuGRPO, mean_field, partial(per_token, beta=0.04), centred),
    "coupled-GRPO": (CoupledGRPO, coupled, partial(per_token, beta=0.01), others),
    "ESPO": (ESPO, espo_elbo, partial(per_completion, epsilon=0.2, beta=1e-3), others),
    "GDPO": (GDPO, quadrature, partial(per_completion, epsilon=0.5), centred),
    "GDSD": (GDSD, denoised, gdsd, others),
    "wd1": (WD1, mean_field, wd1, centred),
    "SPG": (SPG, sandwich, spg, centred),
    "StableDRL": (partial(SPG, ratio_clip=5.0), sandwich, partial(spg, ratios=True), centred),
    # Shorter than the published 8, as completions are.
    "TraceRL": (partial(TraceRL, shrink=2), trajectory, trace_rl, partial(z_score, correction=0, floor=0.0)),
    "JustGRPO": (JustGRPO, left_to_right, just_grpo, partial(z_score, floor=1e-4)),
    "EBPO": (EBPO, lambda *a: sum(elbos(*a)) / 16, partial(per_completion, epsilon=0.2, length=1), z_score),
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
    keys = F.fold_in(F.fold_in(rows.keys, F.Purpose.LOSS), 1)
    # Of StableDRL the behaviour policy has masks of its own.
    behaviour_keys = F.fold_in(rows.keys, F.Purpose.ELBO) if name == "StableDRL" else keys

    def all_rows(reference=False, keys=keys):
        each = ((i, rows[i : i + 1], keys[i : i + 1]) for i in ROWS)
        return [scored(partial(hidden_log_probs, policy, row, reference), i, key) for i, row, key in each]

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
