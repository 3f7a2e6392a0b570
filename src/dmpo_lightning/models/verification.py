"""Compares the tensors that a checkpoint holds with those that its architecture has."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


def verify_checkpoint(folder: str, config: "PretrainedConfig") -> None:
    """Compares the names and shapes in the safetensors files with those of the architecture.

    No weight is read, but for those that are stored although they are tied to others. Transformers itself would only
    warn, and fill missing tensors with random numbers.

    Raises:
        ValueError: a tensor is missing, unexpected or misshapen, or it is tied and differs from the one that it is tied
            to, or a file is damaged. The message names both.
    """
    from transformers import AutoModelForMaskedLM

    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    # A tensor that is tied to another is one with it, and is stored or left out.
    tied = (getattr(model, "_tied_weights_keys", None) if config.tie_word_embeddings else None) or {}
    index = _weight_map(Path(folder))
    stored = _stored_tensors(Path(folder), sorted(set(index.values())) or [SINGLE_FILE])
    for name, shape in expected.items():
        if name not in stored and name in tied:
            continue
        if name not in stored:
            file = str(Path(folder) / index.get(name, SINGLE_FILE if not index else INDEX_FILE))
            raise ValueError(f"Checkpoint file {file!r}: tensor {name!r} is missing. Download the model again.")
        file, stored_shape = stored[name]
        if stored_shape != shape:
            raise ValueError(
                f"Checkpoint file {file!r}: tensor {name!r} must have shape {shape}, got {stored_shape}. "
                "config.json and weights do not belong together."
            )
    for name, (file, _) in stored.items():
        if name not in expected:
            raise ValueError(
                f"Checkpoint file {file!r}: unexpected tensor {name!r}; the architecture has none of that name."
            )
    for name, other in tied.items():
        if name in stored and other in stored:
            _check_tied(name, stored[name][0], other, stored[other][0])


def _check_tied(name: str, file: str, other: str, other_file: str) -> None:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors, safe_open(other_file, framework="pt") as others:
        if not torch.equal(tensors.get_tensor(name), others.get_tensor(other)):
            raise ValueError(
                f"Checkpoint file {file!r}: {name!r} differs from {other!r}, to which config.json ties it "
                "(`tie_word_embeddings`). One of the two is wrong."
            )


def _weight_map(folder: Path) -> dict[str, str]:
    """The file of each tensor according to the index. Empty where there is no index, and thus a single file."""
    index = folder / INDEX_FILE
    if not index.is_file():
        return {}
    try:
        return json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"Checkpoint file {str(index)!r} is damaged ({error}). Download it again.") from error


def _stored_tensors(folder: Path, names: list[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The file and the shape of each tensor in the named files, read from the files' headers alone."""
    from safetensors import SafetensorError, safe_open

    stored: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in (folder / name for name in names):
        if not file.is_file():
            raise ValueError(f"Checkpoint file {str(file)!r} is missing. Download the model again.")
        try:
            with safe_open(file, framework="pt") as tensors:
                stored |= {name: (str(file), tuple(tensors.get_slice(name).get_shape())) for name in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"Checkpoint file {str(file)!r} is truncated or damaged ({error}). Download it again."
            ) from error
    return stored
