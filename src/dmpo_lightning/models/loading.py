"""Loads models, tokenizers and facts about tokens, from a hub id, a local folder or the name of an embedded model."""

import os
import re
from collections.abc import Container
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
)
from transformers.core_model_loading import revert_weight_conversion

from dmpo_lightning.models.families import FAMILIES, family_of_tokenizer
from dmpo_lightning.models.lora import base_of, is_adapter, load_adapter
from dmpo_lightning.models.parts import head_name, stacked_names
from dmpo_lightning.models.verification import named_problem, read_object, verify_tensors, weight_map, weights_in

EMBEDDED_MODELS = ("sudoku_tiny", "countdown_tiny", "blocks_tiny")
"""Models that are part of the installed package and can be loaded by name without a network."""

TOKENIZER = ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json")
"""The files of a tokenizer that hold a JSON object each."""
NEEDED = ("config.json", "adapter_config.json", *TOKENIZER[:2])
"""What a folder to load from has one of at least."""
NOT_UNDERSTOOD = "File '{}' is not understood"
Quantization = Literal["nf4"]


@dataclass(frozen=True)
class TokenFacts:
    """What sampling and decoding must know about tokens."""

    mask_token_id: int
    pad_token_id: int
    end_token_ids: tuple[int, ...]
    banned_token_ids: tuple[int, ...]
    """The mask token and the ids that the tokenizer never produces. No sampler ever draws one."""
    vocab_size: int
    """The width of the logits, which may be more than the tokenizer has tokens."""


