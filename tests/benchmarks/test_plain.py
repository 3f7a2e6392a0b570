import pytest
import torch
from benchmarks.plain import transfer_rows
from cache_definition import decode_by_definition
from plain_policies import BLOCK, CACHES, LENGTH, ban_of, plain, policy_of, prompts_of
from scipy.stats import chisquare
from torch import Tensor

from dmpo_lightning.functional import row_keys
from dmpo_lightning.policy import Policy, evaluating
from dmpo_lightning.samplers import ConfidenceSampler

RULES = {"static": {"denoising_steps": 8}, "threshold": {"threshold": 0.9}, "factor": {"factor": 0.5}}


@pytest.mark.parametrize("rows", [1, 2, 4, 16])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("rule", list(RULES))
def test_the_confidence_sampler_decodes_the_same_tokens_in_the_same_order(rows, padded, same, cache, rule):
    policy = policy_of(211, sharpness=1.0 if rule == "static" else 3.0)
    assert_equal_to_the_sampler(policy, prompts_of(rows, 211, padded=padded, same=same), cache=cache, **RULES[rule])


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("rows", [1, 16])
def test_so_it_does_with_more_tokens_and_layers_one_token_at_a_time(cache, rows):
    policy = policy_of(2048, width=64, layers=4)
    assert_equal_to_the_sampler(policy, prompts_of(rows, 2048, padded=True), cache=cache)


@pytest.mark.parametrize("rule", list(RULES))
def test_so_it_does_where_many_confidences_would_be_1_in_float32(rule):
    """Sharper still, they would be 1 in float64 as well, and what the plain decoding takes first has no reason."""
    policy = policy_of(23, sharpness=8.0)
    assert_equal_to_the_sampler(policy, prompts_of(48, 23, padded=True), **RULES[rule])


def assert_equal_to_the_sampler(policy: Policy, prompts: tuple[Tensor, Tensor], **options) -> None:
    sampler = ConfidenceSampler(block_length=BLOCK, temperature=0.0, **options)
    keys = row_keys(0, torch.arange(len(prompts[0])), group_size=1, buffer=0).squeeze(1)
    with evaluating(policy):
        ours = sampler.sample(policy, *prompts, completion_length=LENGTH, keys=keys)
    theirs = plain(policy, prompts, **options)
    assert (theirs.completion_ids != ours.completion_ids).sum() == 0
    for row, expected in zip(ours.reveal_step, theirs.reveal_step, strict=True):
        assert order_within_blocks(row) == order_within_blocks(expected)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("padded", [False, True])
def test_cached_decoding_equals_whole_forwards_with_stale_keys_and_values(cache, rule, padded):
    policy = policy_of(211, sharpness=3.0)
    ids, mask = prompts_of(4, 211, padded=padded)
    result = plain(policy, (ids, mask), cache=cache, **RULES[rule])
    options = {"counts": [2] * 4, "threshold": None, "factor": None}
    for row in range(4):
        completion, revealed = decode_by_definition(
            policy.model,
            ids[row][mask[row]].tolist(),
            length=LENGTH,
            block_length=BLOCK,
            mask_token_id=policy.facts.mask_token_id,
            banned=list(policy.facts.banned_token_ids),
            cache=cache,
            **(options | {name: value for name, value in RULES[rule].items() if name in options}),
        )
        assert result.completion_ids[row].tolist() == completion
        assert order_within_blocks(result.reveal_step[row]) == order_within_blocks(torch.tensor(revealed))


def order_within_blocks(reveal_step: torch.Tensor) -> list[list[int]]:
    """Steps counted from each block's start: how many steps the blocks before it took does not matter."""
    return [(block - block.min()).tolist() for block in reveal_step.split(BLOCK)]


@pytest.mark.parametrize("rule", list(RULES))
def test_the_caches_change_tokens(rule):
    """Otherwise the comparisons above would say nothing."""
    policy, prompts = policy_of(211, sharpness=3.0), prompts_of(4, 211, padded=False)
    results = [plain(policy, prompts, cache=cache, **RULES[rule]).completion_ids for cache in CACHES]
    assert (results[0] != results[1]).any()
    assert (results[0] != results[2]).any()
    assert (results[1] != results[2]).any()


