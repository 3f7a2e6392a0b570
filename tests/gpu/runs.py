"""What the tests of this folder share: comparisons that say what differs, runs on a device, and its memory."""

import gc
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
import torch
from benchmarks.tensor_memory import TensorMemory
from dmpo_runs import Recorder, loader, module, trainer
from lightning.pytorch import Trainer
from torch import Tensor, nn

from dmpo_lightning import DMPO, LoRA, RandomOrderSampler

ACCELERATORS = {"cuda": "gpu", "cpu": "cpu"}
MIB = 2**20


def assert_same(found: Tensor, expected: Tensor, what: str, *, within: float = 0.0) -> None:
    """Fails with the number of differences, the first place and the largest difference."""
    assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
    found, expected = found.detach().cpu(), expected.detach().cpu()
    distance = (found.double() - expected.double()).abs()
    distance = torch.where(found == expected, 0.0, distance)  # of two infinities the difference is NaN
    differs = ~(distance <= within) if within else found != expected
    if differs.any():
        first = tuple(differs.nonzero()[0].tolist())
        pytest.fail(
            f"{what}: {int(differs.sum())} of {differs.numel()} differ by more than {within:g}; first at {first}: "
            f"{found[first].item()} instead of {expected[first].item()}; largest difference {distance.max().item():g}"
        )


def assert_finite(values: Iterable[float], what: str) -> None:
    values = list(values)
    odd = {place: value for place, value in enumerate(values) if not math.isfinite(value)}
    assert values, f"{what}: there is none"
    assert not odd, f"{what}: {len(odd)} of {len(values)} are not finite, by place: {odd}"


class Recorded(Recorder):
    """The losses, and of each training step the completions that it trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.completions: list[Tensor] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.completions.append(pl_module.buffer.rollouts.completion_ids.cpu())


def assert_same_run(found: Recorded, expected: Recorded, what: str, *, within: float = 0.0) -> None:
    """Compares completions before losses, which say nothing once the completions differ."""
    assert_same(torch.stack(found.completions), torch.stack(expected.completions), f"{what}: completions by step")
    losses = [torch.tensor(record.losses, dtype=torch.float64) for record in (found, expected)]
    assert_same(*losses, f"{what}: losses by step", within=within)


def reward(example, completion) -> float:
    """Differs between most completions, so that no step is without a gradient."""
    digits = [int(character) if character.isdigit() else 0 for character in completion]
    return sum(digit * (place + 1) for place, digit in enumerate(digits)) / 50 + completion.count(example["digit"]) / 4


def small_module(**options) -> DMPO:
    """The embedded model, trained from random orders: its completions depend on no comparison of confidences."""
    defaults = {
        "random_weights": False,
        "sampler": RandomOrderSampler(denoising_steps=4),
        "validation_samplers": {},
        "reward": reward,
    }
    return module(**defaults | options)


def small_lora(dropout: float = 0.1) -> LoRA:
    return LoRA(r=4, alpha=8, dropout=dropout)


def fit(
    dmpo: DMPO,
    device: torch.device,
    folder: Path,
    *,
    steps: int = 4,
    callbacks: Sequence = (),
    ckpt_path: Path | None = None,
    weights_only: bool | None = None,
    **flags,
) -> tuple[Trainer, Recorded]:
    """Trains; the four steps of the default use one buffer twice."""
    torch.manual_seed(0)  # of dropout
    record = Recorded()
    flags = {"accelerator": ACCELERATORS[device.type], "devices": 1, "limit_val_batches": 0} | flags
    run = trainer(folder, max_steps=steps, callbacks=[record, *callbacks], **flags)
    run.fit(dmpo, loader(), ckpt_path=ckpt_path, weights_only=weights_only)
    assert len(record.losses) == (steps if ckpt_path is None else steps - started(run, record)), record.losses
    assert_finite(record.losses, "losses by step")
    return run, record


def started(run: Trainer, record: Recorded) -> int:
    """The optimizer step that a resumed run began with."""
    return run.global_step - len(record.losses)


def trained(dmpo: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in dmpo.named_parameters() if value.requires_grad}


# Memory ---------------------------------------------------------------------------------------------------------------


def warm_up(device: torch.device) -> None:
    """Has the libraries take what they keep for good, for forward and backward passes in both types."""
    for dtype in (torch.float32, torch.bfloat16):
        layer = nn.Linear(64, 64).to(device, dtype)
        layer(torch.ones(64, 64, device=device, dtype=dtype, requires_grad=True)).sum().backward()


def peak_memory(device: torch.device, action: Callable[[], object], known: Iterable[Tensor]) -> int:
    """Bytes that an action takes at its worst moment beside what is there before it.

    On a GPU it is what torch's allocator counts. On the CPU it is the storages that operations make; ``known`` are
    tensors that exist already.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        action()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    memory = TensorMemory(known)
    before = memory.live
    with memory:
        action()
    return memory.peak - before
