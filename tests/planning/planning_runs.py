"""Small training steps for the planner to predict, and samplers and objectives of somebody else for it to ask."""

from collections.abc import Callable

import torch
from benchmarks.tensor_memory import TensorMemory
from torch import nn
from transformers import AutoModelForMaskedLM, PreTrainedConfig

from dmpo_lightning.functional import denoising_cross_entropy, draw_masks
from dmpo_lightning.models.llada import LLaDAConfig
from dmpo_lightning.models.loading import load_tokenizer
from dmpo_lightning.models.parts import enable_checkpointing
from dmpo_lightning.objectives import LogProbEstimator, MaskedPass, Objective, ObjectiveFootprint
from dmpo_lightning.planning import Memory, Settings, Sharding, Workload, estimate_memory
from dmpo_lightning.planning.parameters import describe
from dmpo_lightning.policy import Policy, evaluating
from dmpo_lightning.samplers import Sampler
from dmpo_lightning.schedule import Schedule

ROWS, PROMPT, LENGTH, REPLICATES = 4, 16, 32, 4
SIZES = {"small": (128, 4, 2048), "large": (256, 6, 8192), "of a GPU": (512, 8, 32768)}
"""Width, blocks, vocabulary."""


def small_config(size: str, **changes) -> LLaDAConfig:
    width, blocks, vocab_size = SIZES[size]
    settings = {
        "d_model": width,
        "n_layers": blocks,
        "n_heads": width // 32,
        "mlp_hidden_size": 3 * width,
        "vocab_size": vocab_size,
        "max_sequence_length": 64,
        "mask_token_id": 5,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    return LLaDAConfig(**(settings | changes))


def small_settings(**changes) -> Settings:
    """Full fine-tuning in float32 on one CPU, two micro-batches per step."""
    accumulation, rows = changes.pop("accumulation", 2), changes.pop("rows", ROWS)
    work = Workload(
        prompt_length=PROMPT,
        completion_length=LENGTH,
        schedule=Schedule(
            group_size=rows, prompts_per_buffer=1, micro_batch_size=rows, accumulation=accumulation, ranks=1
        ),
        objective=ObjectiveFootprint(training=MaskedPass.over(LENGTH, replicates=REPLICATES)),
    )
    settings = {
        "model": "small",
        "dtype": "float32",
        "random_weights": False,
        "adapter": None,
        "quantization": None,
        "gradient_checkpointing": False,
        "precision": None,
        "strategy": "auto",
        "devices": 1,
        "nodes": 1,
        "on_cpu": True,
        "optimizer": "torch.optim.AdamW",
        "momentum": 0.0,
        "reference_copy": False,
        "reference_refreshed": False,
        "workload": work,
    }
    return Settings(**(settings | changes))


def predicted(config: PreTrainedConfig, settings: Settings, sharding: Sharding | None = None) -> Memory:
    architecture = describe(config, name="small", dtype=settings.dtype)
    return estimate_memory(settings, architecture, sharding or Sharding("single device"))


class SmallRun:
    """One optimizer step of DMPO's loss as Lightning runs it: gradients are dropped after the first forward."""

    def __init__(
        self,
        config: PreTrainedConfig,
        settings: Settings,
        *,
        model: nn.Module | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.settings, self.rows = settings, settings.workload.schedule.group_size
        with torch.device(device):
            self.model: nn.Module = (_small_model(config, settings) if model is None else model).train()
        self.policy = Policy(self.model, load_tokenizer("sudoku_tiny"), with_reference=False)
        if settings.precision == "bf16-true":
            self.policy.to(torch.bfloat16)
        self.policy.to(device)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad])
        self.prompt = torch.randint(6, 20, (self.rows, PROMPT), device=device)
        self.completion = torch.randint(6, 20, (self.rows, LENGTH), device=device)
        self.keys = torch.arange(self.rows, device=device)
        self.blocks = self.policy.completion_blocks(torch.ones_like(self.prompt, dtype=torch.bool), self.completion)
        self.masks = draw_masks(self.keys, length=LENGTH, replicates=REPLICATES, blocks=self.blocks)

    def micro_batch(self, *, is_first: bool) -> None:
        mask = torch.ones_like(self.prompt, dtype=torch.bool)
        with torch.autocast(self.prompt.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16-mixed"):
            log_probs = self.policy.completion_log_probs(self.prompt, mask, self.completion, self.masks)
            loss = denoising_cross_entropy(log_probs, self.masks, blocks=self.blocks).mean()
        del log_probs
        if is_first:
            self.optimizer.zero_grad()
        loss.backward()

    def step(self) -> None:
        for number in range(self.settings.workload.schedule.accumulation):
            self.micro_batch(is_first=number == 0)
        self.optimizer.step()

    def measured_peak(self) -> int:
        """Bytes at the worst moment of a step, optimizer states already there."""
        self.step()
        memory = TensorMemory.of_training(self.model, self.optimizer)
        with memory:
            self.step()
        return memory.peak

    def measured_sampling(self, sampler: Sampler) -> int:
        """Bytes that sampling takes beside the weights."""
        return self._beside_weights(lambda: self.sample(sampler))

    def measured_scoring(self) -> int:
        """Bytes that an ELBO of all rows takes beside the weights."""
        return self._beside_weights(self.score)

    def sample(self, sampler: Sampler) -> None:
        mask = torch.ones_like(self.prompt, dtype=torch.bool)
        with evaluating(self.policy):
            sampler.sample(self.policy, self.prompt, mask, completion_length=LENGTH, keys=self.keys)

    def score(self) -> None:
        mask = torch.ones_like(self.prompt, dtype=torch.bool)
        with evaluating(self.policy):
            self.policy.completion_log_probs(self.prompt, mask, self.completion, self.masks)

    def _beside_weights(self, action: Callable[[], None]) -> int:
        memory = TensorMemory.of_training(self.model, self.optimizer)
        before = memory.live
        with memory:
            action()
        return memory.peak - before


def _small_model(config: PreTrainedConfig, settings: Settings) -> nn.Module:
    model = AutoModelForMaskedLM.from_config(config).to(getattr(torch, settings.dtype))
    if settings.gradient_checkpointing:
        enable_checkpointing(model)
    return model if settings.adapter is None else settings.adapter.apply(model)


class UnstatedObjective(Objective):
    """Of somebody else: trains, but does not say what it asks of the model."""

    def __init__(self, *, replicates: int = 2) -> None:
        self.replicates = replicates

    def prepare(self, policy, rollouts, *, rows_per_forward):
        raise NotImplementedError

    def loss(self, policy, rows, targets, *, iteration, planned_rollouts):
        raise NotImplementedError


class StatedObjective(UnstatedObjective):
    """Of somebody else: three maskings of each rollout per buffer, in two forwards; no log_rnd."""

    def footprint(self, *, completion_length, sampler, reference_is_current=False):
        return ObjectiveFootprint(
            training=MaskedPass.over(completion_length, replicates=self.replicates),
            per_buffer=(MaskedPass(maskings=3, positions=3.0 * completion_length, forwards=2),),
        )


class UnstatedEstimator(LogProbEstimator):
    """Of somebody else: does not say what it asks of the model."""

    def rows_log_prob(self, policy, rows, *, reference):
        raise NotImplementedError


class UnstatedSampler(Sampler):
    """Of somebody else, which is bounded by what any sampler asks for."""

    def sample(self, policy, prompt_ids, prompt_mask, *, completion_length, keys):
        raise NotImplementedError
