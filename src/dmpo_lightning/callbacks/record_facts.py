"""What a run is, for ``run.json``: what was trained on what, by which versions."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from dmpo_lightning.callbacks.config import ConfigInCheckpoint
from dmpo_lightning.callbacks.evaluation_report import task_facts
from dmpo_lightning.callbacks.run_facts import parameter_counts
from dmpo_lightning.data.prompts import PromptLoader
from dmpo_lightning.distributed.internals import callbacks_of
from dmpo_lightning.modules.base import PolicyModule

PACKAGES = ("dmpo-lightning", "torch", "lightning", "transformers", "peft", "numpy")


def versions() -> dict[str, str]:
    """What computed the run."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        # Run from its source, or left out.
        except PackageNotFoundError:
            continue
    return found


def run_facts(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """Everything but times, in JSON's types. What is not known is left out."""
    data: Any = getattr(trainer, "datamodule", None)
    task = {name: fact for name, fact in task_facts(data).items() if fact is not None}
    configurations = [each.plain_config for each in callbacks_of(trainer, ConfigInCheckpoint)]
    total, trained = parameter_counts(module)
    return {
        "module": type(module).__name__,
        **_model(module),
        "parameters": total,
        "trained": trained,
        "data": {} if data is None else {"datamodule": type(data).__name__} | task,
        "prompts": _sizes(trainer),
        "ranks": trainer.world_size,
        "strategy": type(trainer.strategy).__name__,
        "device": trainer.strategy.root_device.type,
        "precision": str(trainer.precision),
        "versions": versions(),
        "configuration": configurations[0] if configurations else None,
    }


def _model(module: LightningModule) -> dict[str, Any]:
    if not isinstance(module, PolicyModule):
        return {}
    return {"model": module.backbone.to_plain().get("model"), "seed": module.seed}


def _sizes(trainer: Trainer) -> dict[str, int]:
    """Prompts of each split that has been loaded."""
    sizes: dict[str, int] = {}
    for split, loaders in (("train", trainer.train_dataloader), ("validation", trainer.val_dataloaders)):
        each = loaders if isinstance(loaders, list | tuple) else [loaders]
        count = sum(len(loader.kept) for loader in each if isinstance(loader, PromptLoader))
        if count:
            sizes[split] = count
    return sizes
