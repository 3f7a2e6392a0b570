"""A DMPO run small enough for tests: random weights of the embedded architecture, a reward that any text can earn."""

from dataclasses import fields
from importlib import import_module
from pathlib import Path

import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from dmpo_lightning import DMPO, WDCE, Backbone, ConfidenceSampler, PromptLoader, load_tokenizer

TOKENIZER = load_tokenizer("sudoku_tiny")
PROMPTS = [{"prompt": f"{i:04d}", "digit": str(i % 10)} for i in range(6)]


def digit_share(example, completion):
    return sum(character.isdigit() for character in completion) / 8 + completion.count(example["digit"])


def module(**options) -> DMPO:
    defaults = {
        "validation_samplers": {
            "sampled": ConfidenceSampler(denoising_steps=4),
            "greedy": ConfidenceSampler(temperature=0.0),
        },
        "num_iterations": 2,
        "random_weights": True,
    }
    return small_dmpo("sudoku_tiny", **{**defaults, **options})


def small_dmpo(model, **options) -> DMPO:
    """Of any model: few rollouts, short completions, and steps long enough to be seen."""
    defaults = {
        "objective": WDCE(reward_temperature=0.1, replicates=2),
        "sampler": ConfidenceSampler(denoising_steps=4),
        "completion_length": 8,
        "group_size": 4,
        "micro_batch_size": 4,
        "reward": digit_share,
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    }
    return dmpo_of(model, **{**defaults, **options})


def dmpo_of(model, **options) -> DMPO:
    """Options of a `Backbone` and of `DMPO` together."""
    own = {field.name: options.pop(field.name) for field in fields(Backbone) if field.name in options}
    return DMPO(Backbone(model, **own), **options)


def overlay_options(path: Path) -> dict:
    """The objective of an overlay, with two passes over a buffer at most, and its sampler's order in small."""
    options = yaml.safe_load(path.read_text())["model"]["init_args"]
    module_name, name = options["objective"]["class_path"].rsplit(".", 1)
    objective = getattr(import_module(module_name), name)(**options["objective"].get("init_args", {}))
    return {
        "objective": objective,
        "sampler": ConfidenceSampler(**options["sampler"]["init_args"] | {"denoising_steps": None}),
        "num_iterations": min(2, options.get("num_iterations", 2)),
    }


def loader(batch_size: int = 2, **options) -> PromptLoader:
    return PromptLoader(PROMPTS, TOKENIZER, batch_size=batch_size, **options)


def trainer(tmp_path, **options) -> Trainer:
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": tmp_path,
    }
    return Trainer(**{**defaults, **options})


class Recorder(Callback):
    """Losses, learning rates and prompts, batch by batch, as they really happened."""

    def __init__(self):
        self.losses, self.learning_rates, self.prompts, self.gradient_norms, self.validated_at = [], [], [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())
        self.prompts.append(batch.prompt_index.tolist())
        self.learning_rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = [p.grad.norm() for p in pl_module.parameters() if p.grad is not None]
        if gradients:  # DeepSpeed hides them
            self.gradient_norms.append(torch.stack(gradients).norm().item())

    def on_validation_start(self, trainer, pl_module):
        self.validated_at.append(trainer.global_step)


class SaveAt(Callback):
    """At the end of the training batch of this number, over all epochs, also of one without an optimizer step."""

    def __init__(self, number, path):
        self.number, self.path = number, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx == self.number:
            trainer.save_checkpoint(self.path)


def weights(module: DMPO) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.policy.model.parameters()])
