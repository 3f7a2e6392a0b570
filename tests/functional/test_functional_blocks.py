"""Masks, weights and ELBOs of completions that are cut into blocks; -1 is a position that does not count."""

from itertools import combinations, product

import pytest
import torch

from dmpo_lightning.functional import (
    block_weights,
    denoising_cross_entropy,
    denoising_likelihood,
    draw_masks,
    elbo,
    elbo_replicates,
)

BLOCKS = torch.tensor([0, 1, 1, 1, 2, 2, -1])
"""A completion whose first token ends a block, and whose last one was never drawn."""


@pytest.mark.parametrize("antithetic", [True, False])
def test_each_block_has_a_count_of_its_own_that_is_uniform(antithetic):
    rows = 6000
    masks = draw_masks(
        torch.arange(rows), length=7, replicates=2, antithetic=antithetic, blocks=BLOCKS.expand(rows, -1)
    ).flatten(0, 1)
    counts = torch.stack([masks[:, BLOCKS == block].sum(1) for block in (0, 1, 2)], dim=1)
    assert not masks[:, -1].any()
    assert (counts[:, 0] == 1).all()
    for block, size in ((1, 3), (2, 2)):
        shares = torch.stack([(counts[:, block] == count).float().mean() for count in range(1, size + 1)])
        torch.testing.assert_close(shares, torch.full((size,), 1 / size), atol=0.02, rtol=0)
    # The counts of two blocks are independent, and so are the positions: each is masked as often as any of its block.
    together = ((counts[:, 1] == 1) & (counts[:, 2] == 1)).float().mean()
    assert together == pytest.approx(1 / 6, abs=0.02)
    torch.testing.assert_close(masks[:, 1:4].float().mean(0), torch.full((3,), 2 / 3), atol=0.02, rtol=0)


def test_rows_may_have_different_blocks():
    blocks = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    masks = draw_masks(torch.arange(2), length=4, replicates=64, blocks=blocks)
    some = torch.stack([masks[0, :, :2].any(-1), masks[0, :, 2:].any(-1), masks[1, :, 0], masks[1, :, 1:].any(-1)])
    assert some.all()
    assert not masks[0, :, 0].all()


def test_weights_are_positions_of_the_block_per_masked_one():
    masks = torch.tensor([[True, True, False, False, True, True, False]])
    assert block_weights(masks[None], BLOCKS[None])[0, 0].tolist() == [1, 3, 0, 0, 1, 1, 0]


def test_with_one_block_the_elbo_is_the_usual_one():
    generator = torch.Generator().manual_seed(0)
    log_prob = torch.randn(2, 4, 5, generator=generator)
    masks = draw_masks(torch.arange(2), length=5, replicates=4)
    one = torch.zeros(2, 5, dtype=torch.long)
    torch.testing.assert_close(elbo(log_prob, masks, one), elbo(log_prob, masks))
    torch.testing.assert_close(denoising_cross_entropy(log_prob, masks, one), denoising_cross_entropy(log_prob, masks))


def test_the_cross_entropy_is_the_elbo_per_position_that_counts():
    log_prob = torch.full((1, 2, 7), -0.5)
    masks = draw_masks(torch.arange(1), length=7, replicates=2, blocks=BLOCKS[None])
    # Every block's estimate is its own number of positions times -0.5, whatever is masked.
    assert elbo(log_prob, masks, BLOCKS[None]).item() == pytest.approx(-3.0)
    assert denoising_cross_entropy(log_prob, masks, BLOCKS[None]).item() == pytest.approx(0.5)


def test_likelihoods_weigh_tokens_as_the_cross_entropy_does():
    """Weights 1, 3, 1 and 1 at what is masked, over the six positions that count."""
    masks = torch.tensor([[[True, True, False, False, True, True, False]]])
    log_prob = torch.tensor([[[0.5, 0.25, 1, 1, 0.5, 0.1, 1]]]).log()
    blocks = BLOCKS[None]
    assert denoising_likelihood(log_prob, masks, blocks=blocks).item() == pytest.approx(1.85 / 6)
    # Where p is 1, so that d p = d log p, the two forms push every token equally hard.
    token = torch.zeros(1, 1, 7, requires_grad=True)
    (up,) = torch.autograd.grad(denoising_cross_entropy(token, masks, blocks=blocks).sum(), token)
    (down,) = torch.autograd.grad(denoising_likelihood(token, masks, blocks=blocks).sum(), token)
    torch.testing.assert_close(up, -down)


def all_masks(size: int) -> list[tuple[float, tuple[int, ...]]]:
    """Each masking of a block with the probability that its count and then its positions are drawn."""
    choices = [(m, chosen) for m in range(1, size + 1) for chosen in combinations(range(size), m)]
    return [(1 / size / sum(other == m for other, _ in choices), chosen) for m, chosen in choices]


def test_the_expectation_over_all_maskings_is_the_sum_of_the_blocks_elbos():
    """Log-probs depend on what else is masked, as a model's do: a table of them for every masking of every block."""
    generator = torch.Generator().manual_seed(1)
    sizes = (1, 3, 2)
    blocks = torch.tensor([b for b, size in enumerate(sizes) for _ in range(size)])
    tables = [{chosen: torch.randn(size, generator=generator) for _, chosen in all_masks(size)} for size in sizes]
    exact = sum(
        probability * size / len(chosen) * table[chosen][list(chosen)].sum()
        for size, table in zip(sizes, tables, strict=True)
        for probability, chosen in all_masks(size)
    )
    estimate = torch.zeros(())
    for choice in product(*(all_masks(size) for size in sizes)):
        masks = torch.cat(
            [torch.isin(torch.arange(n), torch.tensor(c)) for n, (_, c) in zip(sizes, choice, strict=True)]
        )
        log_prob = torch.cat([table[chosen] for table, (_, chosen) in zip(tables, choice, strict=True)])
        probability = torch.tensor([p for p, _ in choice]).prod()
        estimate += probability * elbo_replicates(log_prob[None, None], masks[None, None], blocks[None])[0, 0]
    torch.testing.assert_close(estimate, exact)
