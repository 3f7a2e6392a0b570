"""WINO against a single-row implementation in plain Python, and what its rules promise."""

import pytest
import torch

from dmpo_lightning.functional import row_keys
from dmpo_lightning.models.kv_cache import Columns
from dmpo_lightning.policy import Policy, evaluating
from dmpo_lightning.samplers import Samples, WinoSampler
from dmpo_lightning.samplers.wino import accepted, shadow_attention, taken_back
from helpers import MASK, NEVER_SAMPLED, pad_more, prompt_batch, tiny_policy
from small_models import tiny_dream

LENGTH = 16
PROMPTS = ["12", "1234", "3", "44 12"]


def sample(policy: Policy, sampler: WinoSampler, prompts: list[str] = PROMPTS, *, padding: int = 0) -> Samples:
    batch = prompt_batch(policy, prompts)
    ids, mask = pad_more(batch.prompt_ids, batch.prompt_mask, padding)
    keys = row_keys(0, batch.prompt_index, group_size=1, buffer=0).squeeze(1)
    with evaluating(policy):
        return sampler.sample(policy, ids, mask, completion_length=LENGTH, keys=keys)


def probabilities(policy: Policy, ids: list[int], seen: list[list[bool]], places: list[int]) -> torch.Tensor:
    logits = policy.model(
        torch.tensor([ids]), torch.tensor([seen]), columns=Columns(torch.tensor([places]))
    ).logits.double()
    logits[..., list(NEVER_SAMPLED)] = -torch.inf
    return logits[0].softmax(-1)


def plain_wino(policy: Policy, prompt: list[int], block: int, low: float, high: float) -> tuple[list[int], list[int]]:
    """One row, one place at a time, shadows built by hand."""
    completion, revealed_in, first = [MASK] * LENGTH, [-1] * LENGTH, len(prompt)
    for start in range(0, LENGTH, block):
        inside, before, step = range(start, start + block), block, start
        while any(completion[place] == MASK for place in inside):
            masked = [place for place in inside if completion[place] == MASK]
            ids, size = prompt + completion + [MASK] * block, first + LENGTH
            seen = [[column < size for column in range(size + block)] for _ in range(size + block)]
            for shadow in range(block):
                seen[size + shadow][first + start + shadow] = False
                # All shadows, as in the published code: there their part of the mask is `ones(block, block)`.
                seen[size + shadow][size:] = [True] * block
            table = probabilities(policy, ids, seen, [*range(size), *range(first + start, first + start + block)])
            candidates = sorted(masked, key=lambda place: -float(table[first + place].max()))
            cap = min(max(int(len(masked) * 0.7), 5), 20)
            sure = [place for place in candidates if table[first + place].max() > low]
            chosen = (sure or candidates[:1])[:cap]
            kept = {
                place: float(table[size + place - start, completion[place]]) for place in inside if place not in masked
            }
            worst = sorted(kept, key=kept.__getitem__)[: before - 1] if len(chosen) > 1 else []
            for place in chosen:
                completion[place], revealed_in[place] = int(table[first + place].argmax()), step
            for place in worst:
                if kept[place] < high:
                    completion[place], revealed_in[place] = MASK, -1
            before, step = len(chosen), step + 1
    return completion, revealed_in


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("block", "low", "high"), [(16, 0.3, 0.9), (8, 0.2, 0.5), (4, 0.6, 0.9), (16, 0.05, 0.99)])
def test_greedy_wino_equals_the_plain_algorithm_row_by_row(seed, block, low, high):
    policy = tiny_policy(seed, with_reference=False)
    sampler = WinoSampler(block_length=block, threshold=low, verification_threshold=high)
    samples, batch = sample(policy, sampler), prompt_batch(policy, PROMPTS)
    for row, (ids, mask) in enumerate(zip(batch.prompt_ids, batch.prompt_mask, strict=True)):
        completion, revealed_in = plain_wino(policy, ids[mask].tolist(), block, low, high)
        assert samples.completion_ids[row].tolist() == completion
        assert samples.reveal_step[row].tolist() == revealed_in


