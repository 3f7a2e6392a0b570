"""Masked language models of transformers, called like the native backbones."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dmpo_lightning.models.head import log_probs_of


@dataclass(frozen=True)
class FullLogits:
    """A model that knows only logits of all positions, aligned to them, such as BERT.

    Args:
        model: called as a masked language model of transformers.
    """

    model: Any

    def __call__(
        self,
        ids: Tensor,
        attention_mask: Tensor | None,
        *,
        positions: Tensor,
        targets: Tensor | None = None,
        logit_bias: Tensor,
        temperature: float = 1.0,
    ) -> Tensor:
        """Logits at flat positions, or log-probs of ``targets`` there, as `LLaDAForMaskedDiffusion.forward` has it."""
        attended = None if attention_mask is None else attention_mask.long()
        logits = self.model(input_ids=ids, attention_mask=attended).logits
        chosen = logits.flatten(0, 1)[positions] + logit_bias
        return chosen if targets is None else log_probs_of(chosen, targets, temperature)


def as_predictor(model: Any) -> Any:
    """What to call for predictions at positions: a model that makes them itself, any other by its full logits."""
    return model if getattr(model, "predicts_at_positions", False) else FullLogits(model)
