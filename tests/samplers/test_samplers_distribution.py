"""Draws from a vocabulary as large as LLaDA's are distributed as the tempered softmax says."""

import pytest
import torch
from scipy.stats import chisquare

from dmpo_lightning.functional import uniforms
from dmpo_lightning.samplers.draws import draw_tokens

VOCAB, DRAWS, TEMPERATURE, CELLS = 126_464, 20_000, 0.2, 100


@pytest.mark.slow
def test_20_000_draws_pass_the_chi_square_test():
    """Tokens in the order of their probability, cut into cells of about equal probability."""
    logits = 0.4 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    probability = (logits.double() / TEMPERATURE).softmax(-1)
    order = probability.argsort(descending=True)
    cell = torch.empty(VOCAB, dtype=torch.long)
    cell[order] = (probability[order].cumsum(0) * CELLS).long().clamp(max=CELLS - 1)
    expected = torch.zeros(CELLS, dtype=torch.float64).index_add_(0, cell, probability) * DRAWS
    counts = torch.zeros(CELLS, dtype=torch.long)
    for draw in uniforms(torch.tensor([7]), DRAWS)[0].split(100):
        tokens = draw_tokens(logits.expand(len(draw), -1), draw, temperature=TEMPERATURE).tokens
        counts += torch.bincount(cell[tokens], minlength=CELLS)
    filled = expected > 5
    assert filled.sum() > CELLS / 2
    assert counts[~filled].sum() <= expected[~filled].sum() + 5
    found, wanted = counts[filled].double(), expected[filled]
    assert chisquare(found, wanted * found.sum() / wanted.sum()).pvalue > 1e-3
