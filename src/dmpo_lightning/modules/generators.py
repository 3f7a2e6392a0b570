"""The global generators of a process, of which a restart needs the states."""

import random
from typing import Any

import numpy as np
import torch


def generator_states() -> dict[str, Any]:
    """The states of this process's global generators, as tensors and primitives.

    The package's own draws are keyed. Only dropout, and rewards and data of the user's own, draw from these generators.
    Those of reward workers are other processes' and not among them.
    """
    states: dict[str, Any] = {"cpu": torch.get_rng_state(), "python": random.getstate(), "numpy": _numpy_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_generators(states: dict[str, Any]) -> None:
    """Puts the generators back to where `generator_states` found them. One that it has no state of stays as it is."""
    torch.set_rng_state(states["cpu"].cpu())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())
    if "python" in states:
        version, numbers, gauss = states["python"]
        random.setstate((version, tuple(numbers), gauss))
    if "numpy" in states:
        name, numbers, *rest = states["numpy"]
        np.random.set_state((name, numbers.cpu().numpy(), *rest))


def _numpy_state() -> tuple[str, torch.Tensor, int, int, float]:
    name, numbers, position, has_gauss, gauss = np.random.get_state(legacy=True)
    whole = torch.from_numpy(np.asarray(numbers, dtype=np.int64))
    return str(name), whole, int(position), int(has_gauss), float(gauss)
