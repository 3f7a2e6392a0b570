"""What the ranks of a case do; each returns facts that the tests compare."""

import os
from pathlib import Path

import torch
from cpu_strategies import strategy
from dmpo_runs import PROMPTS, TOKENIZER, Recorder, trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from dmpo_lightning import DMPO, WDCE, ConfidenceSampler, LoRA, PromptLoader, WinoSampler
from dmpo_lightning.models.sharding import whole_weights

torch.set_num_threads(1)
SAMPLERS = {
    "static": lambda: ConfidenceSampler(denoising_steps=4),
    "threshold": lambda: ConfidenceSampler(block_length=4, threshold=0.6),
    "early exit": lambda: ConfidenceSampler(block_length=2, threshold=0.6, early_exit=True),
    "wino": lambda: WinoSampler(block_length=4),
}


def reward(example, completion):
    """Differs between most completions, so that few groups are without signal."""
    digits = [int(character) if character.isdigit() else 0 for character in completion]
    return sum(digit * (place + 1) for place, digit in enumerate(digits)) / 50 + completion.count(example["digit"]) / 4


def module(adapter: str, *, sampler: str = "static", dropout: float = 0.1, micro_batch: int = 4, **options) -> DMPO:
    defaults = {
        "objective": WDCE(reward_temperature=0.1, replicates=2),
        "sampler": SAMPLERS[sampler](),
        "completion_length": 8,
        "group_size": 4,
        "micro_batch_size": micro_batch,
        "num_iterations": 2,
        "reward": reward,
        "adapter": LoRA(r=4, alpha=8, dropout=dropout) if adapter == "lora" else None,
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        "seed": 3,
    }
    dmpo = DMPO("sudoku_tiny", **defaults | options)
    with torch.no_grad():
        for name, parameter in dmpo.policy.named_parameters():
            if ".lora_B." in name:  # a policy that differs from its reference
                parameter.copy_(torch.linspace(-0.02, 0.02, parameter.numel()).view_as(parameter))
    return dmpo


def prompts(batch_size: int = 2, *, count: int = 6, shuffle: bool = True) -> PromptLoader:
    data = [*PROMPTS, {"prompt": "0006", "digit": "6"}][:count]
    return PromptLoader(data, TOKENIZER, batch_size=batch_size, shuffle=shuffle)


def fit(
    kind: str,
    dmpo: DMPO,
    folder: str,
    *,
    steps: int,
    prompts_per_buffer: int = 2,
    count: int = 6,
    accumulate: int = 2,
    ckpt_path: str | None = None,
    callbacks=(),
    **flags,
):
    """Trains, validates at step 4 and saves at each step; the trainer and what it saw."""
    torch.manual_seed(int(os.environ["RANK"]))
    record = Recorder()
    saves = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    options = {
        "max_steps": steps,
        "accumulate_grad_batches": accumulate,
        "gradient_clip_val": 0.5,
        "val_check_interval": 4 * accumulate,
        "check_val_every_n_epoch": None,
        "callbacks": [record, saves, *callbacks],
        "enable_checkpointing": True,
        "strategy": strategy(kind),
        "devices": int(os.environ["LOCAL_WORLD_SIZE"]),
    }
    run = trainer(folder, **options | flags)
    validation = PromptLoader(PROMPTS[:5], TOKENIZER, batch_size=2, shuffle=False)
    run.fit(dmpo, prompts(prompts_per_buffer, count=count), validation, ckpt_path=ckpt_path)
    return run, record


def train(kind: str, adapter: str, *, cut: int = 3, steps: int = 5, refresh: int | None = None, **options) -> dict:
    """A run, and another one that continues it from its checkpoint at optimizer step ``cut``."""
    options |= {"reference_refresh_interval": refresh}
    whole = module(adapter, **options)
    run, record = fit(kind, whole, "whole", steps=steps)
    weights = whole_weights(whole.policy.model)
    saved = f"whole/step={cut}.ckpt"
    resumed = module(adapter, **options)
    _, rest = fit(kind, resumed, "resumed", steps=steps, ckpt_path=saved)
    again = whole_weights(resumed.policy.model)
    return {
        "losses": record.losses,
        "resumed": rest.losses,
        "prompts": record.prompts,
        "steps": run.global_step,
        "validation": float(run.callback_metrics["val/sampled/reward"]),
        "weights": sample_of(weights),
        "names": list(weights),
        "distance": max(float((weights[name] - again[name]).abs().max()) for name in weights),
        "bytes": size_of(Path(saved)),
        "trainable_bytes": sum(4 * value.numel() for value in weights.values()),
        "all_bytes": sum(4 * value.numel() for value in whole_weights(whole.policy, trainable_only=False).values()),
    }


def sample_of(weights: dict[str, torch.Tensor]) -> list[float]:
    """A few numbers of each weight, and its sum."""
    return [float(number) for value in weights.values() for number in (value.double().sum(), *value.flatten()[:4])]


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size
