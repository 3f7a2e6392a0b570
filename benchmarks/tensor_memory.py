"""Peak tensor memory of a piece of code on the CPU, storages counted once. Process memory is not looked at."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dmpo_lightning.planning.rehearsal import TensorMemory as _TensorMemory


class TensorMemory(_TensorMemory):
    """The measure that `dmpo-lightning plan` has, for runs with numbers. Tensors handed in count from the start."""

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        super().__init__()
        for tensor in tensors:
            self.count(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            self.count(leaf)
        return result

    @classmethod
    def of_training(cls, model: nn.Module, optimizer: torch.optim.Optimizer) -> "TensorMemory":
        """With weights, gradients and optimizer states counted from the start."""
        states = [value for state in optimizer.state.values() for value in state.values()]
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        return cls([*model.parameters(), *states, *gradients])
