"""Draws one candidate token per position, exactly, from logits and keyed uniforms."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dmpo_lightning.functional.randomness import Purpose, fold_in, inverse_cdf, uniforms

Confidence = Literal["drawn", "model"]
"""Of which distribution a token's probability is its confidence: of the one that it was drawn from, with temperature,
``top_k`` and ``top_p``, or of the model's own, the whole one at temperature 1.
"""


@dataclass
class Draw:
    """Drawn tokens with their probabilities. All three tensors have the same shape, which may be any."""

    tokens: Int[Tensor, "*at"]
    log_prob: Float[Tensor, "*at"]
    """The log-prob of the token under the distribution that it was drawn from, 0 for a greedy one."""
    log_odds: Float[Tensor, "*at"]
    """log p - log(1 - p) in float64, where p is the token's `confidence`. Positions are ranked by it, because it tells
    probabilities apart that are all rounded to 1.
    """

    @property
    def confidence(self) -> Float[Tensor, "*at"]:
        """The probability of the token in float64, in the distribution that `Confidence` says."""
        return self.log_odds.sigmoid()

    def at(self, index: Int[Tensor, "rows chosen"]) -> "Draw":
        """The draws at some positions of each row, where this is a grid ``[rows positions]``."""
        return Draw(self.tokens.gather(1, index), self.log_prob.gather(1, index), self.log_odds.gather(1, index))

    def spread(self, masked: Bool[Tensor, "rows block"]) -> "Draw":
        """Lays draws, made for the True positions of a grid in order, out as that grid. The others hold zeros."""
        parts = (self.tokens, self.log_prob, self.log_odds)
        return Draw(*(part.new_zeros(masked.shape).masked_scatter_(masked, part) for part in parts))


def step_uniforms(keys: Int[Tensor, " rows"], step: int, length: int) -> Float[Tensor, "rows length"]:
    """One uniform for each position of a completion, in one denoising step."""
    return uniforms(fold_in(fold_in(keys, Purpose.TOKEN), step), length)


def draw_tokens(
    logits: Float[Tensor, "*at vocab"],
    uniform: Float[Tensor, "*at"],
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    top_p_first: bool = False,
    confidence: Confidence = "model",
) -> Draw:
    """Draws exactly from softmax(logits / temperature) with one uniform each. Temperature 0 takes the most likely.

    Of that distribution only the ``top_k`` most likely tokens are kept, and of these the fewest most likely ones whose
    probabilities sum to ``top_p`` at least, as in transformers and SDAR. ``top_p_first`` turns the two round, as Dream
    has them. A most likely token is drawn from nothing, so that its ``confidence`` is the model's in any case.
    """
    if temperature == 0:
        tokens = logits.argmax(-1)
        odds = log_odds(logits, tokens)
        return Draw(tokens, torch.zeros_like(odds, dtype=torch.float32), odds)
    # Passes over the vocabulary are most of a step's work beside the forward. So exponentials are taken in place, and
    # only those of the drawn tokens are divided by their sum. At temperature 1 one pass serves both the draw and its
    # log-prob, and no more than one tensor of that size is made; at any other `shifted` is kept for the log-odds.
    shifted = logits - logits.amax(-1, keepdim=True)
    tempered = shifted.exp_() if temperature == 1 else (shifted / temperature).exp_()
    if top_p_first:
        _truncate(tempered, None, top_p)
    _truncate(tempered, top_k, None if top_p_first else top_p)
    tokens = inverse_cdf(tempered, uniform)
    log_prob = (_at(tempered, tokens) / tempered.sum(-1)).log()
    removed = tempered == 0 if confidence == "drawn" and (top_k, top_p) != (None, None) else None
    del tempered
    ranked = shifted.copy_(logits) if temperature == 1 else shifted
    if confidence == "drawn":
        ranked.div_(temperature)
    if removed is not None:
        ranked.masked_fill_(removed, -torch.inf)
    return Draw(tokens, log_prob, _log_odds_in_place(ranked, tokens))


def _truncate(probabilities: Float[Tensor, "*at vocab"], top_k: int | None, top_p: float | None) -> None:
    """Sets to zero, in place, what is not drawn. The probabilities need not sum to one."""
    if top_k is not None and top_k < probabilities.shape[-1]:
        least = probabilities.topk(top_k, dim=-1).values[..., -1:]
        probabilities.masked_fill_(probabilities < least, 0)
    if top_p is not None and top_p < 1:
        ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
        # What the more likely tokens sum to. A token is needed as long as that is too little.
        before = ordered.cumsum(-1).sub_(ordered)
        ordered.masked_fill_(before >= top_p * ordered.sum(-1, keepdim=True), 0)
        probabilities.scatter_(-1, tokens, ordered)


def log_odds(logits: Float[Tensor, "*at vocab"], tokens: Int[Tensor, "*at"]) -> Float[Tensor, "*at"]:
    """log p - log(1 - p) of a token at each position, in float64.

    It is the token's logit less the logarithm of what all other tokens amount to. So it is as exact for tokens that are
    almost certain as for any, without a float64 number for each token of the vocabulary. It is infinite where no other
    token is possible.
    """
    return _log_odds_in_place(logits.clone(), tokens)


def _log_odds_in_place(logits: Float[Tensor, "*at vocab"], tokens: Int[Tensor, "*at"]) -> Float[Tensor, "*at"]:
    """What `log_odds` says. The logits are lost, since their memory is worked in."""
    own = _at(logits, tokens)
    others = logits.scatter_(-1, tokens[..., None], -torch.inf)
    # Where no other token is possible the largest logit is minus infinity, from which nothing can be subtracted.
    top = others.amax(-1, keepdim=True).clamp(min=torch.finfo(others.dtype).min)
    rest = others.sub_(top).exp_().sum(-1)
    return own.double() - top.squeeze(-1).double() - rest.double().log()


def _at(values: Float[Tensor, "*at vocab"], tokens: Int[Tensor, "*at"]) -> Float[Tensor, "*at"]:
    return values.gather(-1, tokens[..., None]).squeeze(-1)