def test_tokens_are_taken_back_and_the_block_still_ends_in_as_many_steps_as_places(monkeypatch):
    policy, taken = tiny_policy(1, with_reference=False), []

    def counting(*arguments, **options):
        doubtful = taken_back(*arguments, **options)
        taken.append(int(doubtful.sum()))
        return doubtful

    monkeypatch.setattr("dmpo_lightning.samplers.wino.taken_back", counting)
    samples = sample(policy, WinoSampler(threshold=0.05, verification_threshold=0.99))
    assert sum(taken) > 0
    assert len(taken) <= LENGTH
    assert (samples.completion_ids != MASK).all()
    assert (samples.reveal_step >= 0).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_completion_depends_neither_on_other_rows_nor_on_padding(temperature):
    policy = tiny_policy(2, with_reference=False)
    sampler = WinoSampler(block_length=8, threshold=0.2, temperature=temperature)
    together, padded = sample(policy, sampler), sample(policy, sampler, padding=3)
    assert torch.equal(together.completion_ids, padded.completion_ids)
    alone = sample(policy, sampler, PROMPTS[:1])
    assert torch.equal(together.completion_ids[:1], alone.completion_ids)
    assert torch.equal(together.reveal_step[:1], alone.reveal_step)


def test_a_step_accepts_what_is_above_the_threshold_but_at_least_one_and_at_most_its_cap():
    confidence = torch.tensor([[0.9, 0.7, 0.5, 0.8], [0.1, 0.3, 0.2, 0.3], [0.9, 0.9, 0.9, 0.9]])
    masked = torch.tensor([[True, True, True, False], [True] * 4, [False] * 4])
    chosen = accepted(confidence.double().logit(), masked, 0.6)
    assert chosen.tolist() == [[True, True, False, False], [False, True, False, False], [False] * 4]
    many = accepted(torch.linspace(0.7, 0.9, 32)[None].logit(), torch.ones(1, 32, dtype=torch.bool), 0.6)
    assert many.sum() == 20
    assert many[0, -20:].all()
    few = accepted(torch.full((1, 6), 0.9).logit(), torch.ones(1, 6, dtype=torch.bool), 0.6)
    assert few.tolist() == [[True] * 5 + [False]]


def test_of_candidates_whose_probabilities_round_to_1_those_of_the_highest_odds_are_accepted():
    odds = torch.arange(40.0, 52.0).double()[None]
    assert (odds.sigmoid() == 1).all()
    assert accepted(odds, torch.ones(1, 12, dtype=torch.bool), 0.6).tolist() == [[False] * 4 + [True] * 8]


def test_fewer_tokens_are_taken_back_than_the_step_before_revealed_the_worst_first():
    verified = torch.tensor([[0.5, 0.2, 0.95, 0.3, 0.1]]).logit()
    masked = torch.tensor([[False, False, False, False, True]])
    two, one = torch.tensor([[False, False, False, False, True]]), torch.tensor([3])
    assert not taken_back(verified, masked, two, one, threshold=0.9).any()
    wider, masks = torch.nn.functional.pad(verified, (0, 1)), torch.nn.functional.pad(masked, (0, 1), value=True)
    chosen = torch.nn.functional.pad(two, (0, 1), value=True)
    back = taken_back(wider, masks, chosen, one, threshold=0.9)
    assert back.tolist() == [[False, True, False, True, False, False]]


def test_shadows_see_each_other_no_column_sees_a_shadow_and_no_shadow_sees_its_own_token():
    seen = shadow_attention(torch.tensor([[False, True, True, True]]), 2, 2)[0]
    assert seen.int().tolist() == [
        [0, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 1, 0, 1, 1, 1],
        [0, 1, 1, 0, 1, 1],
    ]


def test_a_shifted_backbone_is_refused():
    policy = tiny_policy(model=tiny_dream(), with_reference=False)
    with pytest.raises(ValueError, match="whose logits stand at their own position"):
        sample(policy, WinoSampler())


@pytest.mark.parametrize("name", ["threshold", "verification_threshold"])
@pytest.mark.parametrize("value", [0.0, 1.5])
def test_a_threshold_that_is_no_probability_is_an_error(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be a probability"):
        WinoSampler(**{name: value})
