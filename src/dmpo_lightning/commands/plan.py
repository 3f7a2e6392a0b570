"""``dmpo-lightning plan``: reads a configuration as ``fit`` would, and runs nothing."""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from dmpo_lightning.models.lora import LoRA, base_of, matching_names
from dmpo_lightning.models.parts import linear_names
from dmpo_lightning.planning.forwards import Forwards
from dmpo_lightning.planning.memory import checkpoint_contents, estimate_memory
from dmpo_lightning.planning.parameters import Architecture, count_parameters, read_architecture
from dmpo_lightning.planning.plan import Plan
from dmpo_lightning.planning.run import REACHED, WholeRun
from dmpo_lightning.planning.settings import Settings, read_settings
from dmpo_lightning.planning.strategy import Sharding, sharding_of

PUBLISHED_PROMPT_CAP = 200
"""Prompt tokens assumed where nothing says. It is the cap of the published recipe."""

DESCRIPTION = """\
Parameters, memory per GPU, forwards per rollout buffer and the size of an optimizer step, for a configuration as
`fit` would run it. Needs no weights, and for LLaDA-8B, Dream-7B, SDAR and embedded models no
network.
All options of `fit` are taken as well: dmpo-lightning plan --config X --trainer.devices 8 --model.model.adapter null
"""


def run(arguments: Sequence[str]) -> None:
    """Prints the plan.

    Raises:
        ValueError: what `make_plan` raises.
    """
    options, rest = make_parser().parse_known_args(list(arguments))
    asks = any(argument.partition("=")[0] in ("-h", "--help", "--print_config") for argument in rest)
    # Libraries that a strategy imports speak on standard output, DeepSpeed for one, which is the plan's.
    with redirect_stdout(sys.stdout if asks else sys.stderr):
        config = merged_configuration(rest)
        plan = make_plan(
            config, gpu_memory_gb=options.gpu_memory_gb, prompt_length=options.prompt_length, tflops=options.tflops
        )
    print(json.dumps(plan.to_dict()) if options.json else plan.to_text())


def make_plan(
    config: dict[str, Any],
    *,
    gpu_memory_gb: float | None = None,
    prompt_length: int | None = None,
    tflops: float | None = None,
) -> Plan:
    """The plan of a merged configuration. Without ``gpu_memory_gb`` a GPU has 80 GiB, and a processor any number.

    Raises:
        ValueError: nothing can be known about the model, the objective or the strategy. A value that a constructor
            refuses.
    """
    settings, architecture = _described(read_settings(config, prompt_length=prompt_length))
    settings = _completed(settings, architecture)
    sharding = sharding_of(settings.strategy, devices=settings.devices, nodes=settings.nodes)
    settings = _with_strategy(settings, sharding)
    contents = checkpoint_contents(settings, architecture, sharding)
    return Plan(
        settings=settings,
        architecture=architecture,
        sharding=sharding,
        parameters=count_parameters(architecture, settings.adapter),
        memory=estimate_memory(settings, architecture, sharding),
        forwards=Forwards.of(settings.workload),
        gpu_memory_gb=80.0 if gpu_memory_gb is None and not settings.on_cpu else gpu_memory_gb,
        run=WholeRun.of(settings, architecture, contents, tflops=tflops),
    )


def merged_configuration(arguments: Sequence[str]) -> dict[str, Any]:
    """What ``fit`` would run, as a plain dictionary.

    Exits with status 2 and a message where ``fit`` would.
    """
    cli: Any = import_module("dmpo_lightning.commands.fit")

    class ParsedOnly(cli.DMPOCLI):
        """Stops after parsing."""

        def instantiate_classes(self) -> None:
            pass

        # Lightning would seed the process here, and say so among what `plan` prints.
        def _set_seed(self) -> None:
            pass

    parsed = ParsedOnly(
        cli.PolicyModule,
        cli.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        parser_class=cli.DMPOArgumentParser,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        run=False,
        args=list(arguments),
    )
    return parsed.config.as_dict()


def _described(settings: Settings) -> tuple[Settings, Architecture]:
    """The model of a run. A folder that holds an adapter stands for its base model with that adapter to be trained."""
    file = Path(settings.model) / "adapter_config.json"
    if not file.is_file():
        return settings, read_architecture(settings.model)
    architecture = read_architecture(base_of(settings.model))
    stored = json.loads(file.read_text(encoding="utf-8"))
    adapter = _stored_adapter(stored, architecture)
    return replace(settings, model=architecture.name, adapter=adapter, reference_copy=False), architecture


def _stored_adapter(stored: dict[str, Any], architecture: Architecture) -> LoRA:
    """The adapter of a PEFT configuration.

    PEFT ignores targets that the model does not have, as in adapters of d1, which name Llama's layers. A pattern in
    place of names is taken for all linear layers of the blocks.
    """
    targets, names = stored.get("target_modules"), linear_names(architecture.model)
    if isinstance(targets, list):
        targets = [target for target in targets if matching_names(target, names, head=None)]
    else:
        targets = None
    return LoRA(r=stored["r"], dropout=stored.get("lora_dropout") or 0.0, targets=targets)


def _completed(settings: Settings, architecture: Architecture) -> Settings:
    """The settings with what only the model knows: the type of its weights, and its room for a prompt."""
    # Fresh weights are drawn in float32, whatever the checkpoint's type is (`load_model`).
    automatic = "float32" if settings.random_weights else architecture.dtype
    dtype = automatic if settings.dtype == "auto" else settings.dtype.removeprefix("torch.")
    work, notes, problems = settings.workload, settings.notes, settings.problems
    room = architecture.max_length - work.completion_length
    if room < 1:
        problems = (
            *problems,
            f"`completion_length` {work.completion_length} leaves no room for a prompt in the "
            f"{architecture.max_length} tokens of the model; at most {architecture.max_length - 1} would.",
        )
    if not work.prompt_length:
        # A small model may have less room beside the completion.
        work = replace(work, prompt_length=max(1, min(PUBLISHED_PROMPT_CAP, room)))
        assumed = f"prompts of {work.prompt_length} token{'s' * (work.prompt_length > 1)} are assumed"
        notes = (*notes, f"{assumed}; say --prompt_length N if yours differ")
    return replace(settings, dtype=dtype, workload=work, notes=notes, problems=problems)


def _with_strategy(settings: Settings, sharding: Sharding) -> Settings:
    """The settings with what training would refuse of them under this strategy."""
    problems, notes = settings.problems, settings.notes
    if settings.quantization is not None and sharding.divides:
        problems += (
            f"`quantization` needs whole layers on each rank, but {sharding.name} divides them; use DDP "
            "(`--config strategies/ddp.yaml`), or leave it out.",
        )
    if settings.gather_for_generation and sharding.gathers and sharding.gathers_in_forward_alone:
        problems += (
            "`gather_for_generation` does not work under FSDP1; use FSDP2 (`--config strategies/fsdp2.yaml`).",
        )
    return replace(settings, problems=problems, notes=notes if sharding.note is None else (*notes, sharding.note))


def make_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="dmpo-lightning plan",
        description=DESCRIPTION,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--gpu_memory_gb", type=float, help="of one GPU, or of the machine without one, in GiB (default: 80 for a GPU)"
    )
    parser.add_argument(
        "--tflops", type=float, help=f"that a GPU reaches in 1e12/s, for the hours (default {REACHED:g}, an assumption)"
    )
    parser.add_argument(
        "--prompt_length", type=int, help="tokens of the longest prompt; default: the data's limit, or 200"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser
