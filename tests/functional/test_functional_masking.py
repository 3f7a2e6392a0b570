"""Maskings with exact counts."""

import pytest
import torch
from scipy.stats import chisquare

from dmpo_lightning.functional import (
    antithetic_pair,
    draw_masks,
    mask_count,
    position_ranks,
    trajectory_masks,
    uniforms,
)

KEYS = torch.arange(3000)


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_mask_counts_are_uniform_on_one_to_length(antithetic, length):
    counts = draw_masks(KEYS, length=length, replicates=2, antithetic=antithetic).sum(-1)
    for replicate in range(2):
        frequencies = torch.bincount(counts[:, replicate], minlength=length + 1)
        assert frequencies[0] == 0
        assert length == 1 or chisquare(frequencies[1:]).pvalue > 0.001


@pytest.mark.parametrize("antithetic", [True, False])
def test_every_set_of_positions_of_a_size_is_as_likely_as_the_next(antithetic):
    masks = draw_masks(KEYS, length=4, replicates=2, antithetic=antithetic)[:, 1]
    pairs = masks[masks.sum(-1) == 2].long() @ torch.tensor([8, 4, 2, 1])
    frequencies = torch.bincount(pairs, minlength=16)[[3, 5, 6, 9, 10, 12]]
    assert frequencies.sum() == len(pairs)
    assert chisquare(frequencies).pvalue > 0.001


@pytest.mark.parametrize("length", [1, 2, 7])
def test_antithetic_pair_covers_all_positions_and_shares_exactly_one(length):
    first, second = draw_masks(KEYS, length=length, replicates=4).unflatten(1, (2, 2)).unbind(2)
    assert (first | second).all()
    assert ((first & second).sum(-1) == 1).all()


def test_pair_of_a_permutation_is_its_head_and_its_tail():
    # The permutation visits positions 2, 0, 3, 1, so their ranks are 1, 3, 0, 2; with m = 2: {2, 0} and {0, 3, 1}.
    head, tail = antithetic_pair(torch.tensor([1, 3, 0, 2]), torch.tensor(2))
    assert head.tolist() == [True, False, True, False]
    assert tail.tolist() == [True, True, False, True]


def test_different_pairs_of_a_row_are_drawn_independently():
    counts = draw_masks(KEYS, length=3, replicates=4)[:, ::2].sum(-1) - 1
    assert chisquare(torch.bincount(counts @ torch.tensor([3, 1]), minlength=9)).pvalue > 0.001


def test_masks_of_a_row_do_not_depend_on_the_other_rows():
    together = draw_masks(KEYS, length=5, replicates=4)
    assert torch.equal(draw_masks(KEYS[100:101], length=5, replicates=4)[0], together[100])


def test_masks_keep_the_axes_of_their_keys():
    assert draw_masks(KEYS.view(30, 100), length=5, replicates=4).shape == (30, 100, 4, 5)


def test_odd_replicates_are_refused_when_antithetic_with_a_remedy():
    with pytest.raises(ValueError, match=r"`replicates` must be positive, and even .*got 3; use 4 or antithetic"):
        draw_masks(KEYS, length=5, replicates=3)


@pytest.mark.parametrize("antithetic", [False, True])
def test_no_replicates_at_all_are_refused_with_a_remedy(antithetic):
    with pytest.raises(ValueError, match=r"`replicates` must be positive.* got 0; use 2\.$"):
        draw_masks(KEYS, length=5, replicates=0, antithetic=antithetic)


def test_odd_replicates_are_fine_without_pairs():
    assert draw_masks(KEYS, length=5, replicates=3, antithetic=False).shape == (3000, 3, 5)


def test_position_ranks_say_when_each_position_comes():
    assert position_ranks(torch.tensor([0.3, 0.9, 0.1])).tolist() == [1, 2, 0]


def test_mask_count_splits_the_unit_interval_evenly():
    draws = torch.tensor([2**-24, 0.249, 0.251, 0.499, 0.501, 0.749, 0.751, 1 - 2**-24])
    assert mask_count(draws, 4).tolist() == [1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("length", [3, 1000, 10**6 + 1])
def test_mask_count_never_exceeds_the_length(length):
    extremes = torch.tensor([2**-24, 1 - 2**-24])
    assert mask_count(extremes, length).tolist() == [1, length]
    assert mask_count(uniforms(KEYS, 10), length).max() <= length


def test_trajectory_masks_replay_a_recorded_order():
    # Position 1 first, then 0 and 2 together: three positions, two steps.
    masks, revealed = trajectory_masks(torch.tensor([1, 0, 1]), steps=2)
    assert masks.tolist() == [[True, True, True], [True, False, True]]
    assert revealed.tolist() == [[False, True, False], [True, False, True]]


def test_every_position_is_revealed_once_and_stays_masked_until_then():
    reveal_step = position_ranks(uniforms(KEYS[:20], 6))
    masks, revealed = trajectory_masks(reveal_step, steps=6)
    assert torch.equal(revealed.sum(-2), torch.ones(20, 6, dtype=torch.long))
    assert torch.equal(masks.sum(-2), reveal_step + 1)
    assert (masks | ~revealed).all()


def test_some_steps_of_an_order_are_those_of_all_of_them():
    reveal_step = position_ranks(uniforms(KEYS[:20], 6))
    whole = trajectory_masks(reveal_step, steps=6)
    parts = [trajectory_masks(reveal_step, steps=range(first, first + 2)) for first in (0, 2, 4)]
    for which in (0, 1):
        assert torch.equal(torch.cat([part[which] for part in parts], dim=-2), whole[which])
