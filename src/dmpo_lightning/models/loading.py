"""From a hub id, a local folder or the name of an embedded model to a model, a tokenizer and the facts about its
tokens.
"""

import os
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED_MODELS = ("sudoku_tiny",)
"""Models that travel in the wheel, loadable by name without network."""


@dataclass(frozen=True)
class TokenFacts:
    """What sampling and decoding must know of a tokenizer."""

    mask_token_id: int
    pad_token_id: int
    end_token_ids: tuple[int, ...]
    banned_token_ids: tuple[int, ...]
    """The mask token and the ids that the tokenizer never produces; never sampled."""


def resolve_source(source: str) -> str:
    """The folder of an embedded model for its name, else ``source`` as it is (a folder or a hub id)."""
    if source in EMBEDDED_MODELS and not Path(source).is_dir():
        return str(files("dmpo_lightning") / "assets" / source)
    return source


def load_model(
    source: str,
    *,
    dtype: str | torch.dtype = "float32",
    revision: str | None = None,
    random_weights: bool = False,
    seed: int = 0,
) -> "PreTrainedModel":
    """A masked diffusion language model by hub id, folder or embedded name; never runs remote code.

    ``random_weights`` builds the architecture of ``source`` with fresh weights drawn from ``seed``.

    Raises:
        ValueError: nothing can be loaded from ``source``; says what to download and where to point to.
    """
    from transformers import AutoConfig, AutoModelForMaskedLM

    import dmpo_lightning.models.llada  # noqa: F401  registers the native architecture

    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    path = resolve_source(source)
    try:
        if random_weights:
            config = AutoConfig.from_pretrained(path, revision=revision)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                return AutoModelForMaskedLM.from_config(config).to(dtype)
        return AutoModelForMaskedLM.from_pretrained(path, revision=revision, dtype=dtype)
    except OSError as error:
        raise ValueError(_missing_source("model", source, error)) from error


def load_tokenizer(
    source: "str | PreTrainedTokenizerBase", *, revision: str | None = None
) -> "PreTrainedTokenizerBase":
    """A tokenizer by hub id, folder or embedded name, with its family's chat template where it has none of its own."""
    if not isinstance(source, str):
        return source
    from transformers import AutoTokenizer

    from dmpo_lightning.models import llada

    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve_source(source), revision=revision)
    except OSError as error:
        raise ValueError(_missing_source("tokenizer", source, error)) from error
    if tokenizer.chat_template is None and set(llada.END_TOKENS) <= set(tokenizer.get_vocab()):
        tokenizer.chat_template = llada.CHAT_TEMPLATE
    return tokenizer


def token_facts(model: nn.Module, tokenizer: "PreTrainedTokenizerBase", mask_token_id: int | None = None) -> TokenFacts:
    """Facts from the model's configuration and the tokenizer; ``mask_token_id`` overrides both.

    Raises:
        ValueError: no mask token id, or one outside the vocabulary.
    """
    from dmpo_lightning.models import llada

    config: Any = getattr(model, "config", None)
    mask = mask_token_id if mask_token_id is not None else getattr(config, "mask_token_id", None)
    mask = mask if mask is not None else tokenizer.mask_token_id
    vocab_size = getattr(config, "embedding_size", None) or getattr(config, "vocab_size", None) or len(tokenizer)
    if mask is None or not 0 <= mask < vocab_size:
        raise ValueError(
            f"`mask_token_id` must be an id below the vocabulary size {vocab_size}, got {mask}: neither the "
            f"model's configuration "
            "nor the tokenizer names one; pass mask_token_id=... or use a tokenizer with a mask token."
        )
    vocabulary = tokenizer.get_vocab()
    known = [vocabulary[token] for token in llada.END_TOKENS if token in vocabulary]
    ends = tuple(dict.fromkeys([*known, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])]))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends[0] if ends else mask)
    banned = (mask, *(i for i in range(max(vocabulary.values()) + 1, vocab_size) if i != mask))
    return TokenFacts(mask_token_id=mask, pad_token_id=pad, end_token_ids=ends, banned_token_ids=banned)


def _missing_source(what: str, source: str, error: OSError) -> str:
    if Path(resolve_source(source)).is_dir():
        return (
            f"Cannot load the {what} from the folder {source!r}: {error}. Download it again, or name the right folder."
        )
    offline = " (offline mode is on)" if os.environ.get("HF_HUB_OFFLINE") else ""
    return (
        f"Cannot load the {what} {source!r}: it is neither a local folder nor reachable on the Hugging Face "
        f"hub{offline}. "
        f"Download it where there is a network (`hf download {source} --local-dir DIR`) and pass the folder "
        f"(`--model.model=DIR`). Embedded and needing no download: {', '.join(EMBEDDED_MODELS)} "
        "(`dmpo-lightning fit --config sudoku_tiny.yaml`)."
    )
