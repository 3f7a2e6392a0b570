"""The known families of masked diffusion language models, and which of them a model or a tokenizer belongs to."""

import json
import re
from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmpo_lightning.models.family import Family

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def families() -> tuple[Family, ...]:
    """The families with a native model.

    Importing their modules registers their architectures with transformers, which importing `dmpo_lightning.models`
    does.
    """
    from dmpo_lightning.models import dream, illada, llada, sdar

    # SDAR has the end tokens of Dream and more to be known by, so that it is asked first. iLLaDA has least.
    return llada.FAMILY, sdar.FAMILY, dream.FAMILY, illada.FAMILY


REFUSED = {
    "llada2_moe": "LLaDA2 is block-causal, but its router and its 256 experts per layer are not built here",
    "sdar_moe": "this SDAR is a mixture of experts, whose router and experts are not built here",
}
"""Models that are known by the ``model_type`` of config.json and not supported, and what is missing."""


def check_supported(model_type: str | None, source: str) -> None:
    """Raises ValueError for a ``model_type`` that is known not to be supported, whatever code comes with it."""
    if model_type in REFUSED:
        raise ValueError(
            f"{source!r} is a {model_type!r}, which is not supported: {REFUSED[model_type]}. Supported: "
            f"{', '.join(family.model_type for family in families())}, and any masked language model of transformers."
        )


def read_config(folder: Path, source: str, *, trust_remote_code: bool = False) -> Any:
    """The configuration of the model in a folder, which was fetched from ``source``.

    Raises:
        ValueError: the model is known not to be supported, see `check_supported`.
    """
    from transformers import AutoConfig

    path = folder / "config.json"
    stated = json.loads(path.read_text()) if path.is_file() else {}
    # Before transformers reads it, which would not know the model's type either and ask for remote code.
    check_supported(stated.get("model_type"), source)
    return with_named_block(AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code), source, stated)


def with_named_block(config: Any, source: str, stated: Container[str]) -> Any:
    """A configuration, with the ``block_size`` that the model's name ends with unless it is among the ``stated`` keys.

    A block-causal SDAR-8B-Chat-b32 has blocks of 32. Without such a name the family's default stays.
    """
    named = re.search(r"-b(\d+)$", Path(source).name)
    if named and hasattr(config, "block_size") and "block_size" not in stated:
        config.block_size = int(named[1])
    return config


def family_of_tokenizer(tokenizer: "PreTrainedTokenizerBase") -> Family | None:
    """The family whose end tokens, and mask token where it states one, are all in a tokenizer's vocabulary.

    None if there is no such family.
    """
    vocabulary = set(tokenizer.get_vocab())
    return next((family for family in families() if family.control_tokens <= vocabulary), None)


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
