"""Small training steps for the planner to predict, and the configuration of a large run."""

import torch
from benchmarks.tensor_memory import TensorMemory
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForMaskedLM, PreTrainedConfig

from dmpo_lightning.functional import denoising_cross_entropy, draw_masks
from dmpo_lightning.models.llada import LLaDAConfig
from dmpo_lightning.models.loading import load_tokenizer
from dmpo_lightning.planning import Adapter, Memory, Settings, Sharding, Workload, estimate_memory
from dmpo_lightning.planning.parameters import describe
from dmpo_lightning.policy import Policy, evaluating
from dmpo_lightning.samplers import Sampler

ROWS, PROMPT, LENGTH, REPLICATES = 4, 16, 32, 4
SIZES = {"small": (128, 4, 2048), "large": (256, 6, 8192)}
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
    work = Workload(
        completion_length=LENGTH,
        prompt_length=PROMPT,
        micro_batch_size=ROWS,
        replicates=REPLICATES,
        accumulation=changes.pop("accumulation", 2),
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

    def __init__(self, config: PreTrainedConfig, settings: Settings, *, model: nn.Module | None = None) -> None:
        self.settings = settings
        self.model: nn.Module = (_small_model(config, settings) if model is None else model).train()
        self.policy = Policy(self.model, load_tokenizer("sudoku_tiny"), with_reference=False)
        if settings.precision == "bf16-true":
            self.policy.to(torch.bfloat16)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad])
        self.prompt = torch.randint(6, 20, (ROWS, PROMPT))
        self.completion = torch.randint(6, 20, (ROWS, LENGTH))
        self.masks = draw_masks(torch.arange(ROWS), length=LENGTH, replicates=REPLICATES)

    def micro_batch(self, *, is_first: bool) -> None:
        mask = torch.ones_like(self.prompt, dtype=torch.bool)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.settings.precision == "bf16-mixed"):
            log_probs = self.policy.completion_log_probs(self.prompt, mask, self.completion, self.masks)
            loss = denoising_cross_entropy(log_probs, self.masks).mean()
        del log_probs
        if is_first:
            self.optimizer.zero_grad()
        loss.backward()

    def step(self) -> None:
        for number in range(self.settings.workload.accumulation):
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
        mask = torch.ones_like(self.prompt, dtype=torch.bool)
        memory = TensorMemory.of_training(self.model, self.optimizer)
        before = memory.live
        with evaluating(self.policy), memory:
            sampler.sample(self.policy, self.prompt, mask, completion_length=LENGTH, keys=torch.arange(ROWS))
        return memory.peak - before

    def measured_scoring(self) -> int:
        """Bytes that an ELBO of all rows takes beside the weights."""
        mask = torch.ones_like(self.prompt, dtype=torch.bool)
        memory = TensorMemory.of_training(self.model, self.optimizer)
        before = memory.live
        with evaluating(self.policy), memory:
            self.policy.completion_log_probs(self.prompt, mask, self.completion, self.masks)
        return memory.peak - before


def _small_model(config: PreTrainedConfig, settings: Settings) -> nn.Module:
    model = AutoModelForMaskedLM.from_config(config).to(getattr(torch, settings.dtype))
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return _adapted(model, settings.adapter)


def _adapted(model: nn.Module, adapter: Adapter | None) -> nn.Module:
    if adapter is None:
        return model
    names = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and ".blocks." in name]
    return get_peft_model(model, LoraConfig(r=adapter.r, lora_dropout=adapter.dropout, target_modules=names))