def load_model(
    source: str,
    *,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    random_weights: bool = False,
    seed: int = 0,
    quantization: Quantization | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Loads a masked diffusion language model by hub id, folder or embedded name.

    LLaDA, LLaDA2, iLLaDA, Dream, SDAR, SDAR-MoE and what `adapt` wrote load as native models, after every tensor of
    their checkpoint was found to have its name and shape. Any other model that transformers knows as a masked language
    model loads as such.
    For a folder with a PEFT adapter its base is loaded, and the adapter on top of it, trainable.

    Args:
        source: a hub id, a folder, or the name of an embedded model.
        dtype: the dtype of the weights. "auto" takes that of the checkpoint.
        revision: a branch, tag or commit on the hub.
        random_weights: build the architecture with fresh weights that are drawn from ``seed``.
        seed: the seed of fresh weights.
        quantization: ``nf4`` quantises all linear layers but the head to 4 bits. It needs bitsandbytes.
        trust_remote_code: run code that comes with the checkpoint. Native models never need it.

    Raises:
        ValueError: there is nothing to load, or tensors of the checkpoint are missing, unexpected, misshapen or
            truncated. The message names the file and the tensor, and says what to do. Or the model is of a known
            kind that is not supported.

    Example:
        >>> from dmpo_lightning import load_model
        >>> type(load_model("sudoku_tiny")).__name__
        'LLaDAForMaskedDiffusion'
    """
    folder = fetch(source, revision)
    whole, adapter = weights_in(folder)
    if whole and adapter:
        raise ValueError(
            f"{folder!r} holds a whole model ({whole[0].name}) and an adapter ({adapter[0].name}), of which one alone "
            "would be loaded; move the other to a folder of its own."
        )
    if is_adapter(folder):
        if random_weights:
            raise ValueError(f"`random_weights` needs a whole model, but {source!r} is an adapter on a trained one.")
        name, named = base_of(folder)
        base = load_model(
            name, dtype=dtype, revision=named, quantization=quantization, trust_remote_code=trust_remote_code
        )
        return load_adapter(base, folder)
    config = read_config(Path(folder), source, trust_remote_code=trust_remote_code)
    problem = NOT_UNDERSTOOD.format(Path(folder, "config.json"))
    if random_weights:
        # All ranks draw the same weights, and nobody else's draws move.
        with torch.random.fork_rng(devices=[]), named_problem(problem, trusted=trust_remote_code):
            torch.manual_seed(seed)
            return AutoModelForMaskedLM.from_config(config).to(dtype_of(dtype, torch.float32))
    options: dict[str, Any] = {"dtype": dtype_of(dtype, "auto"), "trust_remote_code": trust_remote_code}
    if config.model_type in FAMILIES or quantization is not None:
        # What the folder must hold, and what the head is called, is known of a model; here it takes no memory.
        with torch.device("meta"), named_problem(problem, trusted=trust_remote_code):
            empty = AutoModelForMaskedLM.from_config(config, trust_remote_code=trust_remote_code)
        if config.model_type in FAMILIES:
            tied = empty._tied_weights_keys if config.tie_word_embeddings else None
            verify_tensors(folder, revert_weight_conversion(empty, empty.state_dict()), tied=tied)
            options["use_safetensors"] = True
        if quantization is not None:
            check_quantizable(empty)
            options["quantization_config"] = _four_bit(head_name(empty))
    model = _with_all_tensors(folder, config=config, **options)
    return model if quantization is None else _prepared_for_adapters(model)


def _with_all_tensors(folder: str, **options: Any) -> nn.Module:
    """What transformers loads. Raises ValueError for a damaged file, or a missing tensor, of which it only warns."""
    weight_map(Path(folder))
    # The weights of a native model were verified, those of others were not.
    with named_problem(f"Cannot load the weights in {folder!r}", trusted=options["trust_remote_code"]):
        model, found = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True, **options)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"The weights in {folder!r} lack the tensor {missing[0]!r} and {len(missing) - 1} more, which would be "
            "random. Take a checkpoint of the whole masked language model, or set `random_weights`."
        )
    return model


def read_config(folder: Path, source: str, *, trust_remote_code: bool = False) -> Any:
    """The configuration of the model in a folder, which was fetched from ``source``.

    Raises:
        ValueError: its config.json is missing or not understood.
    """
    path = folder / "config.json"
    stated = read_object(path)
    with named_problem(NOT_UNDERSTOOD.format(path), trusted=trust_remote_code):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    # That attention is computed in one way or another is no fact of a model.
    config._attn_implementation = None
    return with_named_block(config, source, stated)


def with_named_block(config: Any, source: str, stated: Container[str]) -> Any:
    """A configuration, with the ``block_size`` that the model's name ends with unless it is among the ``stated`` keys.

    A block-causal SDAR-8B-Chat-b32 has completion blocks of 32. Without such a name the family's default stays.
    """
    named = re.search(r"-b(\d+)$", Path(source).name)
    if named and getattr(config, "block_size", None) and "block_size" not in stated:
        config.block_size = int(named[1])
    return config


def fetch(source: str, revision: str | None = None) -> str:
    """The local folder of a source. A hub id is downloaded first, unless the hub's cache holds it.

    Raises:
        ValueError: the source is neither a folder of a model or a tokenizer nor an embedded name, and the hub does not
            give it.
    """
    if source in EMBEDDED_MODELS and not Path(source).is_dir():
        return str(files("dmpo_lightning") / "assets" / source)
    try:
        # Weights in torch's own formats are left out: loading those unpickles them.
        wanted = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.py"]
        exists = Path(source).exists()
        folder = source if exists else snapshot_download(source, revision=revision, allow_patterns=wanted)
    # The hub's errors are of many classes, all of these two kinds.
    except (OSError, ValueError) as error:
        offline = " (offline mode is on)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise ValueError(
            f"Cannot load {source!r}: it is neither a local folder nor reachable on the Hugging Face hub{offline}. "
            f"Download it where there is a network (`hf download {source} --local-dir DIR`) and pass the folder "
            f"(`--model.model=DIR`). Embedded and needing no download: {', '.join(EMBEDDED_MODELS)} "
            "(`dmpo-lightning fit --config sudoku_tiny.yaml`)."
        ) from error
    if not any((Path(folder) / name).is_file() for name in NEEDED):
        raise ValueError(
            f"{source!r} is neither the folder nor the hub id of a model: there is no {NEEDED[0]}. A checkpoint of a "
            "run (.ckpt) is none: write one of it by `dmpo-lightning export` first, or pass it as --ckpt_path."
        )
    return folder


def dtype_of(name: str | torch.dtype, automatic: Any) -> Any:
    """The torch dtype of a name, and ``automatic`` for "auto"."""
    if name == "auto":
        return automatic
    value = getattr(torch, name, None) if isinstance(name, str) else name
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise ValueError(f"`dtype` must be auto or the name of a torch dtype such as bfloat16, got {name!r}.")
    return value


def check_quantizable(model: nn.Module) -> None:
    """Raises ValueError for a model that is mostly stacked experts, which nf4 would leave as they are."""
    stacked = sum(model.get_parameter(name).numel() for name in stacked_names(model))
    if stacked:
        total = sum(parameter.numel() for parameter in model.parameters())
        raise ValueError(
            f"`quantization` nf4 quantises linear layers, but {stacked / total:.0%} of {type(model).__name__} are "
            "stacked experts, which would not become smaller; leave it out and train a LoRA on the model in bfloat16."
        )


def _four_bit(head: str | None) -> Any:
    """How transformers is to quantise all but the head: NF4 with double quantisation (QLoRA, arXiv 2305.14314)."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "`quantization` nf4 needs bitsandbytes: pip install 'dmpo-lightning[quantization]'."
        ) from error
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=[] if head is None else [head],
    )


