"""The trained weights in a checkpoint, whatever strategy wrote it."""

from pathlib import Path
from typing import Any

import torch

from dmpo_lightning.checkpoints.safe_reading import SafeReader, is_deepspeed, load_data

TRUST = "`--trust_checkpoint` (`trust_checkpoint=True` in Python)"


class UnfitCheckpointError(ValueError):
    """A checkpoint of another model, adapter or kind of run than the one that is to go on from it."""


def is_reference(name: str) -> bool:
    """Whether a name in a checkpoint, or below a network, is that of a weight of the renewed reference."""
    return name.startswith("policy.reference.") or ".reference." in name


def read_weights(checkpoint: str | Path, *, trust_checkpoint: bool = False) -> dict[str, Any]:
    """``state_dict`` with whole tensors, and what else the checkpoint says of the policy.

    Reads a file, a folder of FSDP1 or FSDP2, or one of DeepSpeed. Files and FSDP's folders are read as data alone, so
    that nothing in them is executed. DeepSpeed's own tool unpickles its folders, which can run any code.

    Args:
        checkpoint: its path.
        trust_checkpoint: read a folder of DeepSpeed too, which one should have written oneself.

    Raises:
        ValueError: nothing there, damaged, more than data, not a checkpoint of this package, or a folder of DeepSpeed
            that is not trusted.
    """
    path = Path(checkpoint)
    if not path.exists():
        raise ValueError(f"No checkpoint file {str(checkpoint)!r}; give a .ckpt file (or folder) of a run.")
    if path.is_dir() and is_deepspeed(path) and not trust_checkpoint:
        raise ValueError(
            f"{str(checkpoint)!r} is a folder of DeepSpeed, which is unpickled and can run any code; if you wrote it "
            f"yourself, say so with {TRUST}."
        )
    try:
        saved = _read(path)
    except ValueError as error:
        raise ValueError(f"{str(checkpoint)!r} is truncated, damaged or no checkpoint at all: {error}.") from error
    # torch and DeepSpeed have no error of their own for a folder that they cannot read.
    except (RuntimeError, LookupError, EOFError, OSError, AssertionError) as error:
        raise ValueError(f"{str(checkpoint)!r} is truncated, damaged or no checkpoint at all.") from error
    if not isinstance(saved.get("backbone"), dict):
        raise ValueError(
            f"{str(checkpoint)!r} was not written by DMPO or MaskedSFT, or holds weights alone; it does not say which "
            "model it trained."
        )
    return saved


def _read(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        return load_data(path)
    return _deepspeed(path) if is_deepspeed(path) else _torch_folder(path)


def _torch_folder(path: Path) -> dict[str, Any]:
    """Weights of a folder. Lightning's strategies call them ``state_dict`` under FSDP2 and ``model`` under FSDP1."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    saved, reader = load_data(path / "meta.pt"), SafeReader(path)
    weights: dict[str, Any] = {}
    for name, facts in reader.read_metadata().state_dict_metadata.items():
        top, _, rest = name.partition(".")
        if top in ("state_dict", "model") and isinstance(facts, TensorStorageMetadata):
            weights[name] = torch.empty(facts.size, dtype=facts.properties.dtype)
            saved.setdefault("state_dict", {})[rest] = weights[name]
    # Reads into the empty tensors, which are whole, whatever number of ranks has written the parts.
    load(weights, storage_reader=reader)
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
