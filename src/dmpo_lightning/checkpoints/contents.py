"""Whether a checkpoint that can be read holds what a run needs of it."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

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
        # Folders hold no list of options that could be looked into.
        groups = state.get("param_groups") if isinstance(state, dict) and "state" in state else None
        remembers = any(group.get("betas") or group.get("momentum") for group in groups or ())
        if remembers and not state["state"] and saved.get("global_step"):
            return f"its optimizer has no state after {saved['global_step']} steps"
    return None


def _deepspeed_problem(folder: Path, needed: Collection[str]) -> str | None:
    states = sorted((folder / "checkpoint").glob("*model_states.pt"))
    if not states:
        return "the folder holds no model states"
    names = names_in_pickle(states[0])
    # The optimizer's state lies in files of its own.
    missing = [key for key in needed if key not in names and key != "optimizer_states"]
    return f"it has no {missing[0]!r}" if missing else None
