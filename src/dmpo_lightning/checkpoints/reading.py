"""What a checkpoint holds: its weights and the facts beside them, and whether a run can go on from it.

A pickle can call any function of this machine. A checkpoint that is a file is read with ``weights_only=True``, which
makes tensors and plain values alone. A folder, of FSDP or DeepSpeed, is unpickled in part by torch and DeepSpeed, so
that one which was not written by the run itself is opened only where it is trusted.
"""

import logging
import mmap
import os
import pickle
import zipfile
from collections.abc import Callable, Collection, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from dmpo_lightning.terminal import error_line

SUFFIXES = (".ckpt", ".ckpt.old")
"""Of checkpoints. The second is left where a job was killed while a folder was being replaced."""

PART = "it holds no checkpoint, or a part of one"
logger = logging.getLogger(__name__)


class UnfitCheckpointError(ValueError):
    """A damaged checkpoint, or one of another model, adapter or kind of run than the one that is to go on from it."""


def is_reference(name: str) -> bool:
    """Whether a name in a checkpoint, or below a network, is that of a weight of the refreshed reference."""
    return name.startswith("policy.reference.") or ".reference." in name


def is_deepspeed(path: Path) -> bool:
    """Whether a folder is one of DeepSpeed, which alone writes this file."""
    return (path / "latest").exists()


def load_data(path: str | Path, *, whole: bool = True) -> dict[str, Any]:
    """A file of torch as data. Its tensors stay on the disk until they are used.

    Args:
        path: of the file.
        whole: whether all of it is compared with its checksums, for which all of it is read.

    Raises:
        ValueError: it is no such file, is damaged, holds more than data, or is no dictionary.
    """
    if not Path(path).is_file():
        raise ValueError("it is no file")
    load = partial(torch.load, path, map_location="cpu", weights_only=True, mmap=True)
    return checked(path, load) if whole else _dictionary(load)


def checked(path: str | Path, load: Callable[[], Any]) -> dict[str, Any]:
    """What ``load`` makes of a file of torch, which is looked at before.

    Raises:
        ValueError: it is damaged, holds more than data, or is no dictionary, or not of weights.
    """
    if (problem := why_damaged(Path(path))) is not None:
        raise ValueError(problem)
    return _dictionary(load)


def _dictionary(load: Callable[[], Any]) -> dict[str, Any]:
    try:
        saved = load()
    # A file of anything else may raise any error of Python's and torch's.
    except Exception as error:
        kind = "it holds more than data" if isinstance(error, pickle.UnpicklingError) else PART
        raise ValueError(f"{kind}: {error_line(error)}") from error
    if not isinstance(saved, dict):
        raise ValueError(f"it holds no dictionary but {type(saved).__name__}")
    for name in ("state_dict", "callbacks", "loops", "backbone", "arguments"):
        if not isinstance(saved.get(name, {}), dict):
            raise ValueError(f"its {name!r} must be a dictionary, got {type(saved[name]).__name__}")
    for name, value in saved.get("state_dict", {}).items():
        if not (isinstance(value, torch.Tensor) and value.is_floating_point()):
            got = getattr(value, "dtype", type(value).__name__)
            raise ValueError(f"its weight {name!r} must be a tensor of floating-point numbers, got {got}")
    return saved


def why_damaged(path: Path, *, part: int = 0, parts: int = 1) -> str | None:
    """What of a checkpoint is not as it was written, by the checksums (CRC-32) in it. None if all is.

    torch writes one for every tensor and does not read them. This takes about half a second per gigabyte. A folder's
    list of its tensors (``.metadata``) has none. Ranks may look at one of several ``parts`` of a folder's files each.
    """
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.suffix in (".pt", ".distcp"))
    found = (_damage(file.absolute(), file.stat().st_size, file.stat().st_ctime_ns) for file in files[part::parts])
    return next(filter(None, found), None)


@cache
def _damage(file: Path, size: int, changed: int) -> str | None:
    """What is damaged of a file. It is kept until the file changes: it is looked at to be chosen, and to be loaded."""
    end = size
    try:
        # A file of FSDP is an archive for each of its tensors, one behind the other. The list of one is at its end.
        while end or not size:
            with file.open("rb") as opened, _Mapped(opened.fileno(), end, access=mmap.ACCESS_READ) as mapped:
                archive = zipfile.ZipFile(mapped)  # type: ignore[call-overload]
                # Python would pass over what follows an archive, which is a part of the next one.
                if mapped[-22:-18] != b"PK\x05\x06":
                    raise zipfile.BadZipFile("it has no end")
                if (damaged := archive.testzip()) is not None:
                    return f"it is damaged: in {file.name}, {damaged} has not the checksum with which it was written"
                end = min(each.header_offset for each in archive.infolist())
    # What is damaged, or no archive, may raise any error.
    except Exception as error:
        return f"{PART}: {file.name}: {error}"
    return None


class _Mapped(mmap.mmap):
    """The beginning of a file, as if it were all of it. Python's archives ask one thing more."""

    def seekable(self) -> bool:
        return True


