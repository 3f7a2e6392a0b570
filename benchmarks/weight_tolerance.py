"""What leaving out negligible rollouts saves and costs, on real weights of short runs from the embedded model.

    python -m benchmarks.weight_tolerance

Trains on 4x4 Sudoku as `sudoku_tiny.yaml` does, with each baseline, and compares at every micro-batch the gradient at
each tolerance with that at tolerance 0: the largest relative error, and the share of rollouts left out.
"""

import argparse
import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from dmpo_lightning import DMPO, WDCE, ConfidenceSampler, SudokuDataModule

TOLERANCES = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class Effect:
    """Of one tolerance, over all micro-batches of a run."""

    baseline: str
    tolerance: float
    gradient_error: float
    """Norm of the difference over the norm of the whole gradient, the largest."""
    skipped_rollouts: float
    """Mean share."""


class Comparison(Callback):
    """Before each training step: the gradient of the coming micro-batch at every tolerance."""

    def __init__(self) -> None:
        self.errors: dict[float, list[float]] = {tolerance: [] for tolerance in TOLERANCES}
        self.skipped: dict[float, list[float]] = {tolerance: [] for tolerance in TOLERANCES}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, DMPO)
        buffer = pl_module.buffer
        if buffer.needs_rollouts:
            return
        position = buffer.position
        iteration, rows, targets = buffer.next_micro_batch()
        buffer.position = position
        signal = targets["signal"]
        if not signal.any():
            return
        whole: Tensor | None = None
        for tolerance in TOLERANCES:
            found, skipped = gradient(pl_module, rows, signal, iteration, tolerance)
            whole = found if whole is None else whole
            self.errors[tolerance].append(float((found - whole).norm() / whole.norm()))
            self.skipped[tolerance].append(skipped)


def gradient(module: DMPO, rows: Any, signal: Tensor, iteration: int, tolerance: float) -> tuple[Tensor, float]:
    """Of the micro-batch's loss by all weights, as one vector; and the share of its rollouts left out."""
    objective = copy.copy(module.objective)
    objective.weight_tolerance = tolerance  # type: ignore[attr-defined]
    weights = [weight for weight in module.policy.model.parameters() if weight.requires_grad]
    with torch.enable_grad():
        loss, diagnostics = objective.loss(
            module.policy, rows, {"signal": signal}, iteration=iteration, planned_rollouts=len(signal)
        )
    gradients = torch.autograd.grad(loss, weights)
    return torch.cat([each.flatten() for each in gradients]), float(diagnostics["weight/skipped_rollouts"])


def run(baseline: str, steps: int) -> Iterator[Effect]:
    """One short run."""
    torch.manual_seed(0)
    data = SudokuDataModule(
        tokenizer="sudoku_tiny",
        prompts_per_buffer=16,
        prompt_template="{puzzle}",
        blanks=(11, 12),
        sizes={"train": 512},
        reward_weights={"solved": 1.0},
    )
    module = DMPO(
        "sudoku_tiny",
        # In the published form, in which groups of equal rewards have a signal too.
        objective=WDCE(
            reward_temperature=0.05,
            baseline=baseline,  # type: ignore[arg-type]
            negative_term="log_likelihood",
            uninformative_groups="train",
        ),
        sampler=ConfidenceSampler(temperature=1.0),
        completion_length=20,
        group_size=8,
        micro_batch_size=32,
        num_iterations=2,
        reference_refresh_interval=1 if baseline == "none" else None,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3 if baseline == "none" else 1e-4),
    )
    comparison = Comparison()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        gradient_clip_val=0.2,
        callbacks=[comparison],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(module, data)
    for tolerance in TOLERANCES:
        errors, skipped = comparison.errors[tolerance], comparison.skipped[tolerance]
        yield Effect(baseline, tolerance, max(errors), sum(skipped) / len(skipped))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.weight_tolerance", description=__doc__.partition("\n")[0])
    parser.add_argument("--baseline", nargs="+", default=["none", "negative", "group"])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--json", action="store_true", help="one line of JSON per baseline and tolerance")
    options = parser.parse_args(arguments)
    if not options.json:
        print("baseline   tolerance  gradient error  rollouts left out")
    for baseline in options.baseline:
        for effect in run(baseline, options.steps):
            if options.json:
                print(json.dumps(vars(effect)))
            else:
                print(
                    f"{effect.baseline:10} {effect.tolerance:9g} {effect.gradient_error:15.1e} "
                    f"{effect.skipped_rollouts:18.1%}"
                )


if __name__ == "__main__":
    main()
