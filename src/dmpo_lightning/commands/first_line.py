"""What a command says before torch is imported, which takes a long time on a slow disk."""

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise

from dmpo_lightning import __version__
from dmpo_lightning.terminal import escaped

RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
"""Where launchers state the number of a process. Of several ranks the first one speaks."""


def first_line(command: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> str | None:
    """What is about to run, or None where nothing runs, or where another rank says it."""
    if {"-h", "--help", "--print_config"} & {each.partition("=")[0] for each in arguments}:
        return None
    where = os.environ if environment is None else environment
    if any(where.get(name, "0") != "0" for name in RANKS):
        return None
    what = ", ".join([command, *_configurations(arguments)])
    return escaped(f"dmpo-lightning {__version__}: {what}; loading torch and Lightning ...")


def _configurations(arguments: Sequence[str]) -> list[str]:
    """The last parts of all ``--config``, whose folders are of no interest here."""
    given = [value for option, value in pairwise(arguments) if option in ("-c", "--config")]
    given += [each.partition("=")[2] for each in arguments if each.startswith("--config=")]
    return [os.path.basename(each) for each in given]
