"""Sampling of a block-causal policy equals decoding each row by itself, without padding and without a cache."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from dmpo_lightning.functional import Purpose, fold_in, row_keys, trajectory_log_prob, trajectory_masks, uniforms
from dmpo_lightning.models.kv_cache import KeyValueCache
from dmpo_lightning.policy import Policy, evaluating
from dmpo_lightning.samplers import (
    ConfidenceSampler,
    RandomOrderSampler,
    Sampler,
    Samples,
    WinoSampler,
    draw_tokens,
    observed,
    step_uniforms,
)
from helpers import MASK, pad_more, tiny_policy
from small_models import tiny_adapted, tiny_llada2, tiny_sdar

LENGTH = 9
WHOLE = {"temperature": 0.0}
SAMPLERS = {
    "one by one": (ConfidenceSampler(**WHOLE), 4),
    "two at once": (ConfidenceSampler(denoising_steps=6, **WHOLE), 3),
    "sequential": (ConfidenceSampler(remasking="sequential"), 4),
    "random": (ConfidenceSampler(remasking="random"), 4),
    "threshold": (ConfidenceSampler(threshold=0.4, **WHOLE), 4),
    "factor": (ConfidenceSampler(factor=1.2), 4),
    "top-k": (ConfidenceSampler(top_k=3), 4),
    "top-p": (ConfidenceSampler(top_p=0.6), 4),
    "warm, static": (ConfidenceSampler(temperature=0.5), 4),
    "cold, two at once": (ConfidenceSampler(temperature=0.2, denoising_steps=6), 3),
    "cold, threshold": (ConfidenceSampler(temperature=0.2, threshold=0.9), 4),
    "cold, top-k, top-p, factor": (ConfidenceSampler(temperature=0.5, top_k=4, top_p=0.8, factor=1.2), 4),
    "cold, a block of 32": (ConfidenceSampler(temperature=0.2, top_k=3), 32),
    "only one to draw from": (ConfidenceSampler(top_k=1), 4),
    "only one, threshold": (ConfidenceSampler(top_k=1, threshold=0.9), 4),
    "only one, never above the threshold": (ConfidenceSampler(top_k=1, threshold=1.0), 4),
    "cold, the model's confidence": (ConfidenceSampler(temperature=0.2, confidence="model"), 4),
    "only one, the model's confidence": (ConfidenceSampler(top_k=1, threshold=0.4, confidence="model"), 4),
    "random order, top-k and top-p": (RandomOrderSampler(temperature=0.7, top_k=5, top_p=0.8), 4),
    "random order": (RandomOrderSampler(temperature=0.7), 4),
    "blocks of one": (ConfidenceSampler(), 1),
    "one block": (ConfidenceSampler(), 16),
    "greedy, blocks of one": (ConfidenceSampler(temperature=0.0), 1),
}
"""And the size of the model's blocks."""


def policy_of(block: int, model: Callable[..., nn.Module] = tiny_sdar) -> Policy:
    return tiny_policy(model=model(block_size=block), with_reference=False)


