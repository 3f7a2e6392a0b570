"""Writes the trained model as a Hugging Face folder when training ends."""

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from dmpo_lightning.checkpoints.export import PREFIX, refuse_other_weights, save_policy
from dmpo_lightning.distributed.sharding import plain_name, whole_weights
from dmpo_lightning.modules.base import PolicyModule


class SavePretrained(Callback):
    """At the end of fitting, under any strategy, writes model, configuration and tokenizer to a Hugging Face folder.

    It is a ``model`` like any other here. An ``AutoModelForMaskedLM.from_pretrained`` of transformers loads it too, if
    it is native after ``import dmpo_lightning.models``, and an adapter by PEFT on its base.

    Args:
        directory: created if need be. Files of the same names are replaced. One that holds weights of another kind, an
            adapter or a whole model, is refused at the start.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from dmpo_lightning import SavePretrained
        >>> trainer = Trainer(callbacks=[SavePretrained("trained")])
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(pl_module, PolicyModule):
            refuse_other_weights(self.directory, adapter=pl_module.policy.has_adapters)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, PolicyModule):
            return
        policy, first = pl_module.policy, trainer.is_global_zero
        # Gathering is a collective operation: all ranks take part, and one of them keeps the weights.
        held = {name.removeprefix(PREFIX) for name in pl_module.held_names()}
        weights = whole_weights(policy.model, names=held, keep=first)
        if first:
            save_policy(policy.model, policy.tokenizer, _stored_buffers(policy.model) | weights, self.directory)


def _stored_buffers(model: nn.Module) -> dict[str, Tensor]:
    """What files hold and nobody trains or divides, such as the biases of routers."""
    return {
        plain_name(f"{name}.{leaf}"): buffer.cpu()
        for name, module in model.named_modules()
        for leaf, buffer in module.named_buffers(recurse=False)
        if leaf not in module._non_persistent_buffers_set
    }
