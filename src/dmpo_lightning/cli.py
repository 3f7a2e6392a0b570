"""The Lightning CLI of DMPO: model and data by class, tokenizer and seed filled in from the rest of the
configuration.
"""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from dmpo_lightning.modules.base import PolicyModule


class DMPOCLI(LightningCLI):
    """``fit``, ``validate``, ``test`` and ``predict`` for a `PolicyModule` and any datamodule, both named in the
    configuration.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments(
            ("model.init_args.model", "model.init_args.tokenizer"),
            "data.init_args.tokenizer",
            compute_fn=_tokenizer_source,
        )
        parser.link_arguments("seed_everything", "model.init_args.seed", compute_fn=int)


def _tokenizer_source(model: Any, tokenizer: Any) -> Any:
    return tokenizer if tokenizer is not None else model


def run(arguments: Sequence[str]) -> None:
    """Parses and runs; exits with status 2 and a message on bad configurations."""
    DMPOCLI(
        PolicyModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        save_config_kwargs={"overwrite": True},
        args=list(arguments),
    )
