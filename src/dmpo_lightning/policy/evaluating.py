"""The mode in which completions are sampled and scored."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside, there is eval mode and no gradient, as completions are sampled and scored. Each submodule's own mode is
    restored behind it.
    """
    # `train()` afterwards would put every submodule into training mode, those that were in eval mode before as well.
    modes = {submodule: submodule.training for submodule in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for submodule, mode in modes.items():
            submodule.training = mode
