"""The command line's configuration in every checkpoint, and what of it a resumed run does otherwise."""

import json
from functools import cached_property
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from dmpo_lightning.modules.options import differences, differences_text
from dmpo_lightning.modules.run_directory import run_directory
from dmpo_lightning.reports.lines import set_aside

KEY = "cli_config"

RESULT_KEYS = (
    *("precision", "plugins", "deterministic", "sync_batchnorm", "accumulate_grad_batches", "gradient_clip_val"),
    *("gradient_clip_algorithm", "limit_train_batches", "overfit_batches", "reload_dataloaders_every_n_epochs"),
    "use_distributed_sampler",
)
"""Options of the Trainer that change what is trained. The others say how long, how often, on what and where to."""


class ConfigInCheckpoint(SaveConfigCallback):
    """Writes the configuration to the run directory, as Lightning does, and into every checkpoint.

    ``fit`` with a checkpoint warns of every key of ``model`` and ``data``, of `RESULT_KEYS` of ``trainer``, and of
    ``seed_everything`` that has another value than in the run that wrote it. This run's are used.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """As Lightning does it, but for its folder, which the runs of some loggers share."""
        # On all ranks, because it is a broadcast.
        directory = run_directory(trainer)
        if not self.already_saved and trainer.is_global_zero:
            directory.mkdir(parents=True, exist_ok=True)
            path = directory / self.config_filename
            # Of an earlier part of this run, which was configured otherwise. An empty file keeps the place of a run.
            if path.is_file() and path.read_text() not in ("", self.parser.dump(self.config, skip_none=False)):
                set_aside(path)
            self.parser.save(self.config, str(path), skip_none=False, overwrite=True, multifile=self.multifile)
        self.already_saved = True

    @cached_property
    def plain_config(self) -> dict[str, Any]:
        """The configuration in JSON's types, which ``torch.load(weights_only=True)`` reads."""
        return json.loads(self.parser.dump(self.config, format="json"))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Puts the configuration beside the states of callbacks, not among them: Lightning asks whoever loads those for
        the same callbacks.
        """
        checkpoint[KEY] = self.plain_config

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING or KEY not in checkpoint:
            return
        if differing := differences(compared(checkpoint[KEY]), compared(self.plain_config)):
            rank_zero_warn(
                "The checkpoint was written with another configuration; this run's is used (stored -> now):\n"
                + differences_text(differing)
            )


def compared(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a configuration that changes what is trained."""
    trainer = config.get("trainer") or {}
    return {name: config.get(name) for name in ("seed_everything", "model", "data")} | {
        "trainer": {name: trainer.get(name) for name in RESULT_KEYS}
    }
