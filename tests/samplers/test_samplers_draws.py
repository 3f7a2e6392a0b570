"""The log-odds by which drawn tokens are ranked, against the same in arithmetic of 999 digits."""

from decimal import Decimal, localcontext

import pytest
import torch

from dmpo_lightning.samplers.draws import draw_tokens, log_odds

VOCAB = 23


def exact_log_odds(logits: list[float], token: int) -> float:
    """log p - log(1 - p), p being the softmax at ``token``."""
    with localcontext() as context:
        context.prec = 999
        weights = [Decimal(logit).exp() if logit != -torch.inf else Decimal(0) for logit in logits]
        return float((weights[token] / (sum(weights) - weights[token])).ln())


def random_logits(scale: float, places: int = 12) -> torch.Tensor:
    logits = scale * torch.randn(places, VOCAB, generator=torch.Generator().manual_seed(0))
    logits[:, 5] = -torch.inf
    return logits


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0, 300.0])
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_log_odds_are_exact_for_almost_certain_tokens_too(scale, temperature):
    logits = random_logits(scale)
    draw = draw_tokens(logits, torch.linspace(0.01, 0.99, len(logits)), temperature=temperature)
    exact = [exact_log_odds(row, token) for row, token in zip(logits.tolist(), draw.tokens.tolist(), strict=True)]
    torch.testing.assert_close(draw.log_odds, torch.tensor(exact).double(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(draw.confidence, draw.log_odds.sigmoid(), atol=0, rtol=0)


def test_of_two_tokens_whose_probability_rounds_to_1_the_surer_one_has_the_higher_odds():
    logits = torch.tensor([[20.0, 0.0, 0.0], [0.0, 0.0, 21.0], [400.0, 0.0, 0.0], [0.0, 401.0, 0.0]])
    draw = draw_tokens(logits, torch.full((4,), 0.5), temperature=0.0)
    assert (draw.confidence.float() == 1).all()
    assert draw.log_odds.argsort().tolist() == [0, 1, 2, 3]


def test_the_only_possible_token_has_infinite_odds_and_an_impossible_one_minus_infinite_ones():
    logits = torch.tensor([[-torch.inf, 2.0, -torch.inf], [-torch.inf, 2.0, 1.0]])
    odds = log_odds(logits, torch.tensor([1, 0]))
    assert odds.tolist() == [torch.inf, -torch.inf]
    assert odds.sigmoid().tolist() == [1.0, 0.0]


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_logits_stay_what_they_were(temperature):
    logits = random_logits(1.0)
    before = logits.clone()
    draw_tokens(logits, torch.full((len(logits),), 0.5), temperature=temperature)
    log_odds(logits, torch.zeros(len(logits), dtype=torch.long))
    assert torch.equal(logits, before)
