"""Keyed randomness: a draw depends on what it is for and on nothing else."""

import pytest
import torch
from scipy.stats import chisquare, kstest

from dmpo_lightning.functional import Purpose, fold_in, inverse_cdf, row_keys, uniforms

KEYS = row_keys(0, torch.arange(50), group_size=20, buffer=0)


def test_same_key_gives_the_same_draws():
    assert torch.equal(uniforms(KEYS, 7), uniforms(KEYS.clone(), 7))


def test_draws_of_a_row_do_not_depend_on_the_other_rows():
    alone = row_keys(3, torch.tensor([17]), group_size=4, buffer=2)
    together = row_keys(3, torch.tensor([5, 17, 1]), group_size=4, buffer=2)
    assert torch.equal(uniforms(together, 6)[1], uniforms(alone, 6)[0])


def test_draws_of_a_rollout_do_not_depend_on_the_size_of_its_group():
    small, large = (row_keys(3, torch.arange(2), group_size=size, buffer=0) for size in (2, 8))
    assert torch.equal(small, large[:, :2])


def test_first_draws_do_not_depend_on_how_many_follow():
    assert torch.equal(uniforms(KEYS, 3), uniforms(KEYS, 9)[..., :3])


def test_folding_in_an_integer_equals_folding_in_a_tensor():
    assert torch.equal(fold_in(KEYS, 12345), fold_in(KEYS, torch.tensor(12345)))


def test_prompt_ids_may_be_of_any_integer_type():
    ids = torch.arange(4)
    expected = row_keys(1, ids, group_size=2, buffer=0)
    assert torch.equal(row_keys(1, ids.int(), group_size=2, buffer=0), expected)


@pytest.mark.parametrize("seed", [0, -1, 2**31, 2**63 - 1, 2**64 + 5, -(2**70)])
def test_draws_are_uniform_for_every_seed(seed):
    draws = uniforms(row_keys(seed, torch.arange(100), group_size=10, buffer=0), 50).flatten()
    assert kstest(draws.numpy(), "uniform").pvalue > 0.001


def test_neighbouring_draws_are_uncorrelated_along_every_axis():
    draws = uniforms(row_keys(0, torch.arange(60), group_size=60, buffer=0), 60).double() - 0.5
    for axis in range(3):
        first, second = draws.narrow(axis, 0, 59), draws.narrow(axis, 1, 59)
        # The mean of about 212,000 products of variance 1/144 has a standard deviation of 1.8e-4.
        assert (first * second).mean().abs() < 4 * 1.8e-4


def test_pairs_of_draws_fill_the_square_evenly():
    draws = uniforms(KEYS, 2).flatten(0, 1)
    cells = (draws * 5).long() @ torch.tensor([5, 1])
    assert chisquare(torch.bincount(cells, minlength=25)).pvalue > 0.001


def test_draws_lie_strictly_inside_the_unit_interval():
    draws = uniforms(row_keys(0, torch.arange(1000), group_size=10, buffer=0), 1000)
    assert draws.dtype == torch.float32
    assert draws.min() > 0
    assert draws.max() < 1


def test_no_two_purposes_share_their_draws():
    draws = torch.stack([uniforms(fold_in(KEYS, purpose), 10) for purpose in Purpose])
    assert len(draws.flatten(1).unique(dim=0)) == len(Purpose)
    assert (draws[:, None] == draws[None]).float().mean((2, 3, 4)).fill_diagonal_(0).max() < 1e-3


def test_keys_differ_in_seed_buffer_prompt_and_rollout():
    keys = [
        row_keys(seed, torch.arange(10), group_size=10, buffer=buffer) for seed in range(10) for buffer in range(10)
    ]
    assert len(torch.stack(keys).unique()) == 10_000


def test_inverse_cdf_takes_the_first_token_whose_cumulative_probability_reaches_the_draw():
    probabilities = torch.tensor([0.2, 0.0, 0.5, 0.3])
    draws = torch.tensor([1e-7, 0.19, 0.21, 0.69, 0.71, 1 - 2**-24])
    assert inverse_cdf(probabilities.expand(6, -1), draws).tolist() == [0, 0, 2, 2, 3, 3]


def test_inverse_cdf_follows_the_distribution():
    probabilities = torch.tensor([0.1, 0.25, 0.05, 0.6])
    tokens = inverse_cdf(probabilities.expand(20_000, -1), uniforms(torch.arange(200), 100).flatten())
    expected = probabilities.double() / probabilities.double().sum() * 20_000
    assert chisquare(torch.bincount(tokens, minlength=4), expected).pvalue > 0.001


def test_inverse_cdf_never_draws_a_token_of_probability_zero():
    extremes = torch.tensor([2**-24, 0.25, 0.5, 0.75, 1 - 2**-24])
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        allowed = torch.rand(1000, generator=generator) < 0.3
        logits = torch.where(allowed, 10 * torch.randn(1000, generator=generator), -torch.inf)
        tokens = inverse_cdf(logits.softmax(-1).expand(5, -1), extremes)
        assert allowed[tokens].all()


def test_inverse_cdf_takes_unnormalised_probabilities():
    draws = uniforms(torch.arange(10), 10).flatten()
    probabilities = torch.tensor([1.0, 2.0, 1.0]).expand(100, -1)
    assert torch.equal(inverse_cdf(probabilities, draws), inverse_cdf(probabilities / 4, draws))
