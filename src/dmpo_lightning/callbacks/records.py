"""The record of a run on disk: its rollouts, its metrics, and what it was."""

import json
import time
import warnings
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from dmpo_lightning.callbacks.facts import run_facts, versions
from dmpo_lightning.callbacks.rollout_records import TokenTexts, rollout_records
from dmpo_lightning.distributed.ranks import gather_ranks
from dmpo_lightning.modules.dmpo import DMPO
from dmpo_lightning.modules.observers import RolloutObserver
from dmpo_lightning.modules.run_directory import run_directory
from dmpo_lightning.reports.lines import RotatedLines, append, encoded, finite, keep_before, keep_lines, replace
from dmpo_lightning.reports.run import METRICS, ROLLOUTS, RUN, read_object
from dmpo_lightning.rollout import RolloutBuffer
from dmpo_lightning.terminal import escaped

FORMAT = 1
"""Of the files. A reader of another one may find other names."""
SMALLEST = 2**16
"""Bytes that rollouts are given at least, below which a file would hold a few of them."""


class RunRecorder(RolloutObserver):
    """Writes what a run does into its directory, whatever its loggers are. The command line adds it by itself.

    - ``rollouts/rankR-N.jsonl``, one line per rollout: prompt, completion, reward and components, the objective's
      targets (weight, signal, log_rnd), and of each token its text, the step that revealed it and its probability then.
      Each file begins with a header. The oldest file goes when there are too many bytes.
    - ``metrics.jsonl``, one line per buffer and per validation: step, rollouts seen, seconds and all scalars. Of
      ``train/loss`` it has the mean over the buffer. With several ``sampling_rounds``, ``left_out`` has the
      ``prompt_index`` of each prompt, of any rank, that was sampled and is not in the buffer.
    - ``run.json``: configuration, model, data, versions and times.

    A resumed run goes on in the same files. Lines of what it does again are removed first. A file that cannot be
    written ends no run: a warning says what is lost, once for each kind of file. ``dmpo-lightning report`` reads them.

    Args:
        share: of the rollouts that are written, in (0, 1]. Which ones is drawn by their keys.
        max_bytes: of all rollouts on disk, over all ranks.

    Raises:
        ValueError: a share or a number of bytes out of range.
    """

    def __init__(self, *, share: float = 1.0, max_bytes: int = 2**28) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"`share` must be in (0, 1], got {share}; to record nothing, leave out RunRecorder.")
        if max_bytes < SMALLEST:
            raise ValueError(f"`max_bytes` must be at least {SMALLEST}, got {max_bytes}; `share` takes fewer rollouts.")
        self.share, self.max_bytes = share, max_bytes
        self._forget()

    def _forget(self) -> None:
        self._directory: Path | None = None
        self._rollouts: RotatedLines | None = None
        self._texts: TokenTexts | None = None
        self._open: dict[str, Any] | None = None
        """The buffer that is being trained on: its number, the scalars of its collection, and all as its first
        micro-batch left them, which a run that is resumed within the buffer does not log again.
        """
        self._losses: list[Tensor] = []
        self._validated_at = -1
        self._seconds = 0.0
        self._started: float | None = None
        self._lost: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Each fit has its own record. What a checkpoint holds comes afterwards."""
        if stage == TrainerFn.FITTING:
            self._forget()

    def state_dict(self) -> dict[str, Any]:
        return {"open": self._open, "validated_at": self._validated_at, "seconds": self._seconds_by_now()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._open, self._validated_at = state_dict["open"], state_dict["validated_at"]
        self._seconds = state_dict["seconds"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer, pl_module)

    def _start(self, trainer: Trainer, module: LightningModule) -> None:
        """Takes back what earlier parts of the run wrote beyond the checkpoint, and says what the run is."""
        if self._directory is not None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        # On all ranks, because it is a broadcast.
        directory = self._directory = run_directory(trainer)
        self._started = time.perf_counter() - self._seconds
        iteration, rank = self._next_iteration(module), trainer.global_rank
        facts = {"seed": getattr(module, "seed", None), "share": self.share, "versions": versions()}
        header, budget = {"format": FORMAT, "rank": rank, **facts}, max(self.max_bytes // trainer.world_size, SMALLEST)
        folder, collected = directory / ROLLOUTS, getattr(module, "buffers_collected", 0)
        self._rollouts = rollouts = RotatedLines(folder, f"rank{rank}", header=header, max_bytes=budget)
        self._try(ROLLOUTS, lambda: rollouts.keep_before(collected))
        if trainer.is_global_zero:
            step, validated_at = trainer.global_step, self._validated_at

            def is_kept(record: Mapping[str, Any]) -> bool:
                if record.get("kind") == "buffer":
                    return record.get("iteration", 0) < iteration
                return record.get("step", 0) < step + (validated_at == step)

            # Of ranks that there are no more.
            self._try(ROLLOUTS, lambda: keep_before(folder, collected, ranks=trainer.world_size))
            self._try(METRICS, lambda: _made(directory) and keep_lines(directory / METRICS, is_kept))
            self._try(RUN, lambda: self._write_facts(trainer, module, directory))

    def _next_iteration(self, module: LightningModule) -> int:
        """The first buffer whose scalars are yet to be written."""
        collected = getattr(module, "buffers_collected", 0)
        if self._open is not None and self._open["iteration"] >= collected:
            # It was rewound to before this buffer (`Continuation`).
            self._open = None
        return collected if self._open is None else self._open["iteration"]

    def _write_facts(self, trainer: Trainer, module: LightningModule, directory: Path) -> None:
        earlier = read_object(directory / RUN) if trainer.ckpt_path is not None else {}
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        times: dict[str, Any] = {"started": earlier.get("started", now)}
        if trainer.ckpt_path is not None:
            resumed = [*earlier.get("resumed", []), {"at": now, "step": trainer.global_step}]
            times["resumed"] = resumed
        content = finite({"format": FORMAT, **times, **run_facts(trainer, module)})
        replace(directory / RUN, json.dumps(content, indent=2).encode("ascii") + b"\n")

    def on_rollouts(self, trainer: Trainer, module: LightningModule, buffer: RolloutBuffer) -> None:
        rollouts = self._rollouts
        if rollouts is None:
            return
        assert isinstance(module, DMPO)
        # The end of an epoch may have cut the last one short.
        self._close(trainer, module)
        times = {f"time/{name}": seconds for name, seconds in buffer.seconds.items()}
        self._open = {"iteration": buffer.number, "values": {**times, **buffer.means}, "first": {}}
        if module.sampling_rounds > 1:
            self._open["left_out"] = [index for each in gather_ranks(list(buffer.left_out)) for index in each]
        texts = self._texts = self._texts or TokenTexts(module.policy.tokenizer)
        lines = (encoded(record) for record in rollout_records(buffer, texts, share=self.share))
        self._try(ROLLOUTS, lambda: rollouts.append(lines))
        if rollouts.too_long and "long" not in self._lost:
            self._lost.add("long")
            warnings.warn(
                f"A rollout is too long for {rollouts.file_bytes} bytes of a file and is left out of the record, as "
                "others will be; raise `max_bytes` of RunRecorder.",
                stacklevel=2,
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._open is None or not isinstance(pl_module, DMPO):
            return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        # Kept as tensors, for which nobody waits until the buffer is used up.
        self._losses += [loss.detach()] if isinstance(loss, Tensor) else []
        self._open["first"] = self._open["first"] or _scalars(trainer)
        if pl_module.buffer.needs_rollouts:
            self._close(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        # A run that was ended before a validation makes it before its training starts.
        self._start(trainer, pl_module)
        self._validated_at = trainer.global_step
        is_dmpo = isinstance(pl_module, DMPO)
        values = {name: value for name, value in _scalars(trainer).items() if name.startswith("val/") or not is_dmpo}
        self._write(trainer, pl_module, {"kind": "validation"}, values)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close(trainer, pl_module)
        self._seconds = self._seconds_by_now()

    def _close(self, trainer: Trainer, module: LightningModule) -> None:
        """Writes the scalars of the buffer that is used up."""
        if self._open is None:
            return
        logged = self._open["first"] | _scalars(trainer)
        values = {name: value for name, value in logged.items() if not name.startswith(("val/", "test/"))}
        values |= self._open["values"] | {name: values[name] for name in values if name.startswith("time/")}
        if self._losses:
            values["train/loss"] = float(sum(loss.float() for loss in self._losses) / len(self._losses))
        named = {name: self._open[name] for name in ("iteration", "left_out") if name in self._open}
        self._open, self._losses = None, []
        self._write(trainer, module, {"kind": "buffer"} | named, values)

    def _write(
        self, trainer: Trainer, module: LightningModule, what: dict[str, Any], values: Mapping[str, float]
    ) -> None:
        directory = self._directory
        if directory is None or not trainer.is_global_zero:
            return
        line = encoded(
            finite(
                what
                | {
                    "step": trainer.global_step,
                    "rollouts": getattr(module, "rollouts_seen", 0),
                    "seconds": round(self._seconds_by_now(), 3),
                    "values": values,
                }
            )
        )
        self._try(METRICS, lambda: append(directory / METRICS, line))

    def _seconds_by_now(self) -> float:
        return self._seconds if self._started is None else time.perf_counter() - self._started

    def _try(self, what: str, write: Callable[[], object]) -> None:
        """Writes if it can. A run is worth more than its record."""
        try:
            write()
        except OSError as error:
            if what not in self._lost:
                self._lost.add(what)
                warnings.warn(
                    escaped(
                        f"The run goes on without {what} in {self._directory}, or with a part of it: {error}. "
                        "`dmpo-lightning report` will show what could be written."
                    ),
                    stacklevel=2,
                )


def _made(directory: Path) -> bool:
    directory.mkdir(parents=True, exist_ok=True)
    return True


def _scalars(trainer: Trainer) -> dict[str, float]:
    """All that was logged last, of this rank, or of all where it was logged so."""
    return {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