@pytest.mark.parametrize("rule", ["threshold", "factor"])
def test_dynamic_rules_reveal_several_tokens_in_some_steps_and_one_in_others(rule):
    result = plain(policy_of(211, sharpness=3.0), prompts_of(1, 211, padded=False), **RULES[rule])
    numbers = result.reveal_step[0].bincount()
    assert len(numbers) == result.forwards
    assert numbers.min() == 1
    assert numbers.max() > 1


CONFIDENCE = torch.tensor(
    [
        [0.95, 0.5, 0.99, 0.9, 0.97],
        [0.1, 0.3, 0.2, 0.25, 0.999],
        [0.95, 0.95, 0.95, 0.95, 0.95],
    ],
    dtype=torch.float64,
)
CANDIDATES = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [0, 0, 0, 0, 0]]).bool()


def chosen(confidence: torch.Tensor, candidates: torch.Tensor, **rule) -> list[list[int]]:
    return [row.nonzero().squeeze(1).tolist() for row in transfer_rows(confidence, candidates, **rule)]


def test_count_reveals_the_most_confident_candidates_of_each_row():
    assert chosen(CONFIDENCE, CANDIDATES, count=torch.tensor([2, 1, 0])) == [[0, 2], [1], []]


def test_threshold_reveals_all_that_reach_it_and_the_best_one_always():
    assert chosen(CONFIDENCE, CANDIDATES, threshold=0.9) == [[0, 2, 3], [1], []]


@pytest.mark.parametrize(
    ("confidence", "revealed"),
    [
        ([0.2], [0]),  # the best passes always
        ([0.6, 0.5, 0.4], [0]),  # ranks 2 and 3 ask for 2/3 and 3/4
        ([0.6, 0.7, 0.4, 0.3], [1]),  # 0.7, then 0.6 < 2/3
        ([0.9, 0.8, 0.7, 0.3], [0, 1]),  # 0.7 < 3/4 at rank 3 of 4
        ([0.9, 0.8, 0.76, 0.1], [0, 1, 2, 3]),  # only the last fails (asks for 4/5): it is revealed as well
        ([0.9, 0.1], [0, 1]),  # the same with two candidates
        ([0.99, 0.98, 0.97, 0.96], [0, 1, 2, 3]),  # none fails
    ],
)
def test_factor_one_reveals_up_to_the_first_rank_that_fails(confidence, revealed):
    row = torch.tensor([confidence], dtype=torch.float64)
    assert chosen(row, torch.ones_like(row).bool(), factor=1.0) == [revealed]


def test_factor_counts_candidates_only():
    """Row 0 asks for 1/2, 2/3, 3/4, 4/5 of 0.99, 0.95, 0.9, 0.5; the 0.97 is no candidate."""
    assert chosen(CONFIDENCE, CANDIDATES, factor=1.0) == [[0, 1, 2, 3], [1], []]


def test_tokens_are_distributed_as_the_tempered_softmax():
    """One place to fill, 20 000 equal rows: the frequencies of softmax(logits / 0.2)."""
    policy = policy_of(16)
    policy.model.get_output_embeddings().weight.data.mul_(0.1)
    ids, mask = torch.tensor([[3, 1, 4]]), torch.ones(1, 3).bool()
    drawn = plain(
        policy,
        (ids.expand(20000, -1), mask.expand(20000, -1)),
        completion_length=1,
        block_length=1,
        temperature=0.2,
        generator=torch.Generator().manual_seed(0),
    ).completion_ids.squeeze(1)
    with torch.no_grad():
        logits = policy.model(torch.tensor([[3, 1, 4, 12]])).logits[0, -1].double() + ban_of(policy)
    expected = 20000 * (logits / 0.2).softmax(-1)[:12]
    assert expected.min() > 5
    assert chisquare(drawn.bincount(minlength=12), expected.numpy()).pvalue > 1e-3


def test_random_remasking_reveals_the_planned_numbers_in_an_order_of_its_own():
    policy, prompts = policy_of(211), prompts_of(2, 211, padded=False)
    result = plain(policy, prompts, denoising_steps=6, remasking="random", generator=torch.Generator().manual_seed(0))
    for row in result.reveal_step:
        assert row.bincount().tolist() == [3, 3, 2, 3, 3, 2]
    assert (result.reveal_step != plain(policy, prompts, denoising_steps=6).reveal_step).any()
