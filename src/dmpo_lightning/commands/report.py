"""``dmpo-lightning report``: one HTML file on one or several runs. Imports no torch."""

import sys
from collections.abc import Sequence
from pathlib import Path

from dmpo_lightning.commands.arguments import CommandParser
from dmpo_lightning.reports.page import write_report
from dmpo_lightning.reports.record import REPORT, holds_run
from dmpo_lightning.terminal import escaped

PARSER = CommandParser("report", __doc__)
_add = PARSER.add_argument
_add("runs", nargs="+", metavar="RUN", help="the directory of a training or an evaluation; several are compared")
_add("-o", "--output", metavar="FILE", help=f"default: RUN/{REPORT}, of several runs ./{REPORT}")


def run(arguments: Sequence[str]) -> None:
    """Runs the command. Raises ValueError for what a user can mend."""
    options = PARSER.parse_args(arguments)
    folders = [Path(each).expanduser() for each in options.runs]
    # A pattern of a shell also finds what a failed start has left. Of a single folder the reason is said.
    chosen = [folder for folder in folders if holds_run(folder)] or folders[:1]
    for folder in folders:
        if folder not in chosen:
            print(escaped(f"Left out: {folder} holds no run."), file=sys.stderr)
    # Of one run it lies beside what it tells of, of several where the command was given.
    beside = chosen[0] if len(chosen) == 1 else Path()
    output = Path(options.output).expanduser() if options.output else beside / REPORT
    write_report(chosen, output)
    print(escaped(f"Report: {output}"))
