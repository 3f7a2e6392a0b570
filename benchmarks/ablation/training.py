"""One run of an ablation, by the command line of the product, without what it would write or print."""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from benchmarks.ablation.grid import OF_RUN, Run

QUIET = (
    "--trainer.callbacks=null",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
)


def execute(task: tuple[Run, float]) -> list[dict[str, Any]]:
    """A run, in a process of a pool, and the solve rate at which it has collapsed. Returns its rows."""
    run, collapsed = task
    versions = {name: version(name.replace("_", "-")) for name in ("torch", "lightning", "dmpo_lightning")}
    own = {name: getattr(run, name) for name in OF_RUN}
    return [own | row | versions for row in train(run.arguments, collapsed=collapsed)]


def train(arguments: Sequence[str], *, collapsed: float) -> list[dict[str, Any]]:
    """Trains as the command line would, and returns a row per evaluation, the first of the base."""
    # Here, since the process that hands out runs trains nothing.
    import logging
    import warnings

    from benchmarks.ablation.recorder import Recorder
    from dmpo_lightning.commands.arguments import resolve_arguments
    from dmpo_lightning.commands.fit import command_line

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    cli = command_line(resolve_arguments([*arguments, *QUIET]), run=False, save_config_callback=None)
    recorder = Recorder(collapsed)
    # None of those that write files.
    cli.trainer.callbacks[:] = [recorder]
    cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    return recorder.rows
