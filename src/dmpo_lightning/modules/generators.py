"""The global generators of a process, of which a restart needs the states."""

import random
from typing import Any

import numpy as np
import torch


def generator_states() -> dict[str, Any]:
    """The global generators of this process, as tensors and primitives; those of reward workers are not among them.

    The package's own draws are keyed: only dropout, and rewards and data of the user's own, draw from these.
    """
    states: dict[str, Any] = {"cpu": torch.get_rng_state(), "python": random.getstate(), "numpy": _numpy_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_generators(states: dict[str, Any]) -> None:
    """Puts the generators back to where `generator_states` found them; those that it did not know of stay."""
    torch.set_rng_state(states["cpu"].cpu())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())
    if "python" in states:
        version, words, gauss = states["python"]
        random.setstate((version, tuple(words), gauss))
    if "numpy" in states:
        kind, words, *rest = states["numpy"]
        np.random.set_state((kind, words.cpu().numpy(), *rest))


def _numpy_state() -> tuple[str, torch.Tensor, int, int, float]:
    kind, words, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return str(kind), torch.from_numpy(np.asarray(words, dtype=np.int64)), int(position), int(has_gauss), float(gauss)
