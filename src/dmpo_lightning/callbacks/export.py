"""Writes the trained model as a Hugging Face folder."""

from lightning.pytorch import Callback, LightningModule, Trainer

from dmpo_lightning.modules.base import PolicyModule


class SavePretrained(Callback):
    """At the end of fitting, writes model, configuration and tokenizer to a folder that ``from_pretrained`` loads.

    Args:
        directory: created if need be; files of the same names are replaced.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and isinstance(pl_module, PolicyModule):
            pl_module.policy.model.save_pretrained(self.directory)
            pl_module.policy.tokenizer.save_pretrained(self.directory)
