"""Writes predicted completions as JSON lines."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter


class CompletionWriter(BasePredictionWriter):
    """One JSON object per completion: index, sampler, example, completion, scores.

    Args:
        path: of the file, relative to the run directory; ranks above 0 append their number to its name.
    """

    def __init__(self, path: str = "completions.jsonl") -> None:
        super().__init__(write_interval="batch")
        self.path = path
        self._started = False

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Appends the records of a batch; the first batch starts the file anew."""
        path = Path(trainer.log_dir or trainer.default_root_dir) / self.path
        if trainer.global_rank:
            path = path.with_name(f"{path.stem}.rank{trainer.global_rank}{path.suffix}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a" if self._started else "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in prediction)
        self._started = True
