"""Whether a checkpoint that can be read holds what a run needs of it."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from dmpo_lightning.checkpoints.safe_reading import SafeReader, is_deepspeed, load_data, names_in_pickle

PROGRESS = ("loops", "optimizer_states", "lr_schedulers")
"""What Lightning writes of a run, and leaves out of a checkpoint of weights alone."""


def why_unfit(path: Path, *, keys: Collection[str], continues: bool) -> str | None:
    """What a checkpoint lacks, or in which respect it is more than data. None if a run can use it.

    DeepSpeed's files are looked through, not opened, because opening them can run code.

    Args:
        path: of a checkpoint that can be read.
        keys: what the module itself writes and cannot continue without.
        continues: whether training goes on. An evaluation needs the weights alone.
    """
    needed = [*keys, *PROGRESS] if continues else []
    try:
        if path.is_dir() and is_deepspeed(path):
            return _deepspeed_problem(path, needed)
        saved = _folder_contents(path) if path.is_dir() else load_data(path)
    # A running job may replace or remove it at any moment.
    except (ValueError, OSError) as error:
        return str(error)
    if not _holds_weights(saved.get("state_dict")):
        return "it holds no weights of a policy"
    if continues and not saved.get("optimizer_states"):
        return "it holds weights alone, of which no run can be continued"
    missing = [key for key in needed if key not in saved]
    # Such as one of supervised fine-tuning, where `DMPO` is to continue.
    if missing:
        return f"it has no {missing[0]!r}, so it is of another kind of run"
    return _optimizer_problem(saved) if continues else None


def facts_beside_weights(path: Path) -> dict[str, Any] | None:
    """What a checkpoint says of itself, read without its tensors. None where that cannot be read.

    A folder of DeepSpeed is unpickled, so this is for checkpoints that are about to be loaded anyway.
    """
    try:
        if not path.is_dir():
            return load_data(path)
        if not is_deepspeed(path):
            return load_data(path / "meta.pt")
        states = next((path / "checkpoint").glob("*model_states.pt"))
        return dict(torch.load(states, map_location="cpu", weights_only=False, mmap=True))
    # Whoever loads it says what is wrong with it. A pickle that is obeyed may raise anything.
    except Exception:
        return None


def _folder_contents(folder: Path) -> dict[str, Any]:
    """What a folder of FSDP1 or FSDP2 holds, with descriptions in the place of tensors."""
    saved = load_data(folder / "meta.pt")
    described = SafeReader(folder).read_metadata().state_dict_metadata
    for name, facts in described.items():
        top, _, rest = name.partition(".")
        # Lightning's strategies call the weights `state_dict` under FSDP2 and `model` under FSDP1.
        saved.setdefault("state_dict" if top == "model" else top, {})[rest] = facts
    if "loops" in saved:
        saved["optimizer_states"] = [value for name, value in saved.items() if name.startswith("optimizer_")]
    return saved


def _holds_weights(state: Any) -> bool:
    return isinstance(state, dict) and any(str(name).startswith("policy.") for name in state)


def _optimizer_problem(saved: dict[str, Any]) -> str | None:
    """What is wrong with the optimizer's state, None if nothing is. One without momentum has none."""
    for state in saved["optimizer_states"]:
        if not isinstance(state, dict):
            continue
        if "param_groups" in state:
            remembers = any(group.get("betas") or group.get("momentum") for group in state["param_groups"])
            is_empty = not state.get("state")
        # Of a folder only names are known here, such as `param_groups.0.betas` and `state.<weight>.exp_avg`.
        else:
            remembers = any(str(name).endswith(".betas") for name in state)
            is_empty = not any(str(name).startswith("state.") for name in state)
        if remembers and is_empty and saved.get("global_step"):
            return f"its optimizer has no state after {saved['global_step']} steps"
    return None


def _deepspeed_problem(folder: Path, needed: Collection[str]) -> str | None:
    states = sorted((folder / "checkpoint").glob("*model_states.pt"))
    if not states:
        return "the folder holds no model states"
    names = names_in_pickle(states[0])
    # The optimizer's state lies in files of its own.
    missing = [key for key in needed if key not in names and key != "optimizer_states"]
    if missing:
        return f"it has no {missing[0]!r}"
    return _deepspeed_optimizer_problem(folder) if "optimizer_states" in needed else None


def _deepspeed_optimizer_problem(folder: Path) -> str | None:
    files = sorted((folder / "checkpoint").glob("*optim_states.pt"))
    if not files:
        return "it holds weights alone, of which no run can be continued"
    for file in files:
        names = names_in_pickle(file)
        # DeepSpeed gives Adam its averages before the first step.
        if "betas" in names and "exp_avg" not in names:
            return f"its optimizer has no state in {file.name}"
    return None
