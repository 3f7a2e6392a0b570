"""Compares the tensors that a folder holds with those that its architecture has, before any of them is read.

Transformers and PEFT would only warn, and leave what is missing as it was drawn. What a folder's files can be is
narrowed down as well, so that what is compared is what those two load.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dmpo_lightning.reports.lines import parsed

WHOLE = r"(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
ADAPTER = r"adapter_(config\.json|model\.(safetensors|bin))"


def weights_in(folder: str | Path) -> tuple[list[Path], list[Path]]:
    """The files in a folder that make it one of a whole model, and those that make it one of an adapter."""
    files = sorted(Path(folder).glob("*"))
    whole, adapter = ([path for path in files if re.fullmatch(kind, path.name)] for kind in (WHOLE, ADAPTER))
    return whole, adapter


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
        ValueError: a tensor is missing, unexpected, misshapen or there twice, or it is tied and differs from the one
            that it is tied to, or a file is damaged. The message names both. Or `weight_map` raises it.
    """
    single, index_name, tied = f"{stem}.safetensors", f"{stem}.safetensors.index.json", tied or {}
    # PEFT knows no index.
    index = weight_map(Path(folder)) if stem == "model" else {}
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


def read_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises ValueError, which names the file, where it holds none."""
    try:
        return parsed(path.read_bytes())
    except (OSError, ValueError) as error:
        problem = "missing" if isinstance(error, FileNotFoundError) else f"damaged ({error})"
        raise ValueError(f"File {str(path)!r} is {problem}. Download it again.") from error


@contextmanager
def named_problem(problem: str, *, trusted: bool = False) -> Iterator[None]:
    """Inside, whatever files with odd values raise in libraries is a ValueError of one line that names the ``problem``.

    Code of a model's own, which is ``trusted``, keeps its trace.
    """
    try:
        yield
    except Exception as error:
        if trusted:
            raise
        raise ValueError(f"{problem}: {' '.join(str(error).split())[:1000]}") from error


def weight_map(folder: Path) -> dict[str, str]:
    """The file of each tensor according to the index. Empty where there is no index, and thus a single file.

    Raises:
        ValueError: the index is damaged, or there is a single file beside those that it names.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not index.is_file():
        return {}
    files: dict[str, str] = read_object(index).get("weight_map") or {}
    names = files.values() if isinstance(files, dict) else ()
    # Transformers would also load files of other folders, and of torch's own formats.
    if not names or not all(re.fullmatch(r"[^/\\]+\.safetensors", str(name)) for name in names):
        raise ValueError(
            f"Checkpoint file {str(index)!r} is damaged (its `weight_map` must name .safetensors files of its folder). "
            "Download it again."
        )
    if single.exists() and set(files.values()) != {single.name}:
        raise ValueError(
            f"{str(folder)!r} holds two models: {single.name}, and an index of other files ({index.name}), which "
            "may be left of an earlier one. Remove the one that is not wanted."
        )
    return files


def _stored_tensors(folder: Path, names: list[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The file and the shape of each tensor in the named files, read from the files' headers alone."""
    stored: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in (str(folder / name) for name in names):
        if not Path(file).is_file():
            raise ValueError(f"Checkpoint file {file!r} is missing. Download the model again.")
        try:
            with safe_open(file, framework="pt") as tensors:
                held = {name: (file, tuple(tensors.get_slice(name).get_shape())) for name in tensors.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"Checkpoint file {file!r} is truncated or damaged ({error}). Download it again."
            ) from error
        if twice := sorted(stored.keys() & held.keys()):
            raise ValueError(f"Checkpoint file {file!r}: tensor {twice[0]!r} is in {stored[twice[0]][0]!r} as well.")
        stored |= held
    return stored


def _read(file: str, name: str) -> Tensor:
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name)
