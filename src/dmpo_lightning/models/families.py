"""Facts about the known families of masked diffusion language models, in one place each."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Family:
    """What neither a model's configuration nor its tokenizer says."""

    model_type: str
    end_tokens: tuple[str, ...]
    """A completion ends at the first of these; the last of them closes a turn."""
    chat_template: str
    """Used where the tokenizer carries none of its own."""
    block_linears: str
    """Regular expression of the full names of all linear layers in the blocks: the targets of LoRA, never the head."""


def families() -> tuple[Family, ...]:
    """The families with a native model; importing them registers their architectures with transformers."""
    from dmpo_lightning.models import dream, llada

    return llada.FAMILY, dream.FAMILY


def family_of_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> Family | None:
    """The family whose end tokens are all in the vocabulary; None for any other tokenizer."""
    vocabulary = tokenizer.get_vocab()
    return next((family for family in families() if set(family.end_tokens) <= set(vocabulary)), None)


def family_of_model(model_type: str) -> Family | None:
    """The family of a ``model_type``, as in config.json; None for any other model."""
    return next((family for family in families() if family.model_type == model_type), None)
