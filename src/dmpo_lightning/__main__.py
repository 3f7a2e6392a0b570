"""The command ``dmpo-lightning``. Answers what needs no torch by itself and leaves the rest to the Lightning CLI."""

import errno
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from dmpo_lightning import __version__
from dmpo_lightning.commands.arguments import COMMANDS, CONFIG, LIGHT, named_modules, nearest, pairs, resolve_arguments
from dmpo_lightning.terminal import clean_messages, escaped, printable
from dmpo_lightning.workers.local_modules import find_local_modules

USAGE = """\
usage: dmpo-lightning COMMAND [--config NAME_OR_FILE ...] [--key value ...]

Reinforcement learning of diffusion language models with DMPO.

commands:
  fit        train; start with: dmpo-lightning fit --config sudoku_tiny.yaml
  validate   evaluate the validation split
  test       evaluate the test split
  generate   answer prompts with a model or a checkpoint; --show shows the denoising
  predict    write completions of the test split as JSON lines
  adapt      make a masked diffusion model of a causal one, ready to be trained
  export     write a checkpoint's policy as a PEFT adapter or a Hugging Face model
  plan       memory, parameters and forwards of a configuration; runs nothing
  score      re-score saved completions; needs no model
  report     one HTML page on one or several runs; needs no model
  configs    list the configurations that --config takes by name; --cat NAME prints one
  options    list the options of this package: options model.objective, or options temperature
  completion a script by which bash or zsh completes all of these

  dmpo-lightning COMMAND --help                              all options of a command
  dmpo-lightning COMMAND --config X --print_config           the configuration that would run
  several --config are merged in order, and options on the command line win

options:
  -h, --help     this text
  --version      the version
  --debug        after a command: show the traceback of what is otherwise one line

exit status:
  0      done
  1      failed, with a traceback
  2      a mistake in what was asked, said in one line
  130    interrupted (Ctrl-C): a training saves at the end of its step, or ends at once after a second one
  128+N  ended by signal N (143 SIGTERM, 138 SIGUSR1), after saving; the same command with --ckpt_path last continues
"""
MISTAKE, INTERRUPTED, NOT_READ = 2, 128 + signal.SIGINT, 128 + 13
"""Exit statuses, see `USAGE`. The last is that of a process that SIGPIPE has ended."""
MENDABLE = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EROFS)
"""What is wrong with a path that a user has named."""
RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
"""Where launchers state the number of a process."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status."""
    if arguments is None:
        # This process is the program's alone. Threads that spin while they wait take a busy CPU from those that work.
        # OpenMP reads it once, when torch is imported.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        sys.excepthook, arguments = lambda kind, error, where: _show_traceback(error), sys.argv[1:]
        clean_messages()
    try:
        if not arguments or arguments[0] in ("-h", "--help", "--version"):
            print(f"dmpo-lightning {__version__}\n" if "--version" in arguments[:1] else USAGE, end="")
            status = 0
        else:
            status = _run(arguments[0], arguments[1:])
        # Written now, where it can still be said that nobody reads it.
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has enough, such as `head`. Python would complain once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOT_READ
    return status


def _run(command: str, arguments: Sequence[str]) -> int:
    """Runs a command with options and returns the exit status. What a user can mend is one line, not a traceback."""
    is_debugged = "--debug" in arguments
    try:
        _dispatch(command, [each for each in arguments if each != "--debug"])
    except SystemExit as stop:
        if is_debugged and stop.__context__ is not None:
            _show_traceback(stop.__context__)
        # Lightning's Trainer ends an interrupted process with 1.
        if stop.code == 1 and isinstance(stop.__context__, KeyboardInterrupt):
            return INTERRUPTED
        # And one that was told to end with 0, as if it were done. By name, because Lightning may not be imported.
        if type(stop).__name__ == "SIGTERMException":
            return 128 + signal.SIGTERM
        raise
    except (KeyboardInterrupt, ValueError, OSError) as error:
        is_interrupted = isinstance(error, KeyboardInterrupt)
        is_run = command in COMMANDS and command not in LIGHT
        if isinstance(error, BrokenPipeError) or (is_run and not is_interrupted and not _is_mistake(error)):
            raise
        if is_debugged:
            _show_traceback(error)
        print(f"dmpo-lightning: {'interrupted' if is_interrupted else escaped(_said(error))}", file=sys.stderr)
        return INTERRUPTED if is_interrupted else MISTAKE
    return 0


def _dispatch(command: str, arguments: Sequence[str]) -> None:
    """Runs a command with options.

    Raises:
        ValueError: what a user can mend, before torch is imported or in a light command. Else any error of a run.
    """
    if command not in COMMANDS:
        meant = "" if command.startswith("-") else nearest(command, COMMANDS)
        meant = meant or " The command comes first."
        raise ValueError(f"There is no command {command!r}.{meant} Commands: {', '.join(COMMANDS)}.")
    resolved = resolve_arguments(arguments)
    # For tasks and rewards by dotted path.
    find_local_modules(Path.cwd(), named_modules(resolved))
    if command in LIGHT:
        import_module(f"dmpo_lightning.commands.{command}").run(resolved)
        return
    # A module that reads sources, and is not needed for --help.
    from dmpo_lightning.commands.mistakes import check

    check(command, resolved)
    _announce(command, arguments)
    # It brings torch and Lightning, for which --help need not wait (docs/decisions/028-layout.md).
    from dmpo_lightning.commands.fit import run

    run([command, *resolved], typed=[command, *arguments])


def _announce(command: str, arguments: Sequence[str]) -> None:
    """Says what is about to run, before torch is imported, which takes a long time on a slow disk.

    Says nothing where nothing runs. Of several ranks the first one speaks.
    """
    asks = {"-h", "--help", "--print_config"} & {each.partition("=")[0] for each in arguments}
    if asks or any(os.environ.get(name, "0") != "0" for name in RANKS):
        return
    given = [value for option, value, _ in pairs(arguments) if option in CONFIG and value is not None]
    # The folders of configurations are of no interest here.
    what = ", ".join([command, *map(os.path.basename, given)])
    line = escaped(f"dmpo-lightning {__version__}: {what}; loading torch and Lightning ...")
    print(line, file=sys.stderr, flush=True)


def _is_mistake(error: BaseException) -> bool:
    """Whether a user can mend an error by its message: one that this package has raised, which says how, or a path that
    is not there or not allowed. What other code raises in the middle of a run keeps its traceback.
    """
    if isinstance(error, OSError):
        return error.errno in MENDABLE and error.filename is not None
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(Path(__file__).parent)


def _said(error: BaseException) -> str:
    """The message on one line, without Python's number of an error of the operating system."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _show_traceback(error: BaseException) -> None:
    """Prints a traceback as Python does, but for what a terminal would obey in it."""
    sys.stderr.write(printable("".join(traceback.format_exception(error))))


if __name__ == "__main__":
    # `python -m` puts the working directory first, where any file takes the place of a package.
    if sys.path[0] == os.getcwd() != str(Path(__file__).parents[1]):
        del sys.path[0]
    sys.exit(main())
