"""Which experts of a mixture the tokens go to."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dmpo_lightning.models.mixture import Router


@contextmanager
def expert_load(network: nn.Module) -> Iterator[list[Int[Tensor, " experts"]]]:
    """Inside, counts how many tokens each expert gets: a tensor for each router of the network, none without routers.

    Padding counts as it is computed, and a token in each forward that it goes through.
    """
    routers = [module for module in network.modules() if isinstance(module, Router)]
    loads = [torch.zeros(router.num_experts, dtype=torch.int64) for router in routers]

    def count(number: int, chosen: Tensor) -> None:
        loads[number] = (
            loads[number].to(chosen.device).index_add(0, chosen.flatten(), torch.ones_like(chosen.flatten()))
        )

    hooks = [
        router.register_forward_hook(lambda _router, _given, routed, number=number: count(number, routed[0]))
        for number, router in enumerate(routers)
    ]
    try:
        yield loads
    finally:
        for hook in hooks:
            hook.remove()


def routing_values(loads: Sequence[Int[Tensor, " experts"]]) -> dict[str, Float[Tensor, "1"]]:
    """What is logged of the loads of all layers, see docs/metrics.md. Nothing where no token was routed."""
    shares = [load / load.sum() for load in loads if load.any()]
    if not shares:
        return {}
    entropies = torch.stack([torch.special.entr(share).sum() / torch.tensor(len(share)).log() for share in shares])
    return {
        "routing/entropy": entropies.mean()[None],
        "routing/lowest_entropy": entropies.min()[None],
        "routing/busiest_expert": torch.stack([share.max() for share in shares]).max()[None],
    }
