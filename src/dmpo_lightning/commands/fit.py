"""``dmpo-lightning fit``, ``validate``, ``test`` and ``predict``: the Lightning CLI, with model and data by class.

Tokenizer and seed are filled in from the rest of the configuration.
"""

import difflib
import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info

from dmpo_lightning.callbacks.completions import CompletionWriter
from dmpo_lightning.callbacks.config import ConfigInCheckpoint
from dmpo_lightning.callbacks.evaluation_report import EvaluationReport
from dmpo_lightning.checkpoints.folders import newest_readable
from dmpo_lightning.modules.base import PolicyModule
from dmpo_lightning.modules.run_directory import continue_in_place


class DMPOArgumentParser(LightningArgumentParser):
    """Says what exists where a key is misspelt, instead of printing every option of the Trainer."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser = getattr(ex, "subcommand_parser", None) or self
        parser.usage = f"{parser.prog} [--config NAME_OR_FILE ...] [--key value ...]"
        hint = _existing_keys(message, parser)
        super().error(message if hint in message else f"{message}\n{hint}", ex)


def _existing_keys(message: str, parser: LightningArgumentParser) -> str:
    """What could have been meant by a key that was not accepted."""
    if refused := re.search(r"Option '([\w.]+)' is not accepted", message):
        owners = re.findall(r"given class_path '([\w.]+)'", message[: refused.start()])
        # Class paths nest, and the last one named before the key is the one that refused it.
        names = _constructor_arguments(owners[-1]) if owners else []
        return f"{owners[-1]} has: {', '.join(names)}.{_closest(refused[1], names)}" if names else ""
    if unknown := re.search(r"unrecognized arguments: --([\w.]+)", message):
        options = [option.removeprefix("--") for action in parser._actions for option in action.option_strings]
        group = unknown[1].rpartition(".")[0]
        names = sorted(name for name in options if name.rpartition(".")[0] == group)
        return f"Options there: {', '.join(names)}.{_closest(unknown[1], names)}" if names else ""
    return ""


def _constructor_arguments(class_path: str) -> list[str]:
    """The arguments of a class, with those that it passes on to its base classes."""
    module, _, name = class_path.rpartition(".")
    return ArgumentParser().add_class_arguments(getattr(import_module(module), name), fail_untyped=False)


def _closest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f" Did you mean {close[0]}?" if close else ""


class DMPOCLI(LightningCLI):
    """``fit``, ``validate``, ``test`` and ``predict`` for a `PolicyModule` and any datamodule, both by class path."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model.init_args.model", "data.init_args.tokenizer", compute_fn=tokenizer_source)

    def before_instantiate_classes(self) -> None:
        """One seed for everything: the model takes `seed_everything` unless it was given its own."""
        config = self.config.get(self.subcommand, self.config)
        options = config.model.init_args if config.model else None
        # A module of one's own may have no such argument, which is another thing than None.
        if options is not None and options.get("seed", 0) is None:
            options["seed"] = config.seed_everything

    def instantiate_classes(self) -> None:
        """As Lightning does it. What a constructor refuses is one line and status 2, not a traceback."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            self.parser.error(_constructor_message(error))

    def instantiate_trainer(self, **options: Any) -> Trainer:
        """As Lightning does it, with the callbacks that leave an evaluation's table and completions."""
        trainer = super().instantiate_trainer(**options)
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        for callback_class in (CompletionWriter, EvaluationReport):
            if not any(isinstance(callback, callback_class) for callback in callbacks):
                callbacks.append(callback_class())
        return trainer

    def _find_last(self) -> None:
        """Replaces ``last`` by the newest checkpoint of all runs of that name, so that a requeued job needs no other
        command. An evaluation needs that there is one.
        """
        options = self.config_init[self.subcommand]
        if options.get("ckpt_path") != "last":
            return
        options["ckpt_path"] = newest_checkpoint(self.trainer, self.model)
        if options["ckpt_path"] is None and self.subcommand != "fit":
            self.parser.error("`--ckpt_path last` found no checkpoint; pass its path, or leave it out.")

    # Called once the Trainer exists, whose ranks can choose together (docs/decisions/027-last-checkpoint.md).
    before_validate = before_test = before_predict = _find_last

    def before_fit(self) -> None:
        """A resumed run continues in the directory of its checkpoint."""
        self._find_last()
        checkpoint = self.config_init[self.subcommand].get("ckpt_path")
        if checkpoint is not None:
            continue_in_place(self.trainer, checkpoint)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """As Lightning does it, without its warning that arguments are passed in, as the entry point always does."""
        assert args is None or isinstance(args, list)
        self.config = parser.parse_args(args)


def newest_checkpoint(trainer: Trainer, module: LightningModule) -> str | None:
    """The newest readable checkpoint of all runs of that name, and in the folders of each `ModelCheckpoint`.

    Says which it is, or that there is none yet, and then returns None. Rank 0 decides for all, because other nodes may
    not see yet what it sees.
    """
    strategy: Any = trainer.strategy
    # Lightning's own launcher starts the other ranks on this machine once rank 0 has chosen.
    if trainer.world_size == 1 or isinstance(strategy.cluster_environment, LightningEnvironment):
        return _newest_checkpoint(trainer)
    # The ranks join now. The Trainer does both again, which changes nothing for those who have joined.
    strategy.connect(module)
    strategy.setup_environment()
    return strategy.broadcast(_newest_checkpoint(trainer) if trainer.is_global_zero else None)


def _newest_checkpoint(trainer: Trainer) -> str | None:
    logger = trainer.logger
    runs = Path((logger and logger.save_dir) or trainer.default_root_dir) / str((logger and logger.name) or "")
    own = [callback.dirpath for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    # A `ModelCheckpoint` may write anywhere. Without a folder of its own it writes below the run.
    folders = [runs, *(Path(folder) for folder in own if folder)]
    newest, where = newest_readable(*folders), " and ".join(map(str, folders))
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


def run(arguments: Sequence[str]) -> None:
    """Parses and runs. A bad configuration ends it with status 2 and a message."""
    DMPOCLI(
        PolicyModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        parser_class=DMPOArgumentParser,
        seed_everything_default=0,
        # Optimizer and scheduler are arguments of the modules, not of the command line.
        auto_configure_optimizers=False,
        save_config_callback=ConfigInCheckpoint,
        # Else Lightning refuses a run directory that holds a configuration already.
        save_config_kwargs={"overwrite": True},
        args=list(arguments),
    )
