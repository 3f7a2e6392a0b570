"""Times what a run records of itself against the buffers that it records.

    python -m benchmarks.records --json

The demo's model, puzzles, sizes and objective, fitted without validation. `RunRecorder` records every rollout and all
metrics, and each of its hooks is timed where Lightning calls it, so that records and training alternate buffer by
buffer in one process. The first buffer, in which caches fill, is left out. ``share`` is the ratio of the medians.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Trainer

from benchmarks.options import at_least_three, check_quarters
from dmpo_lightning import DMPO, WDCE, ConfidenceSampler, RunRecorder, SudokuDataModule


class TimedRecorder(RunRecorder):
    """Adds up the seconds of its hooks, buffer by buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[float] = []
        self.records: list[float] = []
        self._last = 0.0

    def on_rollouts(self, *arguments: Any) -> None:
        now = time.perf_counter()
        # From the end of one collection to that of the next.
        self.buffers.append(now - self._last)
        self._last = now
        self.records.append(0.0)
        self._timed(super().on_rollouts, *arguments)

    def on_train_batch_end(self, *arguments: Any) -> None:
        self._timed(super().on_train_batch_end, *arguments)

    def _timed(self, hook: Any, *arguments: Any) -> None:
        started = time.perf_counter()
        hook(*arguments)
        self.records[-1] += time.perf_counter() - started


def measure(prompts: int, group_size: int, buffers: int) -> dict[str, float]:
    """Median seconds of a buffer and of its records, their ratio, and bytes per rollout."""
    torch.manual_seed(0)
    rollouts = prompts * group_size
    module = DMPO(
        "sudoku_tiny",
        objective=WDCE(reward_temperature=0.05, baseline="none", uninformative_groups="train"),
        sampler=ConfidenceSampler(),
        completion_length=20,
        group_size=group_size,
        micro_batch_size=rollouts // 4,
        reference_refresh_interval=1,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    )
    data = SudokuDataModule(
        tokenizer="sudoku_tiny",
        prompts_per_buffer=prompts,
        prompt_template="{puzzle}",
        blanks=(11, 12),
        sizes={"train": prompts * (buffers + 2), "validation": 1, "test": 1},
        rewards="published",
        check=None,
    )
    recorder = TimedRecorder()
    with tempfile.TemporaryDirectory() as folder:
        # The last buffer ends with the collection of one that is not counted.
        steps = 4 * (buffers + 1) + 1
        flags: dict[str, Any] = dict.fromkeys(
            ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
        )
        trainer = Trainer(
            accelerator="cpu",
            max_steps=steps,
            gradient_clip_val=0.2,
            limit_val_batches=0,
            callbacks=[recorder],
            default_root_dir=folder,
            **flags,
        )
        trainer.fit(module, datamodule=data)
        size = sum(path.stat().st_size for path in (Path(folder) / "rollouts").iterdir())
    # The first interval has no beginning, the next holds what is done once.
    buffer, record = median(recorder.buffers[2:]), median(recorder.records[1:-1])
    written = len(recorder.buffers) * rollouts
    return {"share": record / buffer, "buffer_seconds": buffer, "record_seconds": record, "bytes": size / written}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.records", description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=64, help="per buffer")
    parser.add_argument("--group_size", type=int, default=4)
    parser.add_argument("--buffers", type=at_least_three, default=10)
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    options = vars(parser.parse_args(arguments))
    as_json = options.pop("json")
    check_quarters(parser, options["prompts"] * options["group_size"])
    found = {name: round(value, 5) for name, value in measure(**options).items()}
    print(json.dumps(found) if as_json else "\n".join(f"{name:14} {value:10.5f}" for name, value in found.items()))


if __name__ == "__main__":
    main()
