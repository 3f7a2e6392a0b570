"""The record of a run on disk: what it is, its scalars, its rollouts. What is shown of a run later is read from it."""

import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from uuid import uuid4

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from dmpo_lightning.callbacks.completion_records import rollout_records
from dmpo_lightning.callbacks.facts import run_facts
from dmpo_lightning.distributed.ranks import gather_ranks
from dmpo_lightning.modules.dmpo import DMPO
from dmpo_lightning.modules.observers import RolloutObserver
from dmpo_lightning.modules.run_directory import run_directory
from dmpo_lightning.reports.lines import append, encoded, keep_lines, read_file, replace, set_aside, write_object
from dmpo_lightning.reports.page import write_report
from dmpo_lightning.reports.record import AFTER, METRICS, REPORT, ROLLOUTS, RUN, SUMMARY
from dmpo_lightning.rollout import RolloutBuffer
from dmpo_lightning.terminal import error_line, escaped

FORMAT = 2
"""Of the files. A reader of another one may find other names."""


class RunRecorder(RolloutObserver):
    """Writes what a run does into its directory, whatever its loggers are. The command line adds it by itself.

    - ``run.json``: configuration, model, data, versions and times.
    - ``metrics.jsonl``, one line per buffer, per validation and per warning of `Guards`, and one of what
      `BeforeAfterReport` measured before: step, rollouts seen, seconds and all scalars, of ``train/loss`` the mean over
      the buffer. ``left_out`` has the ``prompt_index`` of each prompt that was sampled and is not in the buffer.
    - ``rollouts/rankR-N.jsonl``, the rollouts of buffer N, one line each: prompt, completion, reward and components,
      the objective's targets (weight, signal, log_rnd), and of each token its text, the step that revealed it and its
      probability then. The oldest file goes when there are too many bytes.

    ``report.html`` shows all of it, as ``dmpo-lightning report`` does, at each validation and at the end.

    A resumed run goes on in the same files. What it does again is removed first. Files of another run that are found
    there get other names, such as ``metrics_part1.jsonl``. A file that cannot be written ends no run: a warning says
    what is lost, once for each kind of file.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from dmpo_lightning import RunRecorder
        >>> trainer = Trainer(callbacks=[RunRecorder()])
    """

    max_bytes = 2**28
    """Of all rollouts on disk, over all ranks. The last buffer stays in any case."""

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._directory: Path | None = None
        self._open: dict[str, Any] | None = None
        """The buffer that is being trained on: its number, its losses, and the scalars of its collection, which a run
        that is resumed within the buffer does not log again.
        """
        self._logged: dict[str, Any] = {}
        """What was logged last, by the last batch or before the run was resumed."""
        self._run: str | None = None
        """By which a record and a checkpoint are known to be of one run."""
        self._lines, self._seconds, self._validation_started = 0, 0.0, 0.0
        """Lines of metrics, and seconds that the run took until it was resumed."""
        self._started: float | None = None
        self._lost: set[str] = set()
        self._page_at = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Each fit has its own record. What a checkpoint holds comes afterwards."""
        if stage == TrainerFn.FITTING:
            self._forget()

    def state_dict(self) -> dict[str, Any]:
        now = self._open and {**self._open, "losses": list(map(float, self._open["losses"]))}
        state = {"open": now, "logged": _numbers(self._logged), "lines": self._lines}
        return state | {"seconds": self.seconds_by_now(), "run": self._run}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._open, self._logged, self._lines = (state_dict[name] for name in ("open", "logged", "lines"))
        self._seconds, self._run = state_dict["seconds"], state_dict["run"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Before anything of this run is written there. Some strategies read the state of a resumed run later.
        if trainer.ckpt_path is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._make_way(trainer, run_directory(trainer))

    def _make_way(self, trainer: Trainer, directory: Path) -> None:
        """The record of another run that is found in the directory gets another name."""
        found = read_file(directory / RUN).get("run")
        if trainer.ckpt_path is None or self._run not in (None, found):
            for name in (RUN, METRICS, ROLLOUTS, SUMMARY) if trainer.is_global_zero else ():
                with self._trying(name):
                    set_aside(directory / name)
            found = None
        self._run = found or uuid4().hex

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes back what earlier parts of the run wrote beyond the checkpoint, and says what the run is.

        All ranks call it together, as often as they like.
        """
        if self._directory is not None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        # On all ranks, because it is a broadcast.
        directory = self._directory = run_directory(trainer)
        if trainer.ckpt_path is not None:
            self._make_way(trainer, directory)
        self._started = time.perf_counter() - self._seconds
        collected = getattr(pl_module, "buffers_collected", 0)
        if self._open is not None and self._open["buffer"] >= collected:
            # The checkpoint was rewound to before this buffer (`Continuation`).
            self._open = None
        elif self._open is not None and isinstance(pl_module, DMPO) and not pl_module.buffer.needs_rollouts:
            # Or to within it.
            del self._open["losses"][pl_module.buffer.position :]
        if trainer.is_global_zero:
            with self._trying(ROLLOUTS):
                for path in (directory / ROLLOUTS).glob("rank*-*.jsonl"):
                    if int(path.stem.rpartition("-")[2]) >= collected:
                        path.unlink()
            with self._trying(METRICS):
                self._lines = keep_lines(directory / METRICS, self._lines)
            with self._trying(RUN):
                now, earlier = datetime.now(timezone.utc).isoformat(timespec="seconds"), read_file(directory / RUN)
                facts = {"format": FORMAT, "run": self._run, "started": earlier.get("started", now)}
                if trainer.ckpt_path is not None:
                    facts["resumed"] = [*earlier.get("resumed", []), {"at": now, "step": trainer.global_step}]
                write_object(directory / RUN, facts | run_facts(trainer, pl_module))
        # No rank writes before the directory is free.
        trainer.strategy.barrier()

    def on_rollouts(self, trainer: Trainer, module: Any, buffer: RolloutBuffer) -> None:
        directory = self._directory
        if directory is None:
            return
        # The end of an epoch may have cut the last one short.
        self._close(trainer, module)
        times = {f"time/{name}": seconds for name, seconds in buffer.seconds.items()}
        values = {**times, **buffer.means, "rollouts/seen": float(module.rollouts_seen)}
        self._open = {"buffer": buffer.number, "values": values, "losses": []}
        if module.sampling_rounds > 1:
            self._open["left_out"] = [index for each in gather_ranks(list(buffer.left_out)) for index in each]
        with self._trying(ROLLOUTS):
            folder, rank = directory / ROLLOUTS, f"rank{trainer.global_rank}"
            records = rollout_records(buffer, module.policy.tokenizer, getattr(trainer, "datamodule", None))
            replace(folder / f"{rank}-{buffer.number:06d}.jsonl", b"".join(map(encoded, records)))
            files = sorted(folder.glob(f"{rank}-*.jsonl"))
            sizes = [path.stat().st_size for path in files]
            for position, path in enumerate(files[:-1]):
                if sum(sizes[position:]) > self.max_bytes // trainer.world_size:
                    path.unlink()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *batch: Any) -> None:
        if self._open is None or not isinstance(pl_module, DMPO):
            return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        # Kept as tensors, for which nobody waits until the buffer is used up.
        self._open["losses"] += [loss.detach()] if isinstance(loss, Tensor) else []
        self._logged.update(trainer.callback_metrics)
        if pl_module.buffer.needs_rollouts:
            self._close(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_started = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        scalars, is_dmpo = _numbers(trainer.callback_metrics), isinstance(pl_module, DMPO)
        values = {name: value for name, value in scalars.items() if name.startswith("val/") or not is_dmpo}
        values["time/validation"] = round(time.perf_counter() - self._validation_started, 3)
        self.note(trainer, pl_module, {"kind": "validation", "values": values})
        before = time.perf_counter()
        if self._directory is not None and trainer.is_global_zero and before >= self._page_at:
            write_page(self._directory, live=True)
            # That of a long run takes longer, and a run has other things to do: at most a twentieth goes into it.
            self._page_at = time.perf_counter() + 20 * (time.perf_counter() - before)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A run that goes on from here to more steps goes on in the buffer, of which it then writes another line.
        now = self._open, self._lines
        self._close(trainer, pl_module)
        self._open, self._lines = now
        self._seconds = self.seconds_by_now()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Behind what other callbacks write at the end.
        if stage == TrainerFn.FITTING and self._directory is not None and trainer.is_global_zero:
            write_page(self._directory)

    def note(self, trainer: Trainer, module: LightningModule, line: Mapping[str, Any]) -> None:
        """Records what another callback knows, such as what a guard has said. All ranks call it together."""
        # A run that was ended before a validation makes it before its training starts.
        self.on_train_start(trainer, module)
        if self._directory is None or not trainer.is_global_zero:
            return
        # A run that goes on to more steps takes its end back.
        self._lines += line["kind"] != AFTER
        rollouts, seconds = getattr(module, "rollouts_seen", 0), round(self.seconds_by_now(), 3)
        progress = {"step": trainer.global_step, "rollouts": rollouts, "seconds": seconds}
        with self._trying(METRICS):
            append(self._directory / METRICS, encoded({**progress, **line}))

    def _close(self, trainer: Trainer, module: LightningModule) -> None:
        """Writes the scalars of the buffer that is used up."""
        if self._open is None:
            return
        line, self._open = {"kind": "buffer", **self._open}, None
        losses, logged = line.pop("losses"), _numbers(self._logged).items()
        before = {name: each for name, each in logged if not name.startswith(("val/", "test/"))}
        loss = {"train/loss": sum(map(float, losses)) / len(losses)} if losses else {}
        self.note(trainer, module, {**line, "values": before | line["values"] | loss})

    def seconds_by_now(self) -> float:
        """How long the run has taken, all of its parts together."""
        return self._seconds if self._started is None else time.perf_counter() - self._started

    @contextmanager
    def _trying(self, what: str) -> Iterator[None]:
        """Has the run go on where a file cannot be written. A run is worth more than its record."""
        try:
            yield
        except OSError as error:
            if what not in self._lost:
                self._lost.add(what)
                said = f"The run goes on without {what} in {self._directory}, or with a part of it: {error}."
                warnings.warn(escaped(said), stacklevel=2)


def write_page(directory: Path, *, live: bool = False) -> None:
    """Makes the page of a run from its files, on one rank. One that is ``live`` says that the run goes on."""
    try:
        write_report([directory], directory / REPORT, live=live)
    # Files may be of any kind, what draws raises what it likes, and a run is worth more than its page.
    except Exception as error:
        warnings.warn(escaped(f"The run goes on without {directory / REPORT}: {error_line(error)}."), stacklevel=2)


def _numbers(logged: Mapping[str, Any]) -> dict[str, float]:
    """What was logged as single numbers, of this rank, or of all where it was logged so."""
    return {name: float(each) for name, each in logged.items() if not isinstance(each, Tensor) or each.numel() == 1}
