"""Peak tensor memory of a piece of code on the CPU, storages counted once. Process memory is not looked at."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorMemory(TorchDispatchMode):
    """Counts the bytes of live storages: those handed in, and those that any operation makes while it is entered.

    torch's own `MemTracker` counts the same way, but cannot track a model with frozen parameters.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}
        for tensor in tensors:
            self._count(tensor)

    @classmethod
    def of_training(cls, model: nn.Module, optimizer: torch.optim.Optimizer) -> "TensorMemory":
        """With weights, gradients and optimizer states counted from the start."""
        states = [value for state in optimizer.state.values() for value in state.values()]
        gradients = [parameter.grad for parameter in model.parameters()]
        return cls([*model.parameters(), *states, *gradients])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            self._count(leaf)
        return result

    def _count(self, value: object) -> None:
        if not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known and self._known[key]() is not None:
            return
        self.live += size
        self.peak = max(self.peak, self.live)
        self._known[key] = weakref.ref(storage, lambda _: self._free(key, size))

    def _free(self, key: int, size: int) -> None:
        self.live -= size
        self._known.pop(key, None)
