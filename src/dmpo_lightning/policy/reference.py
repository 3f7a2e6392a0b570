"""The reference policy: what the reward tilts and log_rnd is measured from."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dmpo_lightning.distributed.sharding import copy_weights, copy_within, own_part, plain_name, write_part

ADAPTER = "reference"
"""Name of the frozen adapter that a refreshed reference lives in."""


class ReferencePolicy(nn.Module):
    """The frozen policy beside a network that is trained.

    It takes one of three forms. A network with PEFT adapters is its own reference while its adapters are switched off.
    Once refreshed, that reference is a second, frozen adapter of the same network, named ``reference``. A network
    without adapters has a frozen copy, which is ``model`` here.

    The network itself is an argument of each method and no part of this module. It would otherwise be saved twice, and
    strategies that wrap the network would leave this module with the unwrapped one.

    Args:
        network: the network that is trained.
        exists: False makes no copy, where no reference is needed.
    """

    def __init__(self, network: nn.Module, *, exists: bool = True) -> None:
        super().__init__()
        self.exists = exists
        self.is_adapter = hasattr(network, "peft_config")
        self.is_refreshed = False
        self.model: nn.Module | None = None
        if exists and not self.is_adapter:
            self.model = copy.deepcopy(network).requires_grad_(False).eval()
        self._equal_versions: tuple[int, ...] | None = None

    def train(self, mode: bool = True) -> "ReferencePolicy":
        """Stays in eval mode, always."""
        return super().train(False)

    @contextmanager
    def of(self, network: Any) -> Iterator[Any]:
        """Inside, the model to call for the reference's predictions.

        Raises:
            ValueError: there is no reference.
        """
        if self.model is not None:
            yield self.model
        elif not self.is_adapter:
            raise ValueError("This policy was built without a reference; construct it with with_reference=True.")
        elif self.is_refreshed:
            trained = network.active_adapter
            # Without `inference_mode` PEFT would make the frozen adapter trainable.
            with _kept_frozen(network):
                network.set_adapter(ADAPTER, inference_mode=True)
                try:
                    yield network
                finally:
                    network.set_adapter(trained)
        else:
            with _kept_frozen(network), network.disable_adapter():
                yield network

    @torch.no_grad()
    def refresh(self, network: Any) -> None:
        """Becomes the network as it is now."""
        if self.model is not None:
            copy_weights(network, self.model)
        elif self.is_adapter:
            self.make_room(network)
            # PEFT writes an adapter's name into the names of its weights, so that the pairs are found by their names.
            trained = f".{network.active_adapter}."
            copies = [name for name in _plain_names(network) if f".{ADAPTER}." in name]
            copy_within(network, {name.replace(f".{ADAPTER}.", trained): name for name in copies})
        self.is_refreshed = True
        self._equal_versions = self._versions(network)

    def make_room(self, network: Any) -> None:
        """Adds the frozen adapter that `refresh` writes to, which strategies that divide weights must see beforehand.

        Until it is written to, the reference is the network with its adapters off.
        """
        if self.has_room(network):
            return
        trained = network.active_adapter
        # PEFT draws the adapter's first weights. That must not move the generator that the run's dropout draws from.
        with torch.random.fork_rng(devices=[]), _kept_frozen(network):
            network.add_adapter(ADAPTER, copy.deepcopy(network.peft_config[trained]))
            network.set_adapter(trained)
        for name, parameter in network.named_parameters():
            if f".{ADAPTER}." in name:
                parameter.requires_grad_(False)

    def has_room(self, network: Any) -> bool:
        """Whether there is a copy, or an adapter, that `refresh` would write to, or no reference at all."""
        return not self.is_adapter or ADAPTER in network.peft_config

    def equals(self, network: nn.Module) -> bool:
        """Whether the reference is known to equal the network: it was refreshed, no update was announced since, and no
        weight of either was written.
        """
        return self._equal_versions is not None and self._equal_versions == self._versions(network)

    def announce_update(self) -> None:
        """Called before the network is changed. The reference may differ from it from now on."""
        self._equal_versions = None

    def _versions(self, network: nn.Module) -> tuple[int, ...]:
        # Torch counts the in-place writes to each tensor. A write that nobody announced, such as a user's own callback
        # or an averaging of weights, would otherwise leave log_rnd at zero without a word.
        return tuple(parameter._version for parameter in (*network.parameters(), *self.parameters()))

    def parameter_names(self, network: nn.Module) -> list[str]:
        """Names, within the `Policy`, of the parameters that belong to the reference alone."""
        own = [f"reference.model.{name}" for name in _plain_names(self.model)] if self.model is not None else []
        return own or [f"model.{name}" for name in _plain_names(network) if f".{ADAPTER}." in name]

    def parts(self, network: nn.Module) -> dict[str, Tensor]:
        """What this rank holds of those parameters, copied to the CPU. Needed under ZeRO-3, which saves no frozen
        weights.
        """
        return {name: own_part(weight).cpu().clone() for name, weight in self._weights(network).items()}

    @torch.no_grad()
    def put_parts(self, network: nn.Module, parts: Mapping[str, Tensor]) -> None:
        """Writes what `parts` returned."""
        weights = self._weights(network)
        for name, part in parts.items():
            write_part(weights[name], part)

    def _weights(self, network: nn.Module) -> dict[str, nn.Parameter]:
        every = {f"model.{plain_name(name)}": weight for name, weight in network.named_parameters()}
        every |= {f"reference.{plain_name(name)}": weight for name, weight in self.named_parameters()}
        return {name: every[name] for name in self.parameter_names(network)}


@contextmanager
def _kept_frozen(network: nn.Module) -> Iterator[None]:
    """What is frozen and trained stays so. PEFT makes each adapter trainable that it switches on, frozen parts too."""
    flags = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)


def _plain_names(module: nn.Module) -> list[str]:
    return [plain_name(name) for name, _ in module.named_parameters()]
