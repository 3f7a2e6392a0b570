"""From a hub id, a local folder or the name of an embedded model to a model, a tokenizer and facts about tokens."""

import json
import os
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from dmpo_lightning.models.families import family_of_model, family_of_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

EMBEDDED_MODELS = ("sudoku_tiny",)
"""Models that travel in the wheel, loadable by name without network."""

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"

Quantization = Literal["nf4"]


@dataclass(frozen=True)
class TokenFacts:
    """What sampling and decoding must know of a tokenizer."""

    mask_token_id: int
    pad_token_id: int
    end_token_ids: tuple[int, ...]
    banned_token_ids: tuple[int, ...]
    """The mask token and the ids that the tokenizer never produces; never sampled."""
    vocab_size: int
    """Width of the logits."""


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
    """A masked diffusion language model by hub id, folder or embedded name.

    LLaDA and Dream load natively and every tensor is checked; any other model that transformers knows as a masked
    language
    model loads as such. A folder with a PEFT adapter loads its base and the adapter, trainable.

    Args:
        source: hub id, folder, or the name of an embedded model.
        dtype: of the weights; "auto" takes that of the checkpoint.
        revision: branch, tag or commit on the hub.
        random_weights: build the architecture with fresh weights drawn from ``seed``.
        seed: of fresh weights.
        quantization: ``nf4`` quantises the blocks' linear layers to 4 bits on loading (needs bitsandbytes).
        trust_remote_code: run code that comes with the checkpoint; never needed for LLaDA and Dream.

    Raises:
        ValueError: nothing to load there, or a checkpoint with missing, unexpected, misshapen or truncated tensors,
            named by
            file and tensor; each with what to do.
    """
    folder = fetch(source, revision)
    if (Path(folder) / "adapter_config.json").is_file():
        if random_weights:
            raise ValueError(f"`random_weights` needs a whole model, but {source!r} is an adapter on a trained one.")
        return _load_adapted(folder, dtype=dtype, quantization=quantization, trust_remote_code=trust_remote_code)
    from transformers import AutoConfig, AutoModelForMaskedLM

    from dmpo_lightning.models.families import families

    families()  # registers the native architectures
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if random_weights:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModelForMaskedLM.from_config(config).to(_dtype(dtype, torch.float32))
    if family_of_model(config.model_type):
        verify_checkpoint(folder, config)
    options: dict[str, Any] = {"dtype": _dtype(dtype, "auto"), "trust_remote_code": trust_remote_code}
    if quantization is None:
        return AutoModelForMaskedLM.from_pretrained(folder, **options)
    from peft import prepare_model_for_kbit_training

    model = AutoModelForMaskedLM.from_pretrained(folder, quantization_config=_four_bit(config), **options)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes 0.50 repacks weights in eval mode on such CPUs, and its backward then reads them wrongly.
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment,unused-ignore]
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def fetch(source: str, revision: str | None = None) -> str:
    """The local folder of a source, downloaded from the hub (or found in its cache) if need be.

    Raises:
        ValueError: neither a folder, nor an embedded name, nor to be had from the hub.
    """
    if Path(source).is_dir():
        return source
    if source in EMBEDDED_MODELS:
        return str(files("dmpo_lightning") / "assets" / source)
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.py"]
        return snapshot_download(source, revision=revision, allow_patterns=wanted)
    except (OSError, ValueError) as error:  # the hub's errors are of many classes, all of these two kinds
        raise ValueError(_missing_source(source)) from error


def verify_checkpoint(folder: str, config: "PretrainedConfig") -> None:
    """Compares names and shapes of the safetensors files with the architecture, without reading a weight.

    Raises:
        ValueError: names the file and the tensor that is missing, unexpected, misshapen, or whose file is damaged.
    """
    from transformers import AutoModelForMaskedLM

    with torch.device("meta"):
        expected = {name: tuple(t.shape) for name, t in AutoModelForMaskedLM.from_config(config).state_dict().items()}
    index = _weight_map(Path(folder))
    found = _stored_tensors(Path(folder), sorted(set(index.values())) or [SINGLE_FILE])
    for name, shape in expected.items():
        if name not in found:
            file = str(Path(folder) / index.get(name, SINGLE_FILE if not index else INDEX_FILE))
            raise ValueError(f"Checkpoint file {file!r}: tensor {name!r} is missing. Download the model again.")
        file, stored = found[name]
        if stored != shape:
            raise ValueError(
                f"Checkpoint file {file!r}: tensor {name!r} must have shape {shape}, got {stored}. "
                "config.json and weights do not belong together."
            )
    for name, (file, _) in found.items():
        if name not in expected:
            raise ValueError(
                f"Checkpoint file {file!r}: unexpected tensor {name!r}; the architecture has none of that name."
            )


def _weight_map(folder: Path) -> dict[str, str]:
    """The file of each tensor, as the index has it; empty where there is no index."""
    index = folder / INDEX_FILE
    if not index.is_file():
        return {}
    try:
        return json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"Checkpoint file {str(index)!r} is damaged ({error}). Download it again.") from error