def prompts(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(lengths)
    ids = torch.randint(6, 25, (len(lengths), width), generator=torch.Generator().manual_seed(1))
    return ids, torch.arange(width) >= width - torch.tensor(lengths)[:, None]


def every_length(block: int) -> list[int]:
    """Lengths with every remainder modulo the block, six at least, longer and shorter ones by turns."""
    lengths = list(range(1, max(block, 6) + 1))
    return lengths[::2] + lengths[1::2]


def keys_of(rows: int) -> torch.Tensor:
    return row_keys(0, torch.arange(rows), group_size=1, buffer=0).squeeze(1)


def sample(policy: Policy, sampler: Sampler, ids, mask, keys, length: int = LENGTH) -> Samples:
    with evaluating(policy):
        return sampler.sample(policy, ids, mask, completion_length=length, keys=keys)


def plain_confidence(logits: torch.Tensor, tokens: torch.Tensor, sampler) -> list[float]:
    """What SDAR's published code ranks tokens by: their probability once temperature, top-k and top-p have worked."""
    logits = logits.double()
    if sampler.confidence != "model" and sampler.temperature > 0:
        logits = logits / sampler.temperature
        if sampler.top_k is not None:
            logits[logits < logits.sort(descending=True).values[:, sampler.top_k - 1 : sampler.top_k]] = -torch.inf
        if sampler.top_p is not None:
            ordered, order = logits.softmax(-1).sort(descending=True)
            removed = torch.zeros_like(ordered, dtype=torch.bool)
            removed.scatter_(1, order, ordered.cumsum(-1) - ordered > sampler.top_p)
            logits[removed] = -torch.inf
    return logits.softmax(-1).gather(1, tokens[:, None])[:, 0].tolist()


def chosen_places(sampler, places: list[int], confidence: list[float], key, step: int, within: int, size: int) -> set:
    """The rules once more, for the masked places of one row's block."""
    order = sorted(range(len(places)), key=lambda i: -confidence[i])
    if isinstance(sampler, RandomOrderSampler):
        noise = uniforms(fold_in(key, Purpose.ORDER), LENGTH)[0]
        return {min(places, key=lambda place: noise[place].item())}
    if sampler.threshold is not None:
        return {places[order[0]]} | {places[i] for i in order if confidence[i] > sampler.threshold}
    if sampler.factor is not None:
        count = 1
        while count < len(order) and (count + 2) * (1 - confidence[order[count]]) <= sampler.factor:
            count += 1
        count = len(order) if count >= len(order) - 1 else count
        return {places[i] for i in order[:count]}
    if sampler.remasking == "sequential":
        return {places[0]}
    if sampler.remasking == "random":
        noise = uniforms(fold_in(fold_in(key, Purpose.REMASKING), step), LENGTH)[0]
        return {max(places, key=lambda place: noise[place].item())}
    steps = size if sampler.denoising_steps is None else sampler.denoising_steps * size // LENGTH
    count = size // steps + (within < size % steps)
    return {places[i] for i in order[:count]}


@torch.no_grad()
def decode_plainly(policy: Policy, sampler, prompt: list[int], key: torch.Tensor) -> tuple[list, list, list]:
    """One row, every forward over all that the model may see, and blocks counted from the first token."""
    size, start = policy.block_size, len(prompt)
    ids, steps, log_probs = [*prompt, *[MASK] * LENGTH], [-1] * LENGTH, [0.0] * LENGTH
    first = start // size
    for block in range(first, (start + LENGTH - 1) // size + 1):
        stop = min((block + 1) * size, start + LENGTH)
        for within in range(size):
            places = [i - start for i in range(max(block * size, start), stop) if ids[i] == MASK]
            if not places:
                break
            logits = policy.model(torch.tensor([ids[:stop]])).logits[0, [start + place for place in places]]
            logits = logits + policy._ban
            step = (block - first) * size + within
            uniform = step_uniforms(key, step, LENGTH)[0, places]
            options = {name: getattr(sampler, name) for name in ("temperature", "top_k", "top_p")}
            draw = draw_tokens(logits, uniform, **options)
            confidence = plain_confidence(logits, draw.tokens, sampler)
            for place in chosen_places(sampler, places, confidence, key, step, within, size):
                ids[start + place] = draw.tokens[places.index(place)].item()
                steps[place], log_probs[place] = step, draw.log_prob[places.index(place)].item()
        if any(token in policy.facts.end_token_ids for token in ids[start:stop]):
            ids[stop:] = [policy.facts.end_token_ids[0]] * (start + LENGTH - stop)
            break
    return ids[start:], steps, log_probs


@pytest.mark.parametrize(("sampler", "block"), SAMPLERS.values(), ids=SAMPLERS.keys())
def test_samples_are_those_of_each_row_decoded_by_itself_without_a_cache(sampler, block):
    """Prompts of every length modulo the block in one batch; some rows end early, others late."""
    equals_rows_by_themselves(policy_of(block), sampler)


@pytest.mark.parametrize("name", ["one by one", "cold, top-k, top-p, factor", "random order", "blocks of one"])
@pytest.mark.parametrize("model", [tiny_adapted, tiny_llada2], ids=["shifted", "mixture"])
def test_samples_of_a_shifted_model_and_of_a_mixture_are_too(name, model):
    sampler, block = SAMPLERS[name]
    equals_rows_by_themselves(policy_of(block, model), sampler)


def equals_rows_by_themselves(policy: Policy, sampler: Sampler) -> None:
    block = policy.block_size
    ids, mask = prompts(every_length(block))
    policy._ban[list(policy.facts.end_token_ids)] = 1.5  # which makes ends more likely
    keys = keys_of(len(ids))
    found = sample(policy, sampler, ids, mask, keys)
    ended = 0
    for row in range(len(ids)):
        expected = decode_plainly(policy, sampler, ids[row][mask[row]].tolist(), keys[row : row + 1])
        tokens, steps, log_probs = expected
        assert found.completion_ids[row].tolist() == tokens
        assert found.reveal_step[row].tolist() == steps
        torch.testing.assert_close(found.log_prob[row], torch.tensor(log_probs), atol=1e-4, rtol=1e-4)
        ended += -1 in steps
    assert block == 16 or ended > 0  # else nothing ended early


def test_a_longer_completion_begins_with_the_whole_blocks_of_a_shorter_one():
    """Nobody sees what stands behind a block, so that completions may be longer than those of training."""
    policy, (ids, mask) = policy_of(4), prompts(every_length(4))
    sampler, keys = ConfidenceSampler(temperature=0.0), keys_of(len(ids))
    short, long = (sample(policy, sampler, ids, mask, keys, length).completion_ids for length in (21, 40))
    for row, length in enumerate(mask.sum(1).tolist()):
        whole = (length + 21) // 4 * 4 - length
        assert torch.equal(short[row, :whole], long[row, :whole])


@pytest.mark.parametrize("sampler", [ConfidenceSampler(), RandomOrderSampler()], ids=["confidence", "random order"])
def test_completions_depend_neither_on_other_rows_nor_on_padding(sampler):
    policy, (ids, mask) = policy_of(4), prompts([5, 2, 7, 6])
    keys = keys_of(4)
    expected = sample(policy, sampler, ids, mask, keys)
    assert torch.equal(sample(policy, sampler, *pad_more(ids, mask, 3), keys).completion_ids, expected.completion_ids)
    for row in range(4):
        alone = sample(policy, sampler, ids[row : row + 1], mask[row : row + 1], keys[row : row + 1])
        assert torch.equal(alone.completion_ids, expected.completion_ids[row : row + 1])
        assert torch.equal(alone.reveal_step, expected.reveal_step[row : row + 1])


def test_rollouts_of_one_prompt_are_what_they_are_alone():
    """Their prompt is computed once, and the cache is copied to all of them."""
    policy, (ids, mask) = policy_of(4), prompts([6, 3])
    ids, mask, keys = ids.repeat_interleave(3, 0), mask.repeat_interleave(3, 0), keys_of(6)
    found = sample(policy, ConfidenceSampler(), ids, mask, keys)
    for row in range(6):
        alone = sample(policy, ConfidenceSampler(), ids[row : row + 1], mask[row : row + 1], keys[row : row + 1])
        assert torch.equal(found.completion_ids[row], alone.completion_ids[0])


def without_ends(policy: Policy) -> Policy:
    """Nothing that it samples ends a completion."""
    policy._ban[list(policy.facts.end_token_ids)] = -torch.inf
    return policy


def computed(policy: Policy) -> list[tuple[int, int]]:
    """Rows and columns of each forward, as they come."""
    shapes: list[tuple[int, int]] = []
    policy.model.register_forward_pre_hook(lambda model, inputs: shapes.append(tuple(inputs[0].shape)))
    return shapes


def test_a_step_computes_its_block_and_once_the_block_before():
    """Whatever came before: the cost of a token grows with finished blocks by attention alone."""
    policy, (ids, mask) = without_ends(policy_of(4)), prompts([8, 8])
    shapes = computed(policy)
    sample(policy, ConfidenceSampler(), ids, mask, keys_of(2), length=40)
    assert shapes == [(2, 12), *[(2, 4)] * 3, *[(2, 8), *[(2, 4)] * 3] * 9]


def test_rows_that_are_over_are_left_out():
    policy, (ids, mask) = policy_of(4), prompts([4] * 8)
    shapes = computed(policy)
    found = sample(policy, ConfidenceSampler(), ids, mask, keys_of(8), length=24)
    blocks = (found.reveal_step.amax(1) // 4 + 1).tolist()
    assert len(set(blocks)) > 2
    assert [rows for rows, _ in shapes] == [
        sum(b > number for b in blocks) for number in range(max(blocks)) for _ in range(4)
    ]


def test_a_growing_cache_returns_no_column_that_was_not_written():
    cache = KeyValueCache(torch.ones(1, 8, dtype=torch.bool), is_padded=False, grows=True)
    keys, values = cache.store(0, 0)(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))
    assert keys.shape == values.shape == (1, 2, 3, 4)
    keys, _ = cache.store(0, 2)(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4))
    assert keys[0, 0, :, 0].tolist() == [0, 0, 1, 1, 1]


@torch.no_grad()
@pytest.mark.parametrize(
    "sampler",
    [RandomOrderSampler(temperature=0.8), ConfidenceSampler(remasking="sequential", temperature=0.8)],
    ids=["random order", "sequential"],
)
def test_a_replayed_trajectory_has_the_log_prob_that_was_recorded(sampler):
    """All blocks beside each other, so in as many maskings as a block has tokens. Early ends are drawn by nobody."""
    assert sampler.order_is_independent
    policy, (ids, mask) = policy_of(4), prompts([5, 2, 7, 4])
    found = sample(policy, sampler, ids, mask, keys_of(4))
    assert (found.reveal_step < 0).any()
    masks, revealed = trajectory_masks(policy.replayed_steps(found.reveal_step), 4)
    log_prob = policy.eval().completion_log_probs(
        ids, mask, found.completion_ids, masks, at=revealed, temperature=sampler.temperature
    )
    torch.testing.assert_close(trajectory_log_prob(log_prob, revealed), found.log_prob.sum(1), atol=1e-4, rtol=1e-4)


def test_from_left_to_right_a_bidirectional_policy_reveals_in_order():
    policy = tiny_policy(with_reference=False)
    ids, mask = prompts([3, 5])
    found = sample(policy, ConfidenceSampler(remasking="sequential", block_length=3), ids, mask, keys_of(2))
    assert found.reveal_step.tolist() == [list(range(LENGTH))] * 2


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        (ConfidenceSampler(block_length=3), r"`block_length` of ConfidenceSampler must be null or 4 .* got 3"),
        (RandomOrderSampler(block_length=3), r"`block_length` of RandomOrderSampler must be null or 4"),
        (ConfidenceSampler(cache="prefix"), "Finished blocks of SDAR are kept exactly"),
        (ConfidenceSampler(denoising_steps=5), r"`denoising_steps` must be a multiple of `completion_length` / 4"),
        (WinoSampler(), "needs a native bidirectional backbone"),
    ],
)
def test_what_a_block_causal_policy_cannot_do_is_refused(sampler, message):
    ids, mask = prompts([3])
    with pytest.raises(ValueError, match=message):
        sample(policy_of(4), sampler, ids, mask, keys_of(1))


