"""What a family of masked diffusion language models has in common."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Facts about the models of a family that neither their configuration nor their tokenizer states."""

    model_type: str
    end_tokens: tuple[str, ...]
    """A completion ends where the first of any of these stands, or of the tokenizer's eos token.

    The last one listed closes a turn of a conversation. Where there are none, the eos token does.
    """
    chat_template: str | None
    """The chat template for tokenizers that carry none of their own. None leaves them without one."""
    block_linears: str
    """A regular expression of the full names of the blocks' linear layers, for LoRA to adapt. It omits the head."""
    mask_token: str | None = None
    """The mask token, where it tells the family's tokenizers from those of others."""

    def __post_init__(self) -> None:
        assert self.control_tokens, "A family without any of these tokens would be that of every tokenizer."

    @property
    def control_tokens(self) -> frozenset[str]:
        """The end tokens, and the mask token where one is stated: no text of a prompt may be read as one of them."""
        return frozenset(self.end_tokens if self.mask_token is None else (*self.end_tokens, self.mask_token))