def why_unsafe(path: Path) -> str | None:
    """What would be executed, or is damaged, if a checkpoint were loaded in the usual way. None if it is data alone."""
    return "a folder is unpickled, which can run any code" if path.is_dir() else why_unfit(path)


def why_unfit(path: Path, *, keys: Collection[str] = (), continues: bool = False) -> str | None:
    """What a checkpoint lacks, or in which respect it is more than data. None if a run can use it.

    Of a folder the facts beside the weights are read alone, and of DeepSpeed's nothing but its checksums.

    Args:
        path: of a checkpoint.
        keys: what the module itself writes and cannot continue without.
        continues: whether training goes on. An evaluation needs the weights alone.
    """
    if (problem := why_damaged(path)) is not None or (path.is_dir() and is_deepspeed(path)):
        return problem
    try:
        saved = load_data(path / "meta.pt" if path.is_dir() else path)
    except ValueError as error:
        return str(error)
    if continues and "lr_schedulers" not in saved:
        return "it holds weights alone, of which no run can be continued"
    missing = [key for key in keys if key not in saved] if continues else []
    # Such as one of supervised fine-tuning, where `DMPO` is to continue.
    return f"it has no {missing[0]!r}, so it is of another kind of run" if missing else None


def confine_paths(saved: dict[str, Any], callbacks: Collection[Any], checkpoint: str | Path) -> list[str]:
    """Empties states in a foreign checkpoint that `ModelCheckpoint` and its like would obey, and returns their names.

    They remove what the paths in their states name, whatever that is. Of a ``checkpoint`` that lies in the folder of
    one of these callbacks, names of files below that folder stay, wherever it was when they were noted.
    """
    states, folders = saved.get("callbacks", {}), [getattr(callback, "dirpath", None) for callback in callbacks]
    is_own, emptied = any(folder and _is_below(checkpoint, folder) for folder in folders), []
    for callback in callbacks:
        # A class is the key in checkpoints of Lightning before 1.5.
        for key in {callback.state_key, type(callback)} & set(states):
            emptied += [type(callback).__name__] if states[key].get("best_model_path") and not is_own else []
            states[key] = _own_paths(states[key], callback) if is_own else {}
    return emptied


def _own_paths(state: dict[str, Any], callback: Any) -> dict[str, Any]:
    """The state of a `ModelCheckpoint` with the files that are in its folder. Those that have gone are forgotten."""
    was, now = state.get("dirpath"), getattr(callback, "dirpath", None)
    if was is None or now is None:
        return {}

    def own(path: str) -> str:
        found = os.path.join(now, os.path.relpath(path, was)) if path else ""
        is_there = found.endswith(callback.FILE_EXTENSION) and ("://" in found or os.path.exists(found))
        return found if is_there and _is_below(found, now) else ""

    paths = {name: own(path) for name, path in state.items() if name.endswith("_path")}
    models = {own(path): score for path, score in state.get("best_k_models", {}).items()}
    return state | paths | {"dirpath": now, "best_k_models": {path: models[path] for path in filter(None, models)}}


def _is_below(path: str | Path, folder: str | Path) -> bool:
    if "://" in str(folder):
        return str(path).startswith(f"{folder}".rstrip("/") + "/") and ".." not in Path(path).parts
    return Path(folder).resolve() in Path(path).resolve().parents


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
        return load_data(path / "meta.pt" if path.is_dir() else path, whole=False)
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
        beside = ", ".join(sorted(each.name for each in path.parent.glob("*.ckpt")))
        raise ValueError(
            f"No checkpoint file {str(checkpoint)!r}; give a .ckpt file (or folder) of a run"
            f"{f': there is {beside}' if beside else ''}."
        )
    if path.is_dir() and not trust_checkpoint:
        raise ValueError(
            f"{str(checkpoint)!r} is a folder, which is unpickled and can run any code; if you wrote it yourself, say "
            "so with `--trust_checkpoint` (`trust_checkpoint=True` in Python)."
        )
    try:
        saved = _read(path)
    # torch and DeepSpeed have no error of their own for a folder that they cannot read.
    except Exception as error:
        raise ValueError(f"{str(checkpoint)!r} is truncated, damaged or no checkpoint at all: {error}.") from error
    if "backbone" not in saved or "state_dict" not in saved:
        raise ValueError(
            f"{str(checkpoint)!r} was not written by DMPO or MaskedSFT; it has no weights (`state_dict`), or does not "
            "say which model it trained (`backbone`)."
        )
    if not isinstance(saved.get("seed", 0), int):
        raise ValueError(f"{str(checkpoint)!r}: its 'seed' must be a whole number, got {saved['seed']!r}.")
    return saved


def _read(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        return load_data(path)
    if (problem := why_damaged(path)) is not None:
        raise ValueError(problem)
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
    from torch.distributed.checkpoint.api import CheckpointException
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
    try:
        load(weights, storage_reader=reader)
    # It is no `Exception`.
    except CheckpointException as error:
        raise ValueError(f"{PART}: {next(iter(error.failures.values()))[0]}") from error
    return saved
