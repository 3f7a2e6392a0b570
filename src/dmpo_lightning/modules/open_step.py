"""Checkpoints between two optimizer steps: gradients that are being accumulated are in none, so these are rewound."""

from dataclasses import dataclass
from typing import Any


@dataclass
class OpenStep:
    """The optimizer step that is being accumulated."""

    step: int
    """Optimizer steps taken before it."""
    generators: dict[str, Any]
    """As its first micro-batch found them."""
    collected: bool
    """Whether its first micro-batch collected a buffer."""
    micro_batches: int = 0


def rewind_loops(loops: dict[str, Any], micro_batches: int) -> None:
    """Takes the last training batches back in Lightning's progress and in the loaders' states."""
    fit = loops["fit_loop"]
    batches = fit["epoch_loop.batch_progress"]
    for progress in (batches["total"], batches["current"]):
        for name in progress:
            progress[name] -= micro_batches
    if batches["current"]["ready"] == 0:  # of an epoch that has not begun no batch waits for its completion
        batches["total"]["completed"], batches["current"]["completed"] = batches["total"]["ready"], 0
    batches["is_last_batch"] = False
    for state in fit["state_dict"].get("combined_loader", []):
        state["handed_out"] -= micro_batches
        state["epoch"] -= state["handed_out"] == 0  # a loader that has handed out nothing starts the next epoch
