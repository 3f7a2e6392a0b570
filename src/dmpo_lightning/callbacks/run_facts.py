"""What is told of a run in words: its model, its length, its validations."""

import math
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from dmpo_lightning.callbacks.progress_text import number
from dmpo_lightning.modules.base import PolicyModule
from dmpo_lightning.modules.evaluation import EvaluationModule


def model_line(trainer: Trainer, module: LightningModule) -> str:
    """The model with its size, the part of it that is trained, and where it runs."""
    name = module.backbone.to_plain()["model"] if isinstance(module, PolicyModule) else type(module).__name__
    total, trained = parameter_counts(module)
    share = "all trained" if trained == total else f"{_millions(trained)} of them trained"
    device = trainer.strategy.root_device.type
    where = f"{device}, {trainer.world_size} rank{'s' * (trainer.world_size > 1)}"
    seed = f", seed {module.seed}" if isinstance(module, PolicyModule) else ""
    return f"Model {name}: {_millions(total)} parameters, {share}; {where}{seed}."


def parameter_counts(module: LightningModule) -> tuple[int, int]:
    """The parameters of the model, without the reference's own copy, and how many of them are trained."""
    network: nn.Module = module.policy.model if isinstance(module, PolicyModule) else module
    counts = [(_count(each), each.requires_grad) for each in network.parameters()]
    return sum(count for count, _ in counts), sum(count for count, is_trained in counts if is_trained)


def total_steps(trainer: Trainer) -> int | None:
    """Optimizer steps of the whole run, None without an end."""
    limits = []
    if trainer.max_steps >= 0:
        limits.append(trainer.max_steps)
    batches = trainer.num_training_batches
    if trainer.max_epochs is not None and trainer.max_epochs >= 0 and math.isfinite(batches):
        # The Trainer ends an epoch with an optimizer step, whatever is accumulated by then.
        limits.append(trainer.max_epochs * math.ceil(batches / trainer.accumulate_grad_batches))
    return min(limits, default=None)


def first_accuracy(module: LightningModule) -> float | None:
    """That of the last evaluation, by the sampler that is configured first."""
    results = module.results if isinstance(module, EvaluationModule) else []
    return results[0].means["accuracy"][0] if results and "accuracy" in results[0].means else None


def validation_line(trainer: Trainer, module: LightningModule) -> str:
    """The accuracy of each sampler and length, or what else a module has logged of its validation."""
    if isinstance(module, EvaluationModule):
        accuracies = [(each, each.means["accuracy"]) for each in module.results if "accuracy" in each.means]
        several = len({each.length for each, _ in accuracies}) > 1
        names = [f"{each.sampler}/{each.length}" if several else each.sampler for each, _ in accuracies]
        parts = [
            f"{name} {mean:.3f} +- {error:.3f}" for name, (_, (mean, error)) in zip(names, accuracies, strict=True)
        ]
        return f"accuracy {', '.join(parts)}"
    logged: dict[str, Any] = dict(trainer.callback_metrics)
    return ", ".join(f"{name} {number(float(value))}" for name, value in logged.items() if name.startswith("val/"))


def _count(parameter: nn.Parameter) -> int:
    """Its numbers, also where ZeRO-3 has divided it or 4-bit quantisation has packed it."""
    whole = getattr(parameter, "ds_numel", None)
    packed = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return int(whole) if whole is not None else math.prod(packed) if packed is not None else parameter.numel()


def _millions(count: int) -> str:
    return f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.3g} M"
