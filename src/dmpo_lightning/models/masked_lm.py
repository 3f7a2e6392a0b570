"""Masked language models of transformers, called like the native backbones."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from dmpo_lightning.models.head import log_probs_of


def full_logits(
    model: Any,
    ids: Tensor,
    attention_mask: Tensor | None,
    *,
    positions: Tensor,
    targets: Tensor | None = None,
    logit_bias: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """Logits at flat positions, or log-probs of ``targets`` there, as `NativeModel.forward` has them.

    The ``model`` knows only logits of all positions, aligned to them, such as BERT.
    """
    attended = None if attention_mask is None else attention_mask.long()
    logits = model(input_ids=ids, attention_mask=attended).logits
    chosen = logits.flatten(0, 1)[positions] + logit_bias
    return chosen if targets is None else log_probs_of(chosen, targets, temperature)


def as_predictor(model: Any) -> Any:
    """What to call for predictions at positions: a model that makes them itself, any other by its full logits."""
    return model if getattr(model, "predicts_at_positions", False) else partial(full_logits, model)


def check_masked_lm(model: Any, *, mask_token_id: int, vocab_size: int) -> None:
    """Raises ValueError, which says what is amiss, for a model that cannot be called as a masked language model.

    Models that make predictions at positions themselves are taken at their word. Of any other a few tokens are
    predicted, which also shows whether it is causal: then no logit depends on what comes behind it, and training would
    go on silently. The caller provides eval mode and no gradient.
    """
    if getattr(model, "predicts_at_positions", False):
        return
    name, parameter = type(model).__name__, next(iter(model.parameters()), None)
    # Weights on the meta device, or weights that are elsewhere, predict nothing.
    if parameter is None or parameter.is_meta or not parameter.numel():
        return
    ids = torch.full((3, 4), mask_token_id, device=parameter.device)
    # Any token other than the mask will do, but padding, by which some models count positions.
    padding = getattr(getattr(model, "config", None), "pad_token_id", None)
    other = next((token for token in range(vocab_size) if token not in (mask_token_id, padding)), mask_token_id)
    ids[1, -1], ids[2, 0] = other, other
    output = model(input_ids=ids, attention_mask=None)
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.shape != (*ids.shape, vocab_size):
        found = type(output).__name__ if logits is None else f"logits of shape {list(logits.shape)}"
        raise ValueError(
            f"{name} must return an object whose `logits` are [rows, length, vocabulary] = {[*ids.shape, vocab_size]}, "
            f"got {found}. It is called as a masked language model of transformers, with `input_ids` and "
            "`attention_mask`; a network of another kind sets `predicts_at_positions` and is called like "
            "LLaDAForMaskedDiffusion."
        )
    unchanged, last_changed, first_changed = logits
    if torch.equal(unchanged[:-1], last_changed[:-1]) and not torch.equal(unchanged[1:], first_changed[1:]):
        raise ValueError(
            f"{name} is causal: what it predicts depends on no token behind, so it cannot fill in masked positions. "
            "Use a masked language model (LLaDA, iLLaDA, Dream, SDAR, or one that AutoModelForMaskedLM loads)."
        )
