"""Peak tensor memory of a piece of code on the CPU, storages counted once. Process memory is not looked at."""

import torch
from torch import nn

from dmpo_lightning.planning.rehearsal import TensorMemory as _TensorMemory


class TensorMemory(_TensorMemory):
    """The measure that `dmpo-lightning plan` has, for runs with numbers."""

    @classmethod
    def of_training(cls, model: nn.Module, optimizer: torch.optim.Optimizer) -> "TensorMemory":
        """With weights, gradients and optimizer states counted from the start."""
        states = [value for state in optimizer.state.values() for value in state.values()]
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        return cls([*model.parameters(), *states, *gradients])
