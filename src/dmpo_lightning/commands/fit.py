"""``dmpo-lightning fit``, ``validate``, ``test`` and ``predict``: the Lightning CLI, with model and data by class.

Tokenizer and seed are filled in from the rest of the configuration.
"""

import logging
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn

import torch
import yaml  # type: ignore[import-untyped]
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info
from transformers.utils.logging import disable_progress_bar

from dmpo_lightning.callbacks.completion_records import LoggingExtras
from dmpo_lightning.callbacks.evaluation import EvaluationReport
from dmpo_lightning.callbacks.facts import ConfigInCheckpoint
from dmpo_lightning.callbacks.guards import Guards
from dmpo_lightning.callbacks.preemption import Preemption
from dmpo_lightning.callbacks.progress import ProgressLine
from dmpo_lightning.callbacks.records import RunRecorder
from dmpo_lightning.checkpoints.reading import UnfitCheckpointError, newest_readable, why_unfit, why_unsafe
from dmpo_lightning.checkpoints.writing import remove_partial
from dmpo_lightning.commands.arguments import merged_node, nearest
from dmpo_lightning.commands.closing import closing_text, is_interrupt
from dmpo_lightning.commands.mistakes import LAST, is_elsewhere
from dmpo_lightning.distributed.internals import was_restoring
from dmpo_lightning.modules.base import PolicyModule
from dmpo_lightning.modules.run_directory import KINDS, Start, choose_directory, own_directories
from dmpo_lightning.terminal import error_line, escaped

ADDED: tuple[type[Callback], ...] = (LoggingExtras, RunRecorder, EvaluationReport, Guards, Preemption)
"""Callbacks of every run from the command line, unless it has one of that class: what a run leaves and shows."""
# Class paths nest, and the last one named before the key is the one that refused it.
REFUSED = re.compile(r".*given class_path '([\w.]+)'.*Option '([\w.]+)' is not accepted", re.DOTALL)
"""How the parser says that the constructor of a class takes no argument of a name."""
CAUSE = re.compile(r"(?:module '[\w.]+' has|No module|Import path|Expected an? (?!path but)).*")
"""How it says what is wrong with a value."""
HELP = "Options of DMPO and its parts: dmpo-lightning options; recipes: dmpo-lightning configs. Below: the Trainer's."
NOISE = (
    *("💡", "GPU available", "TPU available", "HPU available", "LOCAL_RANK", "Seed set to"),
    *("`Trainer.fit` stopped: `max_", "\nDetected KeyboardInterrupt", "`weights_only` was not set"),
)
"""How messages begin that advertise, or that `dmpo-lightning` says better."""
KNOWN = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated.*",
    r".*does not have many workers.*",
    r"LightningCLI's args parameter is intended.*",
    r".*Checkpoint directory .* exists and is not empty.*",
    # They are kept (`continue_log`).
    r".*Experiment logs directory .* exists and is not empty.*",
)
"""Warnings that Lightning gives in a run without fault, and that nobody can do anything about."""


