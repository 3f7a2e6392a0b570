"""What a checkpoint holds: its weights and the facts beside them, and whether a run can go on from it.

A pickle can call any function of this machine. A checkpoint that is a file is read with ``weights_only=True``, which
makes tensors and plain values alone. A folder, of FSDP or DeepSpeed, is unpickled in part by torch and DeepSpeed, so
that one which was not written by the run itself is opened only where it is trusted.
"""

import logging
import os
import pickle
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch

SUFFIXES = (".ckpt", ".ckpt.old")
"""Of checkpoints. The second is left where a job was killed while a folder was being replaced."""

logger = logging.getLogger(__name__)


class UnfitCheckpointError(ValueError):
    """A checkpoint of another model, adapter or kind of run than the one that is to go on from it."""


def is_reference(name: str) -> bool:
    """Whether a name in a checkpoint, or below a network, is that of a weight of the refreshed reference."""
    return name.startswith("policy.reference.") or ".reference." in name


def is_deepspeed(path: Path) -> bool:
    """Whether a folder is one of DeepSpeed, which alone writes this file."""
    return (path / "latest").exists()


def load_data(path: str | Path) -> dict[str, Any]:
    """A file of torch as data. Its tensors stay on the disk until they are used.

    Raises:
        ValueError: it is no such file, is damaged, holds more than data, or is no dictionary.
    """
    if not Path(path).is_file():
        raise ValueError("it is no file")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # A file of anything else, or a damaged one, may raise any error of Python's and torch's.
    except Exception as error:
        kind = "more than data" if isinstance(error, pickle.UnpicklingError) else "no checkpoint, or a part of one"
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"it holds {kind}: {reason}") from error
    if not isinstance(saved, dict):
        raise ValueError(f"it holds no dictionary but {type(saved).__name__}")
    return saved


def why_unsafe(path: Path) -> str | None:
    """What would be executed, or is damaged, if a checkpoint were loaded in the usual way. None if it is data alone."""
    return "a folder is unpickled, which can run any code" if path.is_dir() else why_unfit(path)


def why_unfit(path: Path, *, keys: Collection[str] = (), continues: bool = False) -> str | None:
    """What a checkpoint lacks, or in which respect it is more than data. None if a run can use it.

    Of a folder the facts beside the weights are read alone, and of DeepSpeed's nothing.

    Args:
        path: of a checkpoint.
        keys: what the module itself writes and cannot continue without.
        continues: whether training goes on. An evaluation needs the weights alone.
    """
    if path.is_dir() and is_deepspeed(path):
        return None
    facts = path / "meta.pt" if path.is_dir() else path
    try:
        saved = load_data(facts)
    except ValueError as error:
        return str(error)
    if continues and "lr_schedulers" not in saved:
        return "it holds weights alone, of which no run can be continued"
    missing = [key for key in keys if key not in saved] if continues else []
    # Such as one of supervised fine-tuning, where `DMPO` is to continue.
    return f"it has no {missing[0]!r}, so it is of another kind of run" if missing else None


def newest_readable(*folders: Path, why_unusable: Callable[[Path], str | None] = why_unfit) -> Path | None:
    """The newest ``*.ckpt`` below some folders that can be used, or None. Those passed over are logged.

    Args:
        folders: that are searched, with all folders in them.
        why_unusable: what is wrong with a checkpoint, None if nothing is.
    """
    candidates = {path: age for folder in folders for path in _checkpoints_below(folder) if (age := _written(path))}
    for path in sorted(candidates, key=lambda path: (candidates[path], str(path)), reverse=True):
        problem = why_unusable(path)
        if problem is None:
            return path
        logger.warning("Checkpoint %s cannot be used (%s); trying the one before.", path, problem)
    return None


def _checkpoints_below(folder: Path) -> Iterator[Path]:
    # Passes over folders that vanish meanwhile, as `rglob` does not.
    for parent, folders, files in os.walk(folder):
        yield from (Path(parent, name) for name in (*folders, *files) if name.endswith(SUFFIXES))


def _written(path: Path) -> int:
    """When a checkpoint was written. 0 where there is none (any more), to which a link may lead too."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def facts_beside_weights(path: Path) -> dict[str, Any] | None:
    """What a checkpoint says of itself, read without its tensors. None where that cannot be read.

    A folder of DeepSpeed is unpickled, so this is for checkpoints that are about to be loaded anyway.
    """
    try:
        if path.is_dir() and is_deepspeed(path):
            return _deepspeed_facts(path)
        return load_data(path / "meta.pt" if path.is_dir() else path)
    # Whoever loads it says what is wrong with it. A pickle that is obeyed may raise anything.
    except Exception:
        return None


def read_weights(checkpoint: str | Path, *, trust_checkpoint: bool = False) -> dict[str, Any]:
    """``state_dict`` with whole tensors, and what else the checkpoint says of the policy, whatever strategy wrote it.

    Args:
        checkpoint: a file, or a folder of FSDP1, FSDP2 or DeepSpeed.
        trust_checkpoint: read a folder too, which one should have written oneself.

    Raises:
        ValueError: nothing there, damaged, more than data, not a checkpoint of this package, or a folder that is not
            trusted.
    """
    path = Path(checkpoint)
    if not path.exists():
        raise ValueError(f"No checkpoint file {str(checkpoint)!r}; give a .ckpt file (or folder) of a run.")
    if path.is_dir() and not trust_checkpoint:
        raise ValueError(
            f"{str(checkpoint)!r} is a folder, which is unpickled and can run any code; if you wrote it yourself, say "
            "so with `--trust_checkpoint` (`trust_checkpoint=True` in Python)."
        )
    try:
        saved = _read(path)
    # torch and DeepSpeed have no error of their own for a folder that they cannot read.
    except (ValueError, RuntimeError, LookupError, EOFError, OSError, AssertionError) as error:
        raise ValueError(f"{str(checkpoint)!r} is truncated, damaged or no checkpoint at all: {error}.") from error
    if not isinstance(saved.get("backbone"), dict):
        raise ValueError(
            f"{str(checkpoint)!r} was not written by DMPO or MaskedSFT, or holds weights alone; it does not say which "
            "model it trained."
        )
    return saved


def _read(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        return load_data(path)
    if not is_deepspeed(path):
        return _torch_folder(path)
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    # In float32, which is what DeepSpeed's optimizer works on.
    weights = get_fp32_state_dict_from_zero_checkpoint(str(path), exclude_frozen_parameters=True)
    return _deepspeed_facts(path) | {"state_dict": weights}


def _deepspeed_facts(path: Path) -> dict[str, Any]:
    states = min((path / "checkpoint").glob("*model_states.pt"))
    return dict(torch.load(states, map_location="cpu", weights_only=False, mmap=True))


def _torch_folder(path: Path) -> dict[str, Any]:
    """Weights of a folder. Lightning's strategies call them ``state_dict`` under FSDP2 and ``model`` under FSDP1."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    saved, reader = load_data(path / "meta.pt"), FileSystemReader(path)
    weights: dict[str, Any] = {}
    for name, facts in reader.read_metadata().state_dict_metadata.items():
        top, _, rest = name.partition(".")
        if top in ("state_dict", "model") and isinstance(facts, TensorStorageMetadata):
            weights[name] = torch.empty(facts.size, dtype=facts.properties.dtype)
            saved.setdefault("state_dict", {})[rest] = weights[name]
    # Reads into the empty tensors, which are whole, whatever number of ranks has written the parts.
    load(weights, storage_reader=reader)
    return saved
