"""The known families of masked diffusion language models, and which of them a model or a tokenizer belongs to."""

from typing import TYPE_CHECKING, Any

from dmpo_lightning.models.family import Family

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def families() -> tuple[Family, ...]:
    """The families with a native model.

    Importing their modules registers their architectures with transformers, which importing `dmpo_lightning.models`
    does.
    """
    from dmpo_lightning.models import dream, llada

    return llada.FAMILY, dream.FAMILY


def family_of_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> Family | None:
    """The family whose end tokens are all in a tokenizer's vocabulary, or None if there is no such family."""
    vocabulary = tokenizer.get_vocab()
    return next((family for family in families() if set(family.end_tokens) <= set(vocabulary)), None)


def family_of_model(model_type: str) -> Family | None:
    """The family of a ``model_type``, as config.json states it, or None if no family has that type."""
    return next((family for family in families() if family.model_type == model_type), None)


def logit_width(config: Any) -> Any:
    """The number of logits per position, or None where a configuration states none.

    LLaDA's embedding may be wider than its vocabulary, and its logits are as wide as the embedding.
    """
    # Elsewhere, as in ALBERT and ELECTRA, a configuration calls the width of the embeddings so.
    has_rows = family_of_model(getattr(config, "model_type", "")) is not None
    rows = getattr(config, "embedding_size", None) if has_rows else None
    return rows or getattr(config, "vocab_size", None)
