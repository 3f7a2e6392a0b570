"""Writes the completions of an evaluation as JSON lines."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from dmpo_lightning.modules.dmpo import DMPO
from dmpo_lightning.modules.run_directory import run_directory
from dmpo_lightning.reports.lines import replace


class CompletionWriter(Callback):
    """Writes one JSON object per completion of ``validate``, ``test`` and ``predict``.

    Each holds index, sampler, length, rollout, example, completion, answer, correct, scores and effective_length.
    ``dmpo-lightning score`` reads them. Lines are appended while the run goes, so that an interrupted run leaves what
    it has evaluated. Several ranks write to a file each, with the rank in its name. At the end one file is left, in the
    order of the prompts. Validation while fitting writes nothing.

    Args:
        path: of the file, relative to the run directory. The files of several ranks are merged if they share it.
    """

    def __init__(self, path: str = "completions.jsonl") -> None:
        self.path = path
        self._file: Path | None = None
        self._parts: list[Path] = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *batch: Any, **options: Any
    ) -> None:
        self._append(trainer, outputs)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *batch: Any, **options: Any
    ) -> None:
        self._append(trainer, outputs)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *batch: Any, **options: Any
    ) -> None:
        self._append(trainer, {"records": outputs})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer)

    def _start(self, trainer: Trainer, module: LightningModule) -> None:
        """Empties the rank's file, unless this run writes none."""
        self._file = None
        # Each validation while fitting would begin the file anew.
        writes = trainer.state.fn != TrainerFn.FITTING and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if not writes or not isinstance(module, DMPO):
            return
        # On all ranks, because it is a broadcast (docs/decisions/016-equal-forwards.md).
        self._file = run_directory(trainer) / self.path
        ranks = range(trainer.world_size)
        name = "{0.stem}.rank{1}{0.suffix}" if len(ranks) > 1 else "{0.name}"
        self._parts = [self._file.with_name(name.format(self._file, rank)) for rank in ranks]
        own = self._parts[trainer.global_rank]
        own.parent.mkdir(parents=True, exist_ok=True)
        own.write_text("", encoding="utf-8")

    def _append(self, trainer: Trainer, outputs: dict[str, Any]) -> None:
        if self._file is not None:
            # Closed after each batch, so that what an interrupted run leaves can be read.
            # Half a surrogate, which UTF-8 cannot hold, becomes the escape that JSON has for it.
            with self._parts[trainer.global_rank].open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in outputs["records"])

    def _finish(self, trainer: Trainer) -> None:
        if self._file is None:
            return
        # Rank 0 is about to read what the others write.
        trainer.strategy.barrier("completions")
        if trainer.is_global_zero:
            merge(self._parts, self._file)


def merge(parts: Sequence[Path], into: Path) -> None:
    """Writes the lines of all parts into one file, in the order of their prompts, and removes the parts.

    Until the last moment the parts stay as they are. A part that is missing was written on another machine.
    """
    present = [part for part in parts if part.is_file()]
    # `splitlines` would also cut at characters such as U+2028, which JSON leaves as they are within a text.
    lines = [line for part in present for line in part.read_text(encoding="utf-8").split("\n") if line]
    ordered = sorted(lines, key=lambda line: json.loads(line)["index"])
    replace(into, "".join(f"{line}\n" for line in ordered).encode())
    for part in present:
        # A single rank writes to the file itself.
        if part != into:
            part.unlink()
