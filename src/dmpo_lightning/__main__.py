"""The command ``dmpo-lightning``. Answers what needs no torch by itself and leaves the rest to the Lightning CLI."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from dmpo_lightning import __version__
from dmpo_lightning.commands.arguments import resolve_arguments
from dmpo_lightning.commands.configs import config_directory, shipped_configs

USAGE = """\
usage: dmpo-lightning COMMAND [--config NAME_OR_FILE ...] [--key value ...]

Reinforcement learning of diffusion language models with DMPO.

commands:
  fit        train; start with: dmpo-lightning fit --config sudoku_tiny.yaml
  validate   evaluate the validation split
  test       evaluate the test split
  predict    write completions of the test split as JSON lines
  export     write a checkpoint's policy as a PEFT adapter or a Hugging Face model
  plan       memory, parameters and forwards of a configuration; runs nothing
  score      re-score saved completions; needs no model
  configs    list the configurations that --config takes by name

  dmpo-lightning COMMAND --help                              all options of a command
  dmpo-lightning COMMAND --config X --print_config           the configuration that would run
  several --config are merged in order, and options on the command line win

options:
  -h, --help     this text
  --version      the version
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if os.getcwd() not in sys.path:
        # For tasks and rewards by dotted path. It comes last, so that it hides nothing.
        sys.path.append(os.getcwd())
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
    elif arguments[0] == "--version":
        print(f"dmpo-lightning {__version__}")
    elif arguments[0] == "configs":
        print(f"in {config_directory()}:", *shipped_configs(), sep="\n  ")
    elif arguments[0] == "plan":
        return _light("dmpo_lightning.commands.plan", arguments[1:])
    elif arguments[0] == "export":
        return _light("dmpo_lightning.commands.export", arguments[1:])
    elif arguments[0] == "score":
        return _light("dmpo_lightning.commands.score", arguments[1:])
    else:
        return _run(arguments)
    return 0


def _light(module: str, arguments: Sequence[str]) -> int:
    """Runs a command that is not the Lightning CLI's. What a user can mend is one line, not a traceback."""
    try:
        import_module(module).run(resolve_arguments(arguments))
    except ValueError as error:
        print(f"dmpo-lightning: {error}", file=sys.stderr)
        return 2
    return 0


def _run(arguments: Sequence[str]) -> int:
    try:
        resolved = resolve_arguments(arguments)
    except ValueError as error:
        print(f"dmpo-lightning: {error}", file=sys.stderr)
        return 2
    # It brings torch and Lightning, for which --help need not wait (docs/decisions/028-layout.md).
    from dmpo_lightning.checkpoints.weights import UnfitCheckpointError
    from dmpo_lightning.commands.fit import run

    try:
        run(resolved)
    # What else may go wrong in a run keeps its traceback.
    except UnfitCheckpointError as error:
        print(f"dmpo-lightning: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
