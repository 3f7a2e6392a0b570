"""Small runs for the planner to predict, and the same runs with numbers; an objective of somebody else."""

from collections.abc import Callable

import torch
from benchmarks.tensor_memory import TensorMemory
from torch import nn
from transformers import AutoModelForMaskedLM, PreTrainedConfig

from dmpo_lightning import DMPO, WDCE, Backbone, ConfidenceSampler, LoRA
from dmpo_lightning.functional import denoising_cross_entropy, draw_masks
from dmpo_lightning.models.llada import LLaDAConfig
from dmpo_lightning.models.loading import load_tokenizer
from dmpo_lightning.models.parts import enable_checkpointing
from dmpo_lightning.objectives import Objective
from dmpo_lightning.planning.memory import Memory, rehearsed
from dmpo_lightning.planning.network import quantize, stand_in_tokenizer
from dmpo_lightning.planning.run import Run
from dmpo_lightning.planning.strategy import Sharding
from dmpo_lightning.policy import Policy, evaluating
from dmpo_lightning.samplers import Canvas, Sampler
from dmpo_lightning.schedule import Schedule

ROWS, PROMPT, LENGTH, REPLICATES = 4, 16, 32, 4
SIZES = {"small": (128, 4, 2048), "large": (256, 6, 8192), "of a GPU": (512, 8, 32768)}
"""Width, layers, vocabulary."""


def small_config(size: str, **changes) -> LLaDAConfig:
    width, layers, vocab_size = SIZES[size]
    settings = {
        "d_model": width,
        "n_layers": layers,
        "n_heads": width // 32,
        "mlp_hidden_size": 3 * width,
        "vocab_size": vocab_size,
        "max_sequence_length": 64,
        "mask_token_id": 5,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    return LLaDAConfig(**(settings | changes))


def small_run(
    config: PreTrainedConfig,
    *,
    dtype: str = "float32",
    adapter: LoRA | None = None,
    quantization: str | None = None,
    checkpointing: bool = False,
    precision: str = "32-true",
    accumulation: int = 2,
    rows: int = ROWS,
    sharding: Sharding | None = None,
    on_cpu: bool = True,
    **options,
) -> Run:
    """A run of `DMPO`, in float32 on one CPU, two micro-batches per step."""
    with torch.device("meta"):
        model = AutoModelForMaskedLM.from_config(config, dtype=getattr(torch, dtype))
        if quantization is not None:
            quantize(model)
        backbone = Backbone(
            model,
            tokenizer=stand_in_tokenizer(config),
            adapter=adapter,
            quantization=quantization,
            gradient_checkpointing=checkpointing,
        )
        settings = {
            "objective": WDCE(reward_temperature=0.1, replicates=REPLICATES),
            "sampler": ConfidenceSampler(block_length=16),
            "completion_length": LENGTH,
            "group_size": rows,
            "micro_batch_size": rows,
        }
        module = DMPO(backbone, **(settings | options))
    schedule = Schedule(rows, accumulation, rows, accumulation=accumulation)
    return Run("small", module, schedule, PROMPT, LENGTH, sharding or Sharding("alone"), precision, on_cpu)


def training_peak(memory: Memory) -> float:
    """Bytes at the worst moment of an optimizer step, without the reference and the rollouts."""
    stays = sum(memory.resident[name] for name in ("weights", "gradients", "optimizer"))
    return stays + max(memory.phases[name].peak for name in ("training", "optimizer step"))


def planned(config: PreTrainedConfig, **changes) -> Memory:
    return rehearsed(small_run(config, **changes))


class SmallRun:
    """One optimizer step of DMPO's loss as Lightning runs it: gradients are dropped after the first forward."""

    def __init__(
        self,
        config: PreTrainedConfig,
        *,
        dtype: str = "float32",
        adapter: LoRA | None = None,
        checkpointing: bool = False,
        precision: str = "32-true",
        accumulation: int = 2,
        rows: int = ROWS,
        model: nn.Module | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.precision, self.accumulation, self.rows = precision, accumulation, rows
        if model is None:
            with torch.device(device):
                model = AutoModelForMaskedLM.from_config(config).to(getattr(torch, dtype))
            if checkpointing:
                enable_checkpointing(model)
            model = model if adapter is None else adapter.apply(model)
        self.model: nn.Module = model.train()
        self.policy = Policy(self.model, load_tokenizer("sudoku_tiny"), with_reference=False)
        if precision == "bf16-true":
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
        with torch.autocast(self.prompt.device.type, torch.bfloat16, enabled=self.precision == "bf16-mixed"):
            log_probs = self.policy.completion_log_probs(self.prompt, mask, self.completion, self.masks)
            loss = denoising_cross_entropy(log_probs, self.masks, blocks=self.blocks).mean()
        del log_probs
        if is_first:
            self.optimizer.zero_grad()
        loss.backward()

    def step(self) -> None:
        for number in range(self.accumulation):
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


class ForeignObjective(Objective):
    """Of somebody else: scores each rollout in two forwards per buffer, and says nothing of it to anybody."""

    def __init__(self, *, replicates: int = 2) -> None:
        self.replicates = replicates

    def _log_probs(self, policy, rows):
        masks = draw_masks(rows.keys, length=rows.completion_ids.shape[1], replicates=self.replicates)
        return policy.completion_log_probs(rows.prompt_ids, rows.prompt_mask, rows.completion_ids, masks)

    def prepare(self, policy, rollouts, *, rows_per_forward):
        rows = rollouts.rows()
        for start in range(0, len(rows), rows_per_forward):
            for _ in range(2):
                self._log_probs(policy, rows[start : start + rows_per_forward])
        return {"weight": rollouts.reward}, {}

    def loss(self, policy, rows, targets, *, iteration, planned_rollouts):
        # A count of what turned out so is a number that only a real run has.
        log_probs = self._log_probs(policy, rows)
        return -log_probs[log_probs < 0].sum() / max(1, int((log_probs < 0).sum())) - log_probs.mean(), {}


class ForeignSampler(Sampler):
    """Of somebody else: from left to right, as long as the model is sure of anything."""

    def sample(self, policy, prompt_ids, prompt_mask, *, completion_length, keys):
        canvas = Canvas.blank(policy, prompt_ids, prompt_mask, completion_length, keys)
        for step in range(completion_length):
            positions = torch.full((len(keys), 1), step)
            draw = canvas.draw(canvas.logits(positions), positions, step, self)
            canvas.reveal(positions, draw, step)
            # A question to the numbers: a token whose probability is below 2.
            if not bool((draw.confidence < 2).any()):
                break
        return canvas.samples()
