"""The command ``dmpo-lightning``. Answers what needs no torch by itself and leaves the rest to the Lightning CLI."""

import difflib
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import TracebackType

from dmpo_lightning import __version__
from dmpo_lightning.commands.arguments import named_modules, resolve_arguments
from dmpo_lightning.commands.configs import config_directory, shipped_configs
from dmpo_lightning.commands.first_line import first_line
from dmpo_lightning.terminal import escaped, printable
from dmpo_lightning.workers.local_modules import find_local_modules

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
LIGHT = {name: f"dmpo_lightning.commands.{name}" for name in ("export", "plan", "score")}
"""Commands that are not the Lightning CLI's."""
COMMANDS = ("fit", "validate", "test", "predict", *LIGHT, "configs")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status."""
    if arguments is None:
        # This process is the program's alone.
        sys.excepthook, arguments = _show_uncaught, sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
    elif arguments[0] == "--version":
        print(f"dmpo-lightning {__version__}")
    elif arguments[0] == "configs":
        print(f"in {config_directory()}:", *shipped_configs(), sep="\n  ")
    else:
        return _run(arguments[0], arguments[1:])
    return 0


def _run(command: str, arguments: Sequence[str]) -> int:
    """Runs a command with options. What a user can mend is one line, not a traceback."""
    try:
        if command not in COMMANDS:
            close = difflib.get_close_matches(command, COMMANDS, n=1)
            meant = " The command comes first."
            if close and not command.startswith("-"):
                meant = f" Did you mean {close[0]}?"
            raise ValueError(f"There is no command {command!r}.{meant} Commands: {', '.join(COMMANDS)}.")
        resolved = resolve_arguments(arguments)
        # For tasks and rewards by dotted path.
        find_local_modules(Path.cwd(), named_modules(resolved))
        if command in LIGHT:
            import_module(LIGHT[command]).run(resolved)
            return 0
    except ValueError as error:
        print(f"dmpo-lightning: {escaped(str(error))}", file=sys.stderr)
        return 2
    if line := first_line(command, arguments):
        print(line, file=sys.stderr, flush=True)
    # It brings torch and Lightning, for which --help need not wait (docs/decisions/028-layout.md).
    from dmpo_lightning.checkpoints.weights import UnfitCheckpointError
    from dmpo_lightning.commands.fit import run

    try:
        run([command, *resolved])
    # What else may go wrong in a run keeps its traceback.
    except UnfitCheckpointError as error:
        print(f"dmpo-lightning: {escaped(str(error))}", file=sys.stderr)
        return 2
    return 0


def _forget_working_directory() -> None:
    """Takes back what ``python -m`` puts in front of the import path.

    Any file there would take the place of a package that is not installed, or even of one that is.
    """
    is_safe = getattr(sys.flags, "safe_path", False)
    is_home = Path(__file__).parents[1] == Path.cwd()
    if sys.path and sys.path[0] == os.getcwd() and not is_safe and not is_home:
        del sys.path[0]


def _show_uncaught(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """Prints a traceback as Python does, but for what a terminal would obey in it."""
    sys.stderr.write(printable("".join(traceback.format_exception(kind, error, where))))


if __name__ == "__main__":
    _forget_working_directory()
    sys.exit(main())