class DMPOArgumentParser(LightningArgumentParser):
    """Says what is missing or what exists in one line, instead of printing every option of the Trainer."""

    def __init__(self, *args: Any, **options: Any) -> None:
        # Else `--trainer.max_step` would mean `max_steps`, or another option in the next version of Lightning.
        super().__init__(*args, **{"allow_abbrev": False} | options)

    def parse_string(self, content: str, path: Any = "", *arguments: Any, **options: Any) -> Any:
        """As the parser reads a configuration, in which it merges a model's name and knows home folders."""
        content = str(yaml.serialize(merged_node(content, str(path) or content)))
        return super().parse_string(content, path, *arguments, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if self.exit_on_error:
            self.exit(2, f"dmpo-lightning: {escaped(_remedy(message))}\n")
        super().error(message, ex)


def _remedy(message: str) -> str:
    """One line on what is wrong: the innermost cause, of which the parser names one for each kind of value it tried."""
    if refused := REFUSED.match(message):
        hint = nearest(refused[2], signature(resolve_name(refused[1])).parameters)
        return f"There is no option {refused[1].rpartition('.')[2]}.{refused[2]}.{hint}"
    keys = re.findall(r'Parser key "([\w.]+)"', message)
    causes = dict.fromkeys(CAUSE.findall(message.rpartition("Parser key")[2]))
    if not (keys and causes):
        return " ".join(message.split())[:500]
    said = re.sub(r"<class '(?:\w+\.)*(\w+)'>|typing\.", r"\1", "; ".join(causes)).replace("NoneType", "null")
    return f"`{'.'.join(keys)}` cannot be read: {said}."


class DMPOCLI(LightningCLI):
    """``fit``, ``validate``, ``test`` and ``predict`` for a `PolicyModule` and any datamodule, both by class path."""

    def __init__(self, *arguments: Any, typed: Sequence[str] = (), **options: Any) -> None:
        """``typed`` is the command as it was typed, which the end of a run says again."""
        self.typed = list(typed)
        super().__init__(*arguments, **options)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model.init_args.model", "data.init_args.tokenizer", compute_fn=tokenizer_source)
        parser.add_argument(
            "--trust_checkpoint",
            action="store_true",
            help="take a checkpoint from a URL, of DeepSpeed, or one that holds more than data; each can run any code",
        )

    def _parse_ckpt_path(self) -> None:
        """Does nothing. In Lightning the ``hyper_parameters`` of a checkpoint choose the model's class and arguments,
        so that a foreign file would say what is executed. `PolicyModule` stores none.
        """

    def before_instantiate_classes(self) -> None:
        """One seed for everything: the model takes `seed_everything` unless it was given its own."""
        config = self.config.get(self.subcommand, self.config)
        options = config.model.init_args if config.model else None
        # A module of one's own may have no such argument, which is another thing than None.
        if options is not None and options.get("seed", 0) is None:
            options["seed"] = config.seed_everything

    def instantiate_classes(self) -> None:
        """As Lightning does it. What a constructor refuses is one line and status 2, not a traceback."""
        config = self.config.get(self.subcommand, self.config)
        _check_trainer(config.trainer)
        _check_optimizer(config.model.init_args if config.model else {})
        model = config.get("model.init_args.model")
        if model is not None:
            name = model if isinstance(model, str) else model.get("init_args", model).get("model")
            # It takes minutes where a model is large.
            rank_zero_info(escaped(f"Loading the model {name} ..."))
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise ValueError(_constructor_message(error)) from error

    def instantiate_trainer(self, **options: Any) -> Trainer:
        """As Lightning does it, with the callbacks in `ADDED`, and with our own line of progress in the place of
        Lightning's bars, unless one is configured or none is wanted.
        """
        given = self._get(self.config_init, "trainer", default={})
        configured = given.get("callbacks") or []
        callbacks = list(configured) if isinstance(configured, list) else [configured]
        if given.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            # First of all, so that it is there when the others report.
            callbacks.insert(0, ProgressLine())
        callbacks += [kind() for kind in ADDED if not any(isinstance(each, kind) for each in callbacks)]
        return super().instantiate_trainer(**{**options, "callbacks": callbacks})

    def _choose_checkpoint(self) -> None:
        """Replaces ``last`` by the newest checkpoint of all runs of that name, so that a requeued job needs no other
        command. An evaluation needs that there is one. Any other checkpoint must be data alone, or trusted.
        """
        options = self.config_init[self.subcommand]
        path, trusted = options.get("ckpt_path"), options.get("trust_checkpoint")
        if path == LAST:
            options["ckpt_path"] = newest_checkpoint(self.trainer, self.model, continues=self.subcommand == "fit")
            if options["ckpt_path"] is None and self.subcommand != "fit":
                raise ValueError("`--ckpt_path last` found no checkpoint; pass its path, or leave it out.")
        elif path is not None and not trusted:
            elsewhere = "it is not on this machine, where it could be checked; download it"
            if problem := elsewhere if is_elsewhere(str(path)) else why_unsafe(Path(path)):
                trust = "if you trust who wrote it, add --trust_checkpoint"
                raise ValueError(f"`--ckpt_path {path}`: {problem}; {trust}.")

    def _run_subcommand(self, subcommand: str) -> None:
        """As Lightning does it. A start of which nothing comes leaves no directory, and what Lightning, torch or a
        callback cannot restore of a checkpoint is one line.
        """
        self._start = Start()
        try:
            super()._run_subcommand(subcommand)
            self._close()
        # torch gathers the errors of all ranks in one that is no `Exception`.
        except BaseException as error:
            if not self._start.undo():
                self._close(error)
            elif is_interrupt(error):
                print("Interrupted before anything came of the run: nothing is kept.", file=sys.stderr)
            if not was_restoring(error) or isinstance(error, UnfitCheckpointError | KeyboardInterrupt | SystemExit):
                raise
            path = self.config_init[subcommand].get("ckpt_path")
            raise UnfitCheckpointError(f"`--ckpt_path {path}` cannot be restored: {error_line(error)}") from error

    def _close(self, error: BaseException | None = None) -> None:
        """Says what came of the run, unless what ended it says enough."""
        has_begun = self.trainer.state.fn is not None and not self.trainer.fast_dev_run  # type: ignore[attr-defined]
        if has_begun and self.trainer.is_global_zero and not isinstance(error, ValueError | OSError):
            checkpoint = self.config_init[self.subcommand].get("ckpt_path")
            print(closing_text(self.trainer, self.model, self.typed, checkpoint=checkpoint, error=error), flush=True)

    # The hooks below are called once the Trainer exists, whose ranks can choose together
    # (docs/decisions/027-last-checkpoint.md).

    def before_validate(self) -> None:
        """Chooses the checkpoint, and then a directory."""
        self._choose_checkpoint()
        self._start = choose_directory(self.trainer, kind=KINDS[str(self.subcommand)])

    before_test = before_predict = before_validate

    def before_fit(self) -> None:
        """Chooses the checkpoint, and then a directory: a run that goes on has that of the checkpoint's run."""
        self._choose_checkpoint()
        self._start = choose_directory(self.trainer, self.config_init[self.subcommand].get("ckpt_path"))


def _check_trainer(options: Mapping[str, Any]) -> None:
    """Raises ValueError for what the Trainer refuses of its plain options, such as a GPU that is not there.

    Lightning makes the Trainer when the model is loaded, which may take minutes.
    """
    plain: dict[str, Any] = {name: x for name, x in vars(options).items() if isinstance(x, int | float | str)}
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Trainer(**plain | {"logger": False, "enable_checkpointing": False, "enable_model_summary": False})
    except Exception as error:
        said = " ".join(str(error).split())
        named = [f"--trainer.{name} {x}" for name, x in plain.items() if {name, x} & set(re.findall(r"\w+", said))]
        raise ValueError(f"The Trainer refuses {' '.join(named) or 'its options'}: {said}") from error
    finally:
        logging.disable(logging.NOTSET)


def _check_optimizer(options: Mapping[str, Any]) -> None:
    """Raises ValueError for what an optimizer or scheduler of torch refuses, which are made when a run starts."""
    # A matrix, as the weights of adapters are, of which alone some optimizers take any, such as Muon.
    made: Any = [torch.nn.Parameter(torch.zeros(1, 1))]
    for name in ("optimizer", "lr_scheduler"):
        given = options.get(name)
        if given is None or callable(given) or not str(given.get("class_path")).startswith("torch.optim."):
            return
        try:
            made = resolve_name(given["class_path"])(made, **given.get("init_args", {}))
        except Exception as error:
            said = " ".join(str(error).split())
            raise ValueError(f"`model.{name}`: {given['class_path']} refuses its options: {said}.") from error


def newest_checkpoint(trainer: Trainer, module: LightningModule, *, continues: bool) -> str | None:
    """The newest usable checkpoint of all runs of that name, and in the folders of each `ModelCheckpoint`.

    Says which it is, or that there is none yet, and then returns None. Rank 0 decides for all, because other nodes may
    not see yet what it sees (docs/decisions/027-last-checkpoint.md).

    Args:
        trainer: whose logger and callbacks say where the checkpoints are.
        module: which says what it needs of one.
        continues: whether training goes on. It needs more of a checkpoint than an evaluation.
    """
    strategy: Any = trainer.strategy
    # Lightning's own launcher starts the other ranks on this machine once rank 0 has chosen.
    if trainer.world_size == 1 or isinstance(strategy.cluster_environment, LightningEnvironment):
        return _newest_checkpoint(trainer, module, continues=continues)
    # The ranks join now. The Trainer does both again, which changes nothing for those who have joined.
    strategy.connect(module)
    strategy.setup_environment()
    first = trainer.is_global_zero
    return strategy.broadcast(_newest_checkpoint(trainer, module, continues=continues) if first else None)


def _newest_checkpoint(trainer: Trainer, module: LightningModule, *, continues: bool) -> str | None:
    # Where Lightning's `ModelCheckpoint` writes. Next to the runs there may be those of other names.
    directories, place = own_directories(trainer)
    if trainer.logger is None:
        # There own programs write, whose runs have no directories.
        directories.append(Path(trainer.default_root_dir))
    folders = [each / "checkpoints" for each in directories]
    # A `ModelCheckpoint` may write anywhere.
    callbacks = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    own = [Path(callback.dirpath) for callback in callbacks if callback.dirpath]
    if continues:
        remove_partial(*folders, *own)
    keys: Sequence[str] = getattr(module, "checkpoint_keys", ())
    newest = newest_readable(*folders, *own, why_unusable=lambda path: why_unfit(path, keys=keys, continues=continues))
    where = " and ".join(map(str, [place / "checkpoints", *own]))
    rank_zero_info(f"No checkpoint in {where}: starts afresh." if newest is None else f"Continues from {newest}.")
    return None if newest is None else str(newest.absolute())


def _constructor_message(error: ValueError) -> str:
    """The constructor's own words: the innermost ValueError, without what the parser has wrapped around it."""
    chain: list[BaseException] = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(inner)
    return str(next(each for each in reversed(chain) if type(each) is ValueError or each is error))


def tokenizer_source(model: Any) -> Any:
    """Where the datamodule finds the model's tokenizer, from a name or the parsed options of a `Backbone`."""
    if isinstance(model, str | None):
        return model
    options = model.get("init_args", model)
    return options.get("tokenizer") or options.get("model")


class ParsedOnly(DMPOCLI):
    """Stops when it has parsed, and seeds nothing."""

    def instantiate_classes(self) -> None:
        """Does nothing, as what follows."""

    _set_seed = instantiate_classes


def command_line(arguments: Sequence[str], cli: type[DMPOCLI] = DMPOCLI, **options: Any) -> DMPOCLI:
    """Parses, and runs unless ``options`` of `LightningCLI` say otherwise."""
    return cli(
        PolicyModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        parser_class=DMPOArgumentParser,
        seed_everything_default=0,
        # Optimizer and scheduler are arguments of the modules, not of the command line.
        auto_configure_optimizers=False,
        args=list(arguments),
        **options,
    )


def is_news(record: logging.LogRecord) -> bool:
    """A filter for loggers, which keeps what is none of `NOISE`."""
    return not record.getMessage().startswith(NOISE)


def quiet() -> None:
    """Silences advertisements, deprecations and warnings without a remedy, unless ``-W`` or PYTHONWARNINGS ask for any.

    Called once torch and Lightning are imported, since warnings that are configured later win.
    """
    for name in ("lightning", "lightning.fabric", "lightning.pytorch"):
        # A filter of the logger itself would not be asked for what its children say.
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(is_news)
    # Of transformers, which counts tensors. `instantiate_classes` says what is loaded.
    disable_progress_bar()
    if sys.warnoptions:
        return
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category)
    for message in KNOWN:
        warnings.filterwarnings("ignore", message=message)


def run(arguments: Sequence[str], typed: Sequence[str]) -> None:
    """Parses and runs. A bad configuration ends it with status 2 and a message."""
    quiet()
    command_line(
        arguments,
        typed=typed,
        parser_kwargs={
            name: {"description": HELP, "usage": f"dmpo-lightning {name} --config NAME_OR_FILE ... [--key value ...]"}
            for name in ("fit", "validate", "test", "predict")
        },
        # `ProgressLine` says how large the model is. Lightning's table counts the reference twice and FLOPs never.
        trainer_defaults={"enable_model_summary": False},
        save_config_callback=ConfigInCheckpoint,
        # Else Lightning refuses a run directory that holds a configuration already.
        save_config_kwargs={"overwrite": True},
    )
