"""What a family of masked diffusion language models has in common."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Facts about the models of a family that neither their configuration nor their tokenizer states."""

    model_type: str
    end_tokens: tuple[str, ...]
    """A completion ends where the first of any of these stands. The last one listed closes a turn of a conversation."""
    chat_template: str
    """The chat template for tokenizers that carry none of their own."""
    block_linears: str
    """A regular expression of the full names of the blocks' linear layers, for LoRA to adapt. It omits the head."""
    mask_token: str | None = None
    """A token that tells the family's tokenizers from those of families with the same end tokens."""
