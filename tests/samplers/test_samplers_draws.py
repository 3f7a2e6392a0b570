"""The log-odds by which drawn tokens are ranked, against the same in arithmetic of 50 digits."""

from decimal import Decimal, localcontext

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from dmpo_lightning.samplers.draws import draw_tokens, log_odds

VOCAB = 23


def exact_log_odds(logits: list[float], token: int) -> float:
    """log p - log(1 - p), p being the softmax at ``token``."""
    with localcontext() as context:
        context.prec = 50
        weights = [Decimal(logit).exp() if logit != -torch.inf else Decimal(0) for logit in logits]
        # The others are added up, since a difference to the sum of all would leave nothing of them.
        return float((weights.pop(token) / sum(weights)).ln())


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


@pytest.mark.parametrize(
    "truncation",
    [
        *({"top_k": 1}, {"top_k": 5}, {"top_k": 100}),
        *({"top_p": 0.1}, {"top_p": 0.7}, {"top_p": 1.0}, {"top_k": 4, "top_p": 0.8}),
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_truncated_distributions_are_those_of_transformers(temperature, truncation):
    logits = random_logits(1.5, places=1).expand(4000, -1).contiguous()
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if "top_k" in truncation:
        warpers.append(TopKLogitsWarper(truncation["top_k"]))
    if "top_p" in truncation:
        warpers.append(TopPLogitsWarper(truncation["top_p"]))
    expected = warpers(None, logits[:1]).log_softmax(-1)[0]
    uniform = (torch.arange(4000) + 0.5) / 4000
    draw = draw_tokens(logits, uniform, temperature=temperature, **truncation)
    # Uniforms at equal distances draw each token as often as it is likely, to one draw.
    counts = torch.bincount(draw.tokens, minlength=VOCAB) / 4000
    torch.testing.assert_close(counts, expected.exp(), atol=3e-4, rtol=0)
    torch.testing.assert_close(draw.log_prob, expected[draw.tokens], atol=1e-5, rtol=1e-5)
    whole = draw_tokens(logits, uniform, temperature=temperature)
    same = draw.tokens == whole.tokens
    assert torch.equal(draw.log_odds[same], whole.log_odds[same])


@pytest.mark.parametrize(("top_p_first", "probabilities"), [(False, [1.0]), (True, [0.625, 0.375])])
def test_top_k_and_top_p_cut_in_either_order(top_p_first, probabilities):
    """Of .5, .3, .1, .1 the two best are .625, .375 of each other: the first holds .6. Of all it takes both."""
    logits = torch.tensor([0.1, 0.5, 0.1, 0.3]).log().expand(2, -1)
    draw = draw_tokens(
        logits,
        torch.tensor([0.3, 0.95]),
        temperature=1.0,
        top_k=2,
        top_p=0.6,
        top_p_first=top_p_first,
        confidence="drawn",
    )
    assert draw.tokens.tolist() == [1, 3][: len(probabilities)] + [1] * (2 - len(probabilities))
    expected = torch.tensor((probabilities * 2)[:2], dtype=torch.float64)
    torch.testing.assert_close(draw.confidence, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(draw.log_prob, expected.log().float(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("cut", [{}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 1}], ids=str)
def test_the_confidence_of_the_drawn_distribution_is_the_probability_of_the_draw(temperature, cut):
    logits, uniform = random_logits(1.5), torch.linspace(0.01, 0.99, 12)
    draw = draw_tokens(logits, uniform, temperature=temperature, confidence="drawn", **cut)
    torch.testing.assert_close(draw.confidence.log().float(), draw.log_prob, atol=1e-5, rtol=1e-5)
    whole = draw_tokens(logits, uniform, temperature=temperature, confidence="model", **cut)
    assert torch.equal(draw.tokens, whole.tokens)
    assert torch.equal(draw.log_prob, whole.log_prob)


def test_of_almost_certain_draws_the_surer_one_has_the_higher_odds_at_low_temperature_too():
    logits = torch.tensor([[100.0, 0.0, 0.0], [0.0, 0.0, 101.0]])
    draw = draw_tokens(logits, torch.full((2,), 0.5), temperature=0.2, confidence="drawn")
    assert draw.log_odds.argsort().tolist() == [0, 1]


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_logits_stay_what_they_were(temperature):
    logits = random_logits(1.0)
    before = logits.clone()
    draw_tokens(logits, torch.full((len(logits),), 0.5), temperature=temperature)
    log_odds(logits, torch.zeros(len(logits), dtype=torch.long))
    assert torch.equal(logits, before)
