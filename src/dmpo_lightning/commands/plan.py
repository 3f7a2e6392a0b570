"""``dmpo-lightning plan``: reads a configuration as ``fit`` would, and runs one buffer of it without its numbers."""

import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

from dmpo_lightning.commands.arguments import CommandParser
from dmpo_lightning.commands.mistakes import check

if TYPE_CHECKING:
    from dmpo_lightning.planning.plan import Plan

DESCRIPTION = """\
Parameters, memory per GPU, forwards per rollout buffer and the size of an optimizer step, for a configuration as
`fit` would run it. Needs no weights, and for LLaDA-8B, Dream-7B, SDAR and embedded models no network.
All options of `fit` are taken as well: dmpo-lightning plan --config X --trainer.devices 8 --model.model.adapter null
"""
PARSER = CommandParser("plan", DESCRIPTION)
_add = PARSER.add_argument
_add("--gpu_memory_gb", type=float, help="of one GPU, or of the machine without one, in GiB (default: 80 for a GPU)")
_add("--prompt_length", type=int, help="tokens of the longest prompt; default: the data's limit, or 200")
_add("--json", action="store_true", help="print one JSON object")


def run(arguments: Sequence[str]) -> None:
    """Prints the plan.

    Raises:
        ValueError: what `make_plan` raises.
    """
    options, rest = PARSER.parse_known_args(list(arguments))
    check("plan", rest, own=PARSER.names)
    # Libraries that a strategy imports speak on standard output, DeepSpeed for one, which is the plan's.
    with redirect_stdout(sys.stderr):
        plan = make_plan(
            merged_configuration(rest), gpu_memory_gb=options.gpu_memory_gb, prompt_length=options.prompt_length
        )
    print(json.dumps(plan.to_dict()) if options.json else plan.to_text())


def make_plan(
    config: dict[str, Any], *, gpu_memory_gb: float | None = None, prompt_length: int | None = None
) -> "Plan":
    """The plan of a merged configuration. Without ``gpu_memory_gb`` a GPU has 80 GiB, and a CPU any number.

    Raises:
        ValueError: nothing can be known about the model or the strategy. Settings that training would refuse.
    """
    # They bring torch, for which --help and a slip need not wait.
    from dmpo_lightning.planning.memory import rehearsed
    from dmpo_lightning.planning.network import active, counted
    from dmpo_lightning.planning.plan import Plan
    from dmpo_lightning.planning.run import read_run

    planned = read_run(config, prompt_length=prompt_length)
    available = 80.0 if gpu_memory_gb is None and not planned.on_cpu else gpu_memory_gb
    model = planned.module.policy.model
    return Plan(planned, rehearsed(planned), *counted(model), active(model), gpu_memory_gb=available)


def merged_configuration(arguments: Sequence[str]) -> dict[str, Any]:
    """What ``fit`` would run, as a plain dictionary. Exits with status 2 and a message where ``fit`` would."""
    from dmpo_lightning.commands import fit

    fit.quiet()
    config: dict[str, Any] = fit.command_line(arguments, fit.ParsedOnly, run=False).config.as_dict()
    return config
