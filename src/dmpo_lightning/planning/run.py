"""The run that a configuration describes, with its module as training makes it, but for the weights."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jsonargparse import ArgumentParser

from dmpo_lightning.models.backbone import Backbone
from dmpo_lightning.modules.base import PolicyModule
from dmpo_lightning.planning.network import without_weights
from dmpo_lightning.planning.strategy import Sharding, sharding_of
from dmpo_lightning.schedule import Schedule

PUBLISHED_PROMPT_CAP = 200
"""Prompt tokens assumed where nothing says. It is the cap of the published recipe."""

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """One run, whose ``module`` is a `DMPO` or a `MaskedSFT` with its weights on the meta device.

    Without sampling (supervised fine-tuning) a buffer of the ``schedule`` is one optimizer step. ``prompt_length`` is
    that of the longest prompt. ``max_steps`` is None without a limit. ``notes`` say what was assumed.
    """

    model: str
    module: Any
    schedule: Schedule
    prompt_length: int
    completion_length: int
    sharding: Sharding
    precision: str = "32-true"
    on_cpu: bool = False
    max_steps: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_mixed(self) -> bool:
        """Whether the Trainer casts the inputs of layers, rather than the weights once and for all."""
        return self.precision in ("16-mixed", "bf16-mixed", "16", "bf16")

    @property
    def dtype(self) -> torch.dtype | None:
        """The type of which the Trainer's precision speaks, None for float32."""
        names = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
        return names.get(self.precision.partition("-")[0])


def read_run(config: Options, *, prompt_length: int | None = None) -> Run:
    """Reads a merged configuration, a plain dictionary in which the parser has filled in all defaults.

    Raises:
        ValueError: nothing can be known about the model or the strategy. Settings that training would refuse.
    """
    trainer, options, data = config["trainer"], _init_args(config["model"]), _init_args(config.get("data"))
    notes: list[str] = []
    on_cpu = trainer.get("accelerator") == "cpu"
    devices, nodes = _devices(trainer.get("devices"), [] if on_cpu else notes), int(trainer.get("num_nodes") or 1)
    sharding = sharding_of(trainer.get("strategy") or "auto", devices=devices, nodes=nodes)
    model = options.get("model")
    backbone = Backbone(model) if isinstance(model, str) else instantiate(model, Backbone)
    if backbone.quantization is not None and sharding.divides:
        raise ValueError(
            f"`quantization` needs whole layers on each rank, but {sharding.name} divides them; use DDP "
            "(`--config strategies/ddp.yaml`), or leave it out."
        )
    blank = without_weights(backbone)
    with torch.device("meta"):
        module = instantiate(dict(config["model"], init_args=dict(options, model=blank)), PolicyModule)
    ranks = Schedule(1, 1, 1, accumulation=int(trainer.get("accumulate_grad_batches") or 1), ranks=devices * nodes)
    length, schedule = _schedule(module, data, ranks, notes)
    if schedule.problem is not None:
        raise ValueError(schedule.problem)
    max_steps = int(trainer.get("max_steps") or -1)
    prompt_length = prompt_length or data.get("max_prompt_length")
    if not prompt_length:
        # A small model may have less room beside the completion.
        prompt_length = min(PUBLISHED_PROMPT_CAP, module.policy.room_for_prompts(length) or PUBLISHED_PROMPT_CAP)
        notes.append(f"prompts of {prompt_length} tokens are assumed; say --prompt_length N if yours differ")
    return Run(
        str(backbone.model),
        module,
        schedule,
        prompt_length,
        length,
        sharding,
        precision=str(trainer.get("precision") or "32-true"),
        on_cpu=on_cpu,
        # Lightning's -1 is no limit.
        max_steps=max_steps if max_steps >= 0 else None,
        notes=tuple(notes),
    )


def instantiate(spec: Any, wanted: type[Any]) -> Any:
    """An object of a class from its ``class_path`` and ``init_args``, as the command line would make it."""
    parser: Any = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=wanted)
    return parser.instantiate(parser.parse_object({"value": spec})).value


def _schedule(module: Any, data: Options, ranks: Schedule, notes: list[str]) -> tuple[int, Schedule]:
    """The length of a completion, and how rollouts or demonstrations are cut.

    Our datamodules call a buffer's prompts ``prompts_per_buffer``. A plain loader of prompts has a ``batch_size``.
    """
    if module.sampler is None:
        size, length = data.get("batch_size"), data.get("completion_length")
        if not (isinstance(size, int) and isinstance(length, int)):
            raise ValueError(f"`plan` needs `batch_size` and `completion_length` of the data, got {size} and {length}.")
        # A demonstration stands alone, there is nothing to compare it with.
        return length, replace(ranks, prompts_per_buffer=size * ranks.accumulation, micro_batch_size=size)
    prompts = data.get("prompts_per_buffer") or data.get("batch_size")
    if prompts is None:
        notes.append("one prompt per buffer is assumed, since the data has neither prompts_per_buffer nor batch_size")
    return module.completion_length, replace(
        ranks,
        group_size=module.group_size,
        prompts_per_buffer=max(1, (prompts or 1) // module.sampling_rounds),
        sampling_rounds=module.sampling_rounds,
        micro_batch_size=module.buffer.micro_batch_size,
        num_iterations=module.buffer.num_iterations,
    )


def _devices(value: Any, notes: list[str]) -> int:
    """A number of devices, a list of them, or a string of either."""
    names = value if isinstance(value, list) else [part for part in str(value or "auto").split(",") if part.strip()]
    if isinstance(value, list) or len(names) != 1:
        return len(names)
    if names[0].isdecimal():
        return int(names[0])
    notes.append(f"devices: {names[0]} counts as 1; say --trainer.devices N for more")
    return 1


def _init_args(spec: Options | None) -> Options:
    return (spec or {}).get("init_args") or {}