def _prepared_for_adapters(model: nn.Module) -> nn.Module:
    """A quantised model, frozen and with its norms in float32."""
    from peft import prepare_model_for_kbit_training

    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks the 4-bit weights at the first forward in eval mode,
            # which sampling is. Its backward still expects the old layout, and gradients come out wrong.
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment,unused-ignore]
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def load_tokenizer(source: str | PreTrainedTokenizerBase, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Loads a tokenizer by hub id, folder or embedded name. A tokenizer itself is returned as it is.

    One that carries no chat template gets that of its family. A folder that holds an adapter alone gives the tokenizer
    of the adapter's base. Raises ValueError where there is no tokenizer to load.

    Example:
        >>> from dmpo_lightning import load_tokenizer
        >>> load_tokenizer("sudoku_tiny").tokenize("<answer>1234")
        ['<answer>', '1', '2', '3', '4']
    """
    if not isinstance(source, str):
        return source
    folder = fetch(source, revision)
    if is_adapter(folder) and not (Path(folder) / "tokenizer_config.json").is_file():
        name, revision = base_of(folder)
        return load_tokenizer(name, revision=revision)
    for path in (Path(folder) / name for name in TOKENIZER):
        if path.is_file():
            read_object(path)
    with named_problem(f"Cannot load a tokenizer from {folder!r}, pass `tokenizer` as well"):
        # None would ask on the terminal.
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    family = family_of_tokenizer(tokenizer)
    if tokenizer.chat_template is None and family is not None:
        tokenizer.chat_template = family.chat_template
    return tokenizer


def token_facts(model: nn.Module, tokenizer: PreTrainedTokenizerBase, mask_token_id: int | None = None) -> TokenFacts:
    """Facts from the model's configuration and, where that is silent, the tokenizer. ``mask_token_id`` overrides both.

    Raises:
        ValueError: there is no mask token id, or it lies outside the vocabulary, or other tokens do.
    """
    config: Any = getattr(model, "config", None)
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    mask = mask_token_id if mask_token_id is not None else getattr(config, "mask_token_id", None)
    mask = mask if mask is not None else tokenizer.mask_token_id
    vocab_size = getattr(config, "logit_width", None) or getattr(config, "vocab_size", None) or len(tokenizer)
    if not isinstance(mask, int) or not 0 <= mask < vocab_size:
        raise ValueError(
            f"`mask_token_id` must be an id below the vocabulary size {vocab_size}, got {mask}: neither the model's "
            "configuration nor the tokenizer names one; pass mask_token_id=... or use a tokenizer with a mask token."
        )
    highest = max(tokenizer.get_vocab().values())
    known = min(vocab_size, getattr(embedding, "num_embeddings", vocab_size))
    # An embedding may be larger than the tokenizer. Many are, for the sake of speed, and no text has the ids beyond.
    if max(highest, mask) >= known:
        raise ValueError(
            f"{type(model).__name__} has embeddings for {known} tokens, but the mask token has the id {mask} and the "
            f"tokenizer ids up to {highest}; take the tokenizer of this model, or call model.resize_token_embeddings."
        )
    ends = end_token_ids(tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends[0] if ends else mask)
    banned = (mask, *(i for i in range(highest + 1, vocab_size) if i != mask))
    return TokenFacts(
        mask_token_id=mask, pad_token_id=pad, end_token_ids=ends, banned_token_ids=banned, vocab_size=vocab_size
    )


def end_token_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that end a completion: the end tokens of the tokenizer's family, and its eos token.

    A tokenizer without an eos token, such as BERT's, has its separator in that place.
    """
    family, vocabulary = family_of_tokenizer(tokenizer), tokenizer.get_vocab()
    known = [vocabulary[token] for token in family.end_tokens] if family else []
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    return tuple(dict.fromkeys([*known, *([] if eos is None else [eos])]))
