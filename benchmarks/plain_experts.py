"""A mixture of experts run as published: a loop over all of them, each with weights of its own."""

from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmpo_lightning.models.mixture import Experts, MixtureMLP


class LoopedExperts(nn.Module):
    """What `Experts` computes, in the two ways of LLaDA2's published code, by mode.

    In training each expert looks for its tokens among all; otherwise they are sorted, and experts without any are left
    out.
    """

    def __init__(self, stacked: Experts) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.ModuleList(_linear(each) for each in (*gate_up.chunk(2), down))
            for gate_up, down in zip(stacked.gate_up_proj.data, stacked.down_proj.data, strict=True)
        )

    def forward(self, h: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """See `Experts.forward`."""
        said = self._of_all(h, chosen) if self.training else self._of_called(h, chosen)
        return (said.view(*chosen.shape, -1) * weights[..., None]).sum(1).to(h.dtype)

    def _of_all(self, h: Tensor, chosen: Tensor) -> Tensor:
        rows, experts = h.repeat_interleave(chosen.shape[1], 0), chosen.flatten()
        said = torch.empty_like(rows)
        for number, expert in enumerate(self.experts):
            said[experts == number] = _said(expert, rows[experts == number])
        return said

    def _of_called(self, h: Tensor, chosen: Tensor) -> Tensor:
        counts = chosen.new_zeros(len(chosen), len(self.experts)).scatter_(1, chosen, 1).sum(0).tolist()
        order = chosen.flatten().argsort()
        runs = h[order // chosen.shape[1]].split(counts)
        by_expert = [_said(expert, run) for expert, run in zip(self.experts, runs, strict=True) if len(run)]
        said = torch.empty(len(order), h.shape[1], dtype=h.dtype)
        said[order] = torch.cat(by_expert)
        return said


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.clone())
    return layer


def _said(expert: nn.ModuleList, rows: Tensor) -> Tensor:
    gate, up, down = expert
    return down(F.silu(gate(rows)) * up(rows))


def with_loops(model: nn.Module) -> nn.Module:
    """A copy of a model, whose experts, if it has any, are run as published."""
    looped = deepcopy(model)
    for module in looped.modules():
        if isinstance(module, MixtureMLP):
            module.experts = LoopedExperts(module.experts)
    return looped.train(model.training)
