"""Compares the tensors that a folder holds with those that its architecture has, before any of them is read.

Transformers and PEFT would only warn, and leave what is missing as it was drawn.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


def verify_tensors(
    folder: str | Path, expected: Mapping[str, Tensor], *, tied: Mapping[str, str] | None = None, stem: str = "model"
) -> None:
    """Compares names and shapes in a folder's safetensors with the ``expected`` ones, which may be on the meta device.

    No weight is read, but for those that are stored although they are tied to others.

    Args:
        folder: of a model or an adapter, in one file or in several with an index.
        expected: the tensors of the architecture.
        tied: names of tensors that are one with others, and those others. They may be left out.
        stem: what the files are called, ``adapter_model`` for an adapter.

    Raises:
        ValueError: a tensor is missing, unexpected or misshapen, or it is tied and differs from the one that it is tied
            to, or a file is damaged. The message names both.
    """
    single, index_name = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    tied = tied or {}
    index = _weight_map(Path(folder) / index_name)
    stored = _stored_tensors(Path(folder), sorted(set(index.values())) or [single])
    for name, tensor in expected.items():
        if name not in stored and name not in tied:
            file = str(Path(folder) / index.get(name, index_name if index else single))
            raise ValueError(f"Checkpoint file {file!r}: tensor {name!r} is missing. Download the model again.")
        if name in stored and stored[name][1] != tuple(tensor.shape):
            file, shape = stored[name]
            raise ValueError(
                f"Checkpoint file {file!r}: tensor {name!r} must have shape {tuple(tensor.shape)}, got {shape}. "
                "The configuration and the weights do not belong together."
            )
    for name, (file, _) in stored.items():
        if name not in expected:
            raise ValueError(
                f"Checkpoint file {file!r}: unexpected tensor {name!r}; the architecture has none of that name."
            )
    for name, other in tied.items():
        if name in stored and not torch.equal(_read(stored[name][0], name), _read(stored[other][0], other)):
            raise ValueError(
                f"Checkpoint file {stored[name][0]!r}: {name!r} differs from {other!r}, to which config.json ties it "
                "(`tie_word_embeddings`). One of the two is wrong."
            )


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor according to the index. Empty where there is no index, and thus a single file."""
    if not index.is_file():
        return {}
    try:
        return json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"Checkpoint file {str(index)!r} is damaged ({error}). Download it again.") from error


def _stored_tensors(folder: Path, names: list[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The file and the shape of each tensor in the named files, read from the files' headers alone."""
    stored: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in (str(folder / name) for name in names):
        if not Path(file).is_file():
            raise ValueError(f"Checkpoint file {file!r} is missing. Download the model again.")
        try:
            with safe_open(file, framework="pt") as tensors:
                stored |= {name: (file, tuple(tensors.get_slice(name).get_shape())) for name in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"Checkpoint file {file!r} is truncated or damaged ({error}). Download it again."
            ) from error
    return stored


def _read(file: str, name: str) -> Tensor:
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name)
