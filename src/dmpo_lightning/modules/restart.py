"""What a restart needs of each rank besides weights and counters."""

from typing import Any

import torch


def gather_ranks(state: dict[str, Any]) -> list[dict[str, Any]]:
    """The state of every rank, in order, on every rank."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [state]
    states: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(states, state)
    return states


def generator_states() -> dict[str, torch.Tensor]:
    """Torch's generators of this process; only dropout draws from them, everything else is keyed."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_generators(states: dict[str, torch.Tensor]) -> None:
    """Puts the generators back to where `generator_states` found them."""
    torch.set_rng_state(states["cpu"].cpu())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())
