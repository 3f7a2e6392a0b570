"""What a family of masked diffusion language models has in common."""

from dataclasses import dataclass


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