def _stored_tensors(folder: Path, names: list[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """File and shape of each tensor in the named files."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in (folder / name for name in names):
        if not file.is_file():
            raise ValueError(f"Checkpoint file {str(file)!r} is missing. Download the model again.")
        try:
            with safe_open(file, framework="pt") as tensors:
                found |= {name: (str(file), tuple(tensors.get_slice(name).get_shape())) for name in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"Checkpoint file {str(file)!r} is truncated or damaged ({error}). Download it again."
            ) from error
    return found


def _load_adapted(folder: str, **options: Any) -> nn.Module:
    from dmpo_lightning.models.lora import load_adapter

    base = json.loads((Path(folder) / "adapter_config.json").read_text())["base_model_name_or_path"]
    return load_adapter(load_model(base, **options), folder)


def _dtype(name: str | torch.dtype, automatic: Any) -> Any:
    if isinstance(name, torch.dtype):
        return name
    if name == "auto":
        return automatic
    value = getattr(torch, name, None)
    if not isinstance(value, torch.dtype):
        raise ValueError(f"`dtype` must be auto or the name of a torch dtype such as bfloat16, got {name!r}.")
    return value


def _four_bit(config: "PretrainedConfig") -> Any:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "`quantization` nf4 needs bitsandbytes: pip install 'dmpo-lightning[quantization]'."
        ) from error
    from transformers import AutoModelForMaskedLM, BitsAndBytesConfig

    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(config)
    head = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=head,
    )


def load_tokenizer(
    source: "str | PreTrainedTokenizerBase", *, revision: str | None = None
) -> "PreTrainedTokenizerBase":
    """A tokenizer by hub id, folder or embedded name, with its family's chat template where it has none of its own."""
    if not isinstance(source, str):
        return source
    from transformers import AutoTokenizer

    from dmpo_lightning.models.families import families

    families()  # registers the native configurations, which AutoTokenizer reads
    folder = fetch(source, revision)
    if not (Path(folder) / "tokenizer_config.json").is_file() and (Path(folder) / "adapter_config.json").is_file():
        base = json.loads((Path(folder) / "adapter_config.json").read_text())["base_model_name_or_path"]
        return load_tokenizer(base)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)  # None would ask on the terminal
    except (OSError, ValueError) as error:
        raise ValueError(f"Cannot load a tokenizer from {folder!r}: {error}. Pass `tokenizer` as well.") from error
    family = family_of_tokenizer(tokenizer)
    if tokenizer.chat_template is None and family is not None:
        tokenizer.chat_template = family.chat_template
    return tokenizer


def token_facts(model: nn.Module, tokenizer: "PreTrainedTokenizerBase", mask_token_id: int | None = None) -> TokenFacts:
    """Facts from the model's configuration and the tokenizer; ``mask_token_id`` overrides both.

    Raises:
        ValueError: no mask token id, or one outside the vocabulary.
    """
    config: Any = getattr(model, "config", None)
    mask = mask_token_id if mask_token_id is not None else getattr(config, "mask_token_id", None)
    mask = mask if mask is not None else tokenizer.mask_token_id
    vocab_size = getattr(config, "embedding_size", None) or getattr(config, "vocab_size", None) or len(tokenizer)
    if mask is None or not 0 <= mask < vocab_size:
        raise ValueError(
            f"`mask_token_id` must be an id below the vocabulary size {vocab_size}, got {mask}: neither the model's "
            "configuration nor the tokenizer names one; pass mask_token_id=... or use a tokenizer with a mask token."
        )
    ends = end_token_ids(tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends[0] if ends else mask)
    never = range(max(tokenizer.get_vocab().values()) + 1, vocab_size)
    banned = (mask, *(i for i in never if i != mask))
    return TokenFacts(
        mask_token_id=mask, pad_token_id=pad, end_token_ids=ends, banned_token_ids=banned, vocab_size=vocab_size
    )


def end_token_ids(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """Ids that end a completion: those of the tokenizer's family, its eos token, or its separator where it has
    neither.
    """
    family, vocabulary = family_of_tokenizer(tokenizer), tokenizer.get_vocab()
    known = [vocabulary[token] for token in family.end_tokens] if family else []
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    return tuple(dict.fromkeys([*known, *([] if eos is None else [eos])]))


def _missing_source(source: str) -> str:
    offline = " (offline mode is on)" if os.environ.get("HF_HUB_OFFLINE") else ""
    return (
        f"Cannot load {source!r}: it is neither a local folder nor reachable on the Hugging Face hub{offline}. "
        f"Download it "
        f"where there is a network (`hf download {source} --local-dir DIR`) and pass the folder (`--model.model=DIR`). "
        f"Embedded and needing no download: {', '.join(EMBEDDED_MODELS)} (`dmpo-lightning fit --config "
        f"sudoku_tiny.yaml`)."
    )
