"""The trained weights in a checkpoint, whatever strategy wrote it."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch


class UnfitCheckpointError(ValueError):
    """A checkpoint of another model, adapter or kind of run than the one that is to go on from it."""


def read_weights(checkpoint: str | Path) -> dict[str, Any]:
    """``state_dict`` with whole tensors, and what else the checkpoint says of the policy.

    Reads a file, a folder of FSDP1 or FSDP2, or one of DeepSpeed. Files are read as data alone. Folders are unpickled,
    those of FSDP by torch (their ``.metadata``) and those of DeepSpeed by its own tool, and can run code: read only
    folders that you trust.

    Raises:
        ValueError: nothing there, damaged, or not a checkpoint of this package.
    """
    path = Path(checkpoint)
    readers = {"latest": _deepspeed, "meta.pt": _torch_folder}
    # Each strategy leaves a file that no other one writes.
    reader = next((read for name, read in readers.items() if (path / name).is_file()), _file)
    try:
        saved = reader(path)
    except FileNotFoundError as error:
        raise ValueError(f"No checkpoint file {str(checkpoint)!r}; give a .ckpt file (or folder) of a run.") from error
    # torch has no error of its own for a file that it cannot read.
    except (UnpicklingError, RuntimeError, LookupError, EOFError, OSError) as error:
        raise ValueError(f"{str(checkpoint)!r} is truncated, damaged or no checkpoint at all.") from error
    if "backbone" not in saved:
        raise ValueError(
            f"{str(checkpoint)!r} was not written by DMPO or MaskedSFT; it does not say which model it trained."
        )
    return saved


def _file(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def _torch_folder(path: Path) -> dict[str, Any]:
    """Weights of a folder. Lightning's strategies call them ``state_dict`` under FSDP2 and ``model`` under FSDP1."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    saved = _file(path / "meta.pt")
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    weights: dict[str, Any] = {}
    for name, facts in stored.items():
        top, _, rest = name.partition(".")
        if top in ("state_dict", "model") and isinstance(facts, TensorStorageMetadata):
            weights[name] = torch.empty(facts.size, dtype=facts.properties.dtype)
            saved.setdefault("state_dict", {})[rest] = weights[name]
    # Reads into the empty tensors, which are whole, whatever number of ranks has written the parts.
    load(weights, checkpoint_id=path)
    return saved


def _deepspeed(path: Path) -> dict[str, Any]:
    """Weights in float32, which is what DeepSpeed's optimizer works on."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    states = sorted((path / "checkpoint").glob("*model_states.pt"))
    saved = torch.load(states[0], map_location="cpu", weights_only=False)
    weights = get_fp32_state_dict_from_zero_checkpoint(str(path), exclude_frozen_parameters=True)
    parts = ("module", "optimizer", "lr_scheduler", "buffer_names", "param_shapes", "ds_config", "ds_version")
    said = {name: value for name, value in saved.items() if name not in parts}
    return said | {"state_dict": weights}
