"""What a run is: what is trained on what, where, by which versions, and with which configuration."""

import json
import math
import platform
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from dmpo_lightning.data.mixture import MixtureDataModule
from dmpo_lightning.data.prompts import PromptLoader
from dmpo_lightning.distributed.internals import callbacks_of
from dmpo_lightning.modules.base import PolicyModule
from dmpo_lightning.modules.options import differences, differences_text
from dmpo_lightning.modules.run_directory import run_directory
from dmpo_lightning.reports.lines import set_aside
from dmpo_lightning.tasks.base import FACTS, Task

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
        # Beside the states of callbacks, not among them: Lightning asks whoever loads those for the same callbacks.
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


def model_line(trainer: Trainer, module: LightningModule) -> str:
    """The model with its size, the part of it that is trained, and where it runs."""
    name = module.backbone.to_plain()["model"] if isinstance(module, PolicyModule) else type(module).__name__
    total, trained = (f"{count / 1e6:,.4g} M" for count in parameter_counts(module))
    share = "all trained" if trained == total else f"{trained} of them trained"
    where, ranks, threads = trainer.strategy.root_device.type, trainer.world_size, torch.get_num_threads()
    where += f", {threads} thread{'s' * (threads > 1)}" * (where == "cpu") + f", {ranks} ranks" * (ranks > 1)
    seed = f", seed {module.seed}" if isinstance(module, PolicyModule) else ""
    return f"Model {name}: {total} parameters, {share}; {where}{seed}."


def parameter_counts(module: LightningModule) -> tuple[int, int]:
    """The parameters of the model, without the reference's own copy, and how many of them are trained."""
    network: nn.Module = module.policy.model if isinstance(module, PolicyModule) else module
    counts = [(_count(each), each.requires_grad) for each in network.parameters()]
    return sum(count for count, _ in counts), sum(count for count, is_trained in counts if is_trained)


def run_facts(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """Everything but times, in JSON's types. What is not known is left out."""
    data: Any = getattr(trainer, "datamodule", None)
    task = {name: fact for name, fact in task_facts(data).items() if fact is not None}
    configurations = [each.plain_config for each in callbacks_of(trainer, ConfigInCheckpoint)]
    total, trained = parameter_counts(module)
    policy: dict[str, Any] = {}
    if isinstance(module, PolicyModule):
        policy = {"model": module.backbone.to_plain().get("model"), "seed": module.seed}
    return {
        "module": type(module).__name__,
        **policy,
        "parameters": total,
        "trained": trained,
        "data": {} if data is None else {"datamodule": type(data).__name__} | task,
        "prompts": split_sizes(trainer),
        "ranks": trainer.world_size,
        "strategy": type(trainer.strategy).__name__,
        "device": trainer.strategy.root_device.type,
        "precision": str(trainer.precision),
        "versions": versions(),
        "configuration": configurations[0] if configurations else None,
    }


def task_facts(datamodule: Any) -> dict[str, Any]:
    """What the task of a datamodule states about itself, or each task of a mixture by its name.

    The facts of data without a task are all None.
    """
    if isinstance(datamodule, MixtureDataModule):
        each = {name: part.task.facts() for name, part in datamodule.datamodules.items()}
        return {
            fact: {name: facts.get(fact) for name, facts in each.items()}
            for fact in dict.fromkeys((*FACTS, *(fact for facts in each.values() for fact in facts)))
        }
    task = getattr(datamodule, "task", None)
    return dict.fromkeys(FACTS) | (task.facts() if isinstance(task, Task) else {})


def versions() -> dict[str, str]:
    """What computed the run."""
    found = {"python": platform.python_version()}
    for package in ("dmpo-lightning", "torch", "lightning", "transformers", "peft", "numpy"):
        # It may be run from its source, or left out.
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def named_means(means: Mapping[str, tuple[float, float]]) -> dict[str, dict[str, float]]:
    """Means and their standard errors as JSON has them."""
    return {name: {"mean": mean, "standard_error": error} for name, (mean, error) in means.items()}


def split_sizes(trainer: Trainer) -> dict[str, int]:
    """Prompts of each split that has been loaded."""
    sizes: dict[str, int] = {}
    for split, loaders in (("train", trainer.train_dataloader), ("validation", trainer.val_dataloaders)):
        each = loaders if isinstance(loaders, list | tuple) else [loaders]
        count = sum(len(loader.kept) for loader in each if isinstance(loader, PromptLoader))
        if count:
            sizes[split] = count
    return sizes


def _count(parameter: nn.Parameter) -> int:
    """Its numbers, also where ZeRO-3 has divided it or 4-bit quantisation has packed it."""
    whole = getattr(parameter, "ds_numel", None)
    packed = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return int(whole) if whole is not None else math.prod(packed) if packed is not None else parameter.numel()
