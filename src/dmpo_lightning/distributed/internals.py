"""What Lightning and torch keep to themselves and this package relies on, each with the reason.

Everything private that is touched stands here, so that a new version of Lightning is checked in one place. The tests
of `DMPO` with a Trainer and of `Preemption` name the behaviour that is relied upon.
"""

import csv
import io
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.trainer.connectors import checkpoint_connector
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch.distributed import distributed_c10d

from dmpo_lightning.reports.lines import replace, set_aside

Kind = TypeVar("Kind")
VALIDATION_IS_DUE = "validation_is_due"


def attached_trainer(module: LightningModule) -> Trainer | None:
    """The Trainer of a module, or None where it has none yet, at which the public property raises an error."""
    return module._trainer


def is_being_fitted(module: LightningModule) -> bool:
    """Whether a Trainer is training the module, rather than evaluating it, or nothing."""
    trainer = attached_trainer(module)
    return trainer is not None and trainer.state.fn == TrainerFn.FITTING


def callbacks_of(trainer: Trainer, kind: type[Kind]) -> list[Kind]:
    """The Trainer's callbacks of a class, in their order."""
    # Lightning does not declare the attribute.
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [each for each in callbacks if isinstance(each, kind)]


def call_last(trainer: Trainer, callback: Any) -> None:
    """Has all other callbacks go before this one in each hook, `ModelCheckpoint` included."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    # A new list, because Lightning may be going through the old one.
    trainer.callbacks = [*(each for each in callbacks if each is not callback), callback]  # type: ignore[attr-defined]


def prepare_training_loaders(trainer: Trainer, prepare: Callable[[Any], Any]) -> None:
    """Every training loader goes through ``prepare`` before the Trainer asks for its length, the first one now.

    Lightning has no public hook between creating a training loader and asking for its length, and `DMPO` must tell its
    loader in between how often a batch of prompts is used. The first one is taken now, so that what is wrong with it is
    an error before anything is computed.
    """
    # Of an earlier fit of this Trainer there is a source that would prepare loaders for another module.
    source = trainer.fit_loop._data_source
    prepared = _PreparedLoaders(source.instance, source.name, prepare)
    prepared.first = prepared.dataloader()
    trainer.fit_loop._data_source = prepared


@dataclass
class _PreparedLoaders(_DataLoaderSource):
    """Where Lightning gets training loaders from, with what `DMPO` has to tell each of them in between."""

    prepare: Callable[[Any], Any]
    first: Any = None

    def dataloader(self) -> Any:
        first, self.first = self.first, None
        return self.prepare(super().dataloader()) if first is None else first


def is_accumulating(trainer: Trainer) -> bool:
    """Whether the present batch ends without an optimizer step, which nothing public says before it has ended."""
    return bool(trainer.fit_loop.epoch_loop._should_accumulate())


def resume_whole_runs(trainer: Trainer) -> None:
    """Has a run that continues make all that was left to do at its checkpoint, and not training steps alone."""
    trainer.fit_loop.__class__ = _WholeFitLoop


class _WholeFitLoop(_FitLoop):
    """Lightning's, which forgets a validation that was due when a checkpoint was saved, and leaves out the end of a run
    whose checkpoint is that of its last step: `on_train_end`, in which reports evaluate and exports are written.
    """

    validation_is_due = False
    """Whether the checkpoint was saved before the validation of its step was done. It is then made, from its first
    batch, before training goes on."""

    def run(self) -> None:
        self.setup_data()
        if self.trainer.ckpt_path is None or 0 in (self.max_batches, self.trainer.limit_train_batches) or not self.done:
            super().run()
            return
        self.on_run_start()
        super().on_run_end()

    def reset(self) -> None:
        super().reset()
        if self.restarted_mid_epoch and self.epoch_progress.total.completed == self.epoch_progress.total.ready:
            # Behind the last batch of an epoch the next one begins, and calls the hooks of its start, at which
            # callbacks such as `BaseFinetuning` act. Lightning takes it for the middle of an epoch.
            self.reset_restart_stage()

    def on_run_start(self) -> None:
        super().on_run_start()
        is_due, self.validation_is_due = self.validation_is_due, False
        if is_due and self.trainer.enable_validation:
            self._validate()

    def on_run_end(self) -> None:
        """What comes now may take long, and be killed: the file that is called the last one is of the last step."""
        for callback in self.trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and not callback._should_skip_saving_checkpoint(self.trainer):
                candidates = callback._monitor_candidates(self.trainer)
                if callback.save_last == "link":
                    callback._save_topk_checkpoint(self.trainer, candidates)
                callback._save_last_checkpoint(self.trainer, candidates)
        super().on_run_end()

    def state_dict(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Where steps and not epochs end the run, as it was before the end of an epoch was counted.

        Lightning counts the epoch in which the last step falls as a whole one, and goes on behind an epoch that is
        counted with a batch that it has not got.
        """
        state = super().state_dict(*arguments, **options)
        epochs, batches = state["epoch_progress"], state["epoch_loop.batch_progress"]
        is_counted = 0 < epochs["total"]["started"] <= epochs["total"]["processed"]
        if is_counted and self.max_steps != -1 and batches["total"]["ready"]:
            for counts in (epochs["total"], epochs["current"]):
                counts.update(processed=counts["started"] - 1, completed=counts["started"] - 1)
            for counts in (batches["total"], batches["current"]):
                counts["completed"] = counts["ready"] - 1
            # Lightning counts it again on a resume.
            state["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
        return state

    def on_save_checkpoint(self) -> dict[str, Any]:
        return {**super().on_save_checkpoint(), VALIDATION_IS_DUE: self.validation_is_due or self._is_before_validation}

    def on_load_checkpoint(self, state_dict: dict[str, Any]) -> None:
        super().on_load_checkpoint(state_dict)
        self.validation_is_due = state_dict.get(VALIDATION_IS_DUE, False)

    @property
    def _is_before_validation(self) -> bool:
        """Whether a batch has ended whose validation is not done."""
        validation = self.epoch_loop.val_loop.batch_progress
        if self.trainer.validating:
            return not validation.is_last_batch or validation.current.completed < validation.current.ready
        batches: Any = self.epoch_loop.batch_progress.total
        fetcher: Any = self._data_fetcher
        # Nothing public says it before.
        return batches.completed < batches.processed and self.epoch_loop._should_check_val_fx(fetcher)

    def _validate(self) -> None:
        """Makes a whole validation. Of one that a checkpoint has interrupted Lightning would make the rest, so that its
        means are those of a part, or nothing.
        """
        loop, connector = self.epoch_loop.val_loop, self.trainer._logger_connector
        loop.restarting = False
        loop.reset_restart_stage()
        first_loop_iter = connector._first_loop_iter
        self.trainer.validating = True
        loop.run()
        self.trainer.training = True
        connector._first_loop_iter = first_loop_iter
        # Else an epoch that this validation ends is left before its end is noted, and is repeated without end.
        loop._has_run = False


def cluster_environment(trainer: Trainer) -> Any:
    """Where the job runs. Strategies of one device have none, which may be a job of SLURM's all the same."""
    return trainer._accelerator_connector.cluster_environment


def log_step(trainer: Trainer) -> None:
    """Within a training batch, gives loggers what it has logged, which Lightning does behind the last of its hooks."""
    if trainer.training and trainer._logger_connector._first_loop_iter is not None:
        trainer._logger_connector.update_train_step_metrics()


def replace_original_handlers(trainer: Trainer, handlers: Mapping[Any, Any]) -> None:
    """Has Lightning put these handlers of signals back at the end.

    It keeps those that it finds shortly before training, a callback's, and would put them back behind the callback.
    """
    originals = trainer._signal_connector._original_handlers
    originals.update({number: each for number, each in handlers.items() if number in originals})


def divide_data_among_all_ranks(strategy: Any) -> None:
    """Gives `ModelParallelStrategy` its data-parallel size, which is public only at construction, when the number of
    ranks is not known yet.
    """
    if strategy._data_parallel_size == "auto":
        strategy._data_parallel_size = strategy.num_nodes * strategy.num_processes


def set_timeout_of_all_groups(strategy: Any) -> None:
    """Applies the strategy's timeout to every process group.

    DeepSpeed gives torch's own of half an hour to those that it adds, and torch has no public way to list the groups or
    to change their timeout.
    """
    timeout: timedelta | None = strategy._timeout
    if timeout is not None:
        for group in list(distributed_c10d._world.pg_map):
            distributed_c10d._set_pg_timeout(timeout, group)


def was_restoring(error: BaseException) -> bool:
    """Whether an error comes from where Lightning takes a state out of a checkpoint."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(each.filename == checkpoint_connector.__file__ and "resto" in each.name for each in frames)


def averaged_module(callback: Any) -> Any:
    """The copy of the module in which one of Lightning's callbacks averages weights, or None before there is one."""
    average = callback._average_model
    # The one keeps a copy of the module itself, the other has torch keep it.
    return getattr(average, "module", average)


class NoLog(DummyLogger):
    """Keeps no log. In a run without a logger it says where the run lives, as a logger of files does."""

    name = property(lambda self: "lightning_logs")
    save_dir = property(lambda self: self._root)
    version = property(lambda self: self._version)

    def __init__(self, root: str) -> None:
        super().__init__()
        self._root, self._version = root, None


FILE_LOGGERS = (TensorBoardLogger, CSVLogger, NoLog)


def given_version(logger: Any) -> str | None:
    """The name of the run's directory that a logger was given or has begun, None where it has none yet."""
    # By name, because W&B may not be installed.
    is_wandb = type(logger).__name__ == "WandbLogger"
    version = logger._version if isinstance(logger, FILE_LOGGERS) else logger._id if is_wandb else None
    return f"version_{version}" if isinstance(version, int) else version


def name_version(logger: Any, name: str) -> None:
    """Has a logger write to the run's directory of that name.

    Loggers take versions and ids at construction only, before it is known which checkpoint a run continues from. Called
    before the logger has begun its run.
    """
    if isinstance(logger, FILE_LOGGERS):
        number = name.removeprefix("version_")
        logger._version = int(number) if number.isdecimal() and number != name else name
    elif type(logger).__name__ == "WandbLogger":
        logger._id = logger._wandb_init["id"] = name


@rank_zero_only
def continue_log(logger: Any, first: int | None, *, is_validated: bool) -> None:
    """Has a logger that has written to its directory before go on from a step, as if it had not gone beyond it.

    Lightning's logger of CSV files deletes those that it finds; they get other names. TensorBoard hides what it is told
    that comes again, and shows the hyper-parameters that the run began with.

    Args:
        logger: that has not begun yet.
        first: the first step that comes again, None if that is not known.
        is_validated: whether the validation before it was logged. It may be made again, for its checkpoint.
    """
    if isinstance(logger, TensorBoardLogger):
        logger._default_hp_metric = False
        # The command line gives every option, those that nobody has set as None.
        if first is not None and logger._kwargs.get("purge_step") is None:
            logger._kwargs["purge_step"] = first
    elif isinstance(logger, CSVLogger):
        folder = Path(logger.log_dir)
        for path in folder.glob("metrics*.csv"):
            _keep_rows(path, first)
        set_aside(folder / "metrics.csv")
    if is_validated and first is not None:
        log = logger.log_metrics

        def log_what_is_new(metrics: Any, step: int | None = None) -> None:
            if step is None or step >= first:
                log(metrics, step)

        vars(logger)["log_metrics"] = log_what_is_new


def _keep_rows(path: Path, step: int | None) -> None:
    """Leaves the rows of steps that do not come again, and none that was cut off."""
    with path.open(newline="", encoding="utf-8") as file:
        head, *rows = list(csv.reader(file)) or [[]]
    if step is None or "step" not in head:
        return
    place, text = head.index("step"), io.StringIO(newline="")
    kept = [row for row in rows if len(row) == len(head) and row[place].isdecimal() and int(row[place]) < step]
    csv.writer(text).writerows([head, *kept])
    replace(path, text.getvalue().encode())
