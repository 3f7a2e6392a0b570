"""The known families of masked diffusion language models, and which of them a model or a tokenizer belongs to.

A family is a file of its own, which `dmpo_lightning.models` imports by one line. Such a file says what its `Family` and
its configuration are, and where its network differs from the shared one.
"""

from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerBase

FAMILIES: dict[str, "Family"] = {}
"""The families with a native model, by the ``model_type`` of their config.json. `register` fills it."""


@dataclass(frozen=True)
class Family:
    """Facts about the models of a family that neither their configuration nor their tokenizer states."""

    end_tokens: tuple[str, ...]
    """A completion ends where the first of any of these stands, or of the tokenizer's eos token.

    The last one listed closes a turn of a conversation. Where there are none, the eos token does.
    """
    chat_template: str | None
    """The chat template for tokenizers that carry none of their own. None leaves them without one."""
    mask_token: str | None = None
    """The mask token, where it tells the family's tokenizers from those of others."""

    @property
    def control_tokens(self) -> frozenset[str]:
        """The end tokens, and the mask token where one is stated: no text of a prompt may be read as one of them."""
        return frozenset(self.end_tokens if self.mask_token is None else (*self.end_tokens, self.mask_token))


def register(family: Family, model_class: Any, *, tokenizer_class: Any = None) -> None:
    """Makes a family known here, and to transformers, which then builds its folders without their remote code.

    Args:
        family: its facts.
        model_class: its network, whose ``config_class`` states the ``model_type``.
        tokenizer_class: the class that reads its tokenizers, where published folders name one of their own.
    """
    config_class = model_class.config_class
    FAMILIES[config_class.model_type] = family
    AutoConfig.register(config_class.model_type, config_class)
    AutoModelForMaskedLM.register(config_class, model_class)
    if tokenizer_class is not None:
        AutoTokenizer.register(config_class, tokenizer_class=tokenizer_class)


def family_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Family | None:
    """The family whose control tokens are all in a tokenizer's vocabulary, or None.

    Of several it is the one with most of them: a tokenizer of SDAR has the end tokens of Dream and a mask token more.
    """
    vocabulary = set(tokenizer.get_vocab())
    fitting = [family for family in FAMILIES.values() if family.control_tokens <= vocabulary]
    return max(fitting, key=lambda family: len(family.control_tokens), default=None)