def test_whoever_watches_sees_every_change_and_every_step():
    """Rows whose prompts end at different places of a block, and of which some are over early."""
    policy, steps = policy_of(4), []
    policy._ban[list(policy.facts.end_token_ids)] = 0.5
    ids, mask = prompts([5, 8, 3, 7])
    watched, confidence = torch.full((4, LENGTH), MASK), torch.full((4, LENGTH), torch.nan)

    def note(change):
        watched[change.rows] = torch.where(change.written, change.completion_ids, watched[change.rows])
        confidence[change.rows] = torch.where(change.written, change.confidence, confidence[change.rows])
        assert torch.equal(watched[change.rows], change.completion_ids)

    expected = sample(policy, ConfidenceSampler(), ids, mask, keys_of(4))
    assert 0 < (expected.reveal_step < 0).any(1).sum() < 4
    policy.on_denoising_step = lambda done, total: steps.append((done, total))
    policy.expect_steps(0, LENGTH)
    with observed(note):
        found = sample(policy, ConfidenceSampler(), ids, mask, keys_of(4))
    assert torch.equal(found.completion_ids, expected.completion_ids)
    assert torch.equal(watched, found.completion_ids)
    assert torch.equal(confidence.isnan(), found.reveal_step < 0)
    assert steps == sorted(steps)
    assert steps[1] == (1, LENGTH)
    assert steps[-1] == (LENGTH, LENGTH)
