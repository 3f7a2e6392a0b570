"""Makes a masked diffusion model of a pretrained causal one, without training: weights stay, attention changes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from dmpo_lightning.models.adapted import AdaptedConfig, AdaptedForMaskedDiffusion
from dmpo_lightning.models.loading import dtype_of, fetch, read_config
from dmpo_lightning.models.verification import named_problem

SHAPES: dict[str, dict[str, bool]] = {"llama": {}, "qwen2": {"projection_bias": True}, "qwen3": {"head_norms": True}}
"""The causal models that can be adapted, by their ``model_type``, and what of `AdaptedConfig` tells them apart."""
MASK_TOKEN = "<|mask|>"


@dataclass(frozen=True)
class Adapted:
    """A masked diffusion model that was made of a causal one."""

    model: AdaptedForMaskedDiffusion
    tokenizer: PreTrainedTokenizerBase
    model_type: str
    """Of the causal model."""


def adapt(
    source: str,
    *,
    block_size: int | None = None,
    shift: bool = True,
    mask_token: str | None = None,
    dtype: str = "auto",
    revision: str | None = None,
) -> Adapted:
    """Loads a causal model of the shape of Llama, Qwen2 or Qwen3 as a masked diffusion model that is to be trained.

    Args:
        source: a hub id, a folder, or a GGUF file, whose weights are dequantised.
        block_size: positions of a completion block. None lets every token see all others. With blocks of 1 and the
            shift nothing but the mask token is new.
        shift: the hidden state at position i - 1 goes on to predict the token at position i.
        mask_token: a token that the tokenizer has and no text uses, or a new one, which gets the mean embedding. None
            takes the tokenizer's own mask token, or the new ``<|mask|>``.
        dtype: of the weights. "auto" takes that of the checkpoint, and float32 of a GGUF file.
        revision: a branch, tag or commit on the hub.

    Raises:
        ValueError: there is no such model, or it has another shape, biases elsewhere, scaled rotary positions or a
            sliding window. The message names what it has.
    """
    path = Path(source)
    is_gguf = path.suffix == ".gguf"
    if is_gguf and not path.is_file():
        raise ValueError(f"There is no file {source!r}.")
    folder = str(path.parent) if is_gguf else fetch(source, revision)
    options: dict[str, Any] = {"gguf_file": path.name} if is_gguf else {}
    problem = f"Cannot load {source!r} as a causal model"
    with named_problem(problem):
        stated = AutoConfig.from_pretrained(folder, **options) if is_gguf else read_config(Path(folder), source)
    # Refused by its configuration, before its weights are read.
    config = _adapted_config(stated, source, block_size=block_size, shift=shift)
    with named_problem(problem):
        wanted = dtype_of(dtype, torch.float32 if is_gguf else "auto")
        causal: Any = AutoModelForCausalLM.from_pretrained(folder, config=stated, dtype=wanted, **options)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
    config.mask_token_id = _give_mask_token(causal, tokenizer, mask_token)
    config.vocab_size, config.dtype = causal.get_input_embeddings().num_embeddings, causal.dtype
    for name in ("eos", "pad", "bos"):
        setattr(config, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
    # Its tensors are taken over and not copied.
    with torch.device("meta"):
        model = AdaptedForMaskedDiffusion(config)
    model.load_state_dict(causal.state_dict(), assign=True)
    model.tie_weights()
    return Adapted(model.eval(), tokenizer, stated.model_type)


def _adapted_config(causal: Any, source: str, *, block_size: int | None, shift: bool) -> AdaptedConfig:
    """What the configuration of a causal model becomes. Raises ValueError for a model that cannot be adapted."""
    if causal.model_type not in SHAPES:
        raise ValueError(
            f"{source!r} is a {causal.model_type!r}, which cannot be adapted; models of the types "
            f"{', '.join(SHAPES)} can."
        )
    stated = causal.to_dict()
    unwanted = ("model_type", "architectures", "dtype", "mask_token_id")
    kept = {name: value for name, value in stated.items() if name not in unwanted}
    kept["head_dim"] = stated.get("head_dim") or causal.hidden_size // causal.num_attention_heads
    with named_problem(f"{source!r} cannot be adapted"):
        return AdaptedConfig(**kept | SHAPES[causal.model_type], block_size=block_size, shift=shift)


def _give_mask_token(causal: Any, tokenizer: Any, mask_token: str | None) -> int:
    """Makes a token the mask token, with an embedding of its own, and returns its id."""
    size = len(tokenizer)
    tokenizer.add_special_tokens({"mask_token": mask_token or tokenizer.mask_token or MASK_TOKEN})
    number: int = tokenizer.mask_token_id
    if number >= causal.get_input_embeddings().num_embeddings:
        causal.resize_token_embeddings(number + 1, mean_resizing=False)
    if number >= size:
        # A row that was never trained would be no place to start from.
        with torch.no_grad():
            for weight in {causal.get_input_embeddings().weight, causal.get_output_embeddings().weight}:
                weight[number] = weight[:size].mean(0)
    return number
