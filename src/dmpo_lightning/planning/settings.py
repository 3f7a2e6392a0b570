"""What `plan` needs of a merged configuration.

Sampler, objective and adapter are instantiated as training would do it, and asked for what they need.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jsonargparse import ArgumentParser

from dmpo_lightning.models.lora import LoRA
from dmpo_lightning.objectives import MaskedPass, Objective, ObjectiveFootprint
from dmpo_lightning.planning.workload import Workload
from dmpo_lightning.samplers import Sampler
from dmpo_lightning.schedule import Schedule

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Settings:
    """One run, as its configuration states it.

    ``reference_copy`` is a second, frozen model, ``reference_refreshed`` a frozen adapter beside the trained one.
    ``problems`` say what training would refuse, ``notes`` what was assumed.
    """

    model: str
    dtype: str
    random_weights: bool
    adapter: LoRA | None
    quantization: str | None
    gradient_checkpointing: bool
    precision: str | int | None
    strategy: str | dict[str, Any]
    devices: int
    nodes: int
    on_cpu: bool
    optimizer: str
    momentum: float
    reference_copy: bool
    reference_refreshed: bool
    workload: Workload
    sample_merged: bool = False
    gather_for_generation: bool = False
    max_steps: int | None = None
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        """Processes in all."""
        return self.devices * self.nodes


def read_settings(config: Options, *, prompt_length: int | None = None) -> Settings:
    """Reads the merged configuration, a plain dictionary in which the parser has filled in all defaults.

    Raises:
        ValueError: the model is not a name, so that nothing can be known about it. A configuration of neither `DMPO`
            nor `MaskedSFT`. What the constructors of sampler, objective and adapter raise. An objective that does not
            state its footprint.
    """
    trainer, options, data = config["trainer"], _init_args(config["model"]), _init_args(config.get("data"))
    backbone = _backbone(options)
    if not isinstance(backbone.get("model"), str):
        raise ValueError("`plan` needs `model.init_args.model` to be a hub id, a folder or an embedded name.")
    notes: list[str] = []
    on_cpu = trainer.get("accelerator") == "cpu"
    devices, nodes = _devices(trainer.get("devices"), [] if on_cpu else notes), int(trainer.get("num_nodes") or 1)
    accumulation = int(trainer.get("accumulate_grad_batches") or 1)
    adapter: LoRA | None = None if backbone.get("adapter") is None else instantiate(backbone["adapter"], LoRA)
    # The modules' own default, see `default_optimizer`.
    optimizer = options.get("optimizer") or {"class_path": "torch.optim.AdamW"}
    prompt_length = int(prompt_length or data.get("max_prompt_length") or 0)
    problems: list[str] = []
    # The class is not looked at, so that a subclass of one's own is planned too.
    if "sampler" in options:
        schedule = _schedule(options, data, notes, accumulation=accumulation, ranks=devices * nodes)
        workload = _rollouts(options, schedule, prompt_length, problems)
    else:
        workload = _demonstrations(options, data, prompt_length, accumulation=accumulation, ranks=devices * nodes)
    return Settings(
        model=backbone["model"],
        dtype=backbone.get("dtype") or "auto",
        random_weights=bool(backbone.get("random_weights")),
        adapter=adapter,
        quantization=backbone.get("quantization"),
        gradient_checkpointing=bool(backbone.get("gradient_checkpointing")),
        precision=trainer.get("precision"),
        strategy=trainer.get("strategy") or "auto",
        devices=devices,
        nodes=nodes,
        on_cpu=on_cpu,
        optimizer=optimizer["class_path"],
        momentum=float(_init_args(optimizer).get("momentum") or 0),
        # Supervised fine-tuning has no reference, and with adapters the base is one without a copy.
        reference_copy=workload.sampling is not None and adapter is None,
        reference_refreshed=options.get("reference_refresh_interval") is not None,
        workload=workload,
        sample_merged=bool(options.get("sample_merged")),
        gather_for_generation=bool(options.get("gather_for_generation")),
        # Lightning's -1 is no limit.
        max_steps=max_steps if (max_steps := int(trainer.get("max_steps") or -1)) >= 0 else None,
        problems=tuple(problems),
        notes=tuple(notes),
    )


def instantiate(spec: Any, wanted: type[Any]) -> Any:
    """An object of a class from its ``class_path`` and ``init_args``, as the command line would make it.

    The parser fills in the defaults of nested classes, such as an objective's estimator. An object is returned as it
    is.

    Raises:
        ValueError: what the constructor refuses.
    """
    if isinstance(spec, wanted):
        return spec
    parser: Any = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=wanted)
    # The method has this name since jsonargparse 4.49.
    build = getattr(parser, "instantiate", None) or parser.instantiate_classes
    return build(parser.parse_object({"value": spec})).value


def _backbone(options: Options) -> dict[str, Any]:
    """The options of a `Backbone`, of which a plain name states only the model."""
    model = options.get("model")
    return dict(model) if isinstance(model, Mapping) else {"model": model}


def _schedule(options: Options, data: Options, notes: list[str], *, accumulation: int, ranks: int) -> Schedule:
    """How `DMPO` cuts its rollouts.

    Our datamodules call a buffer's prompts ``prompts_per_buffer``. A plain loader of prompts has a ``batch_size``.
    """
    prompts = data.get("prompts_per_buffer") or data.get("batch_size")
    if prompts is None:
        notes.append("one prompt per buffer is assumed, since the data has neither prompts_per_buffer nor batch_size")
    rounds = int(options.get("sampling_rounds") or 1)
    return Schedule(
        group_size=int(options["group_size"]),
        prompts_per_buffer=max(1, int(prompts or 1) // rounds),
        sampling_rounds=rounds,
        micro_batch_size=int(options["micro_batch_size"]),
        num_iterations=int(options["num_iterations"]),
        accumulation=accumulation,
        ranks=ranks,
    )


def _rollouts(options: Options, schedule: Schedule, prompt_length: int, problems: list[str]) -> Workload:
    """The workload of `DMPO`. What it would refuse is added to ``problems``."""
    length, group_size = int(options["completion_length"]), schedule.group_size
    sampler: Sampler = instantiate(options["sampler"], Sampler)
    objective: Objective = instantiate(options["objective"], Objective)
    # Gathered, not raised: a configuration that training refuses is planned all the same, with a warning.
    refused = (
        schedule.problem,
        _refusal(lambda: sampler.validate(length)),
        _refusal(lambda: objective.validate(group_size=group_size, completion_length=length, sampler=sampler)),
    )
    problems += [problem for problem in refused if problem]
    # Renewed before each buffer, the reference equals the policy that samples, and log_rnd costs no forward. The first
    # buffer of a run is the exception (docs/decisions/004-reference-policy.md).
    is_current = options.get("reference_refresh_interval") == 1
    return Workload(
        prompt_length=prompt_length,
        completion_length=length,
        schedule=schedule,
        objective=objective.footprint(completion_length=length, sampler=sampler, reference_is_current=is_current),
        sampling=sampler.footprint(length),
        rows_per_forward=options.get("rows_per_forward"),
    )


def _refusal(check: Callable[[], None]) -> str | None:
    try:
        check()
    except ValueError as error:
        return str(error)
    return None


def _demonstrations(options: Options, data: Options, prompt_length: int, *, accumulation: int, ranks: int) -> Workload:
    """The workload of `MaskedSFT`, whose buffer is the batches of one optimizer step."""
    if "replicates" not in options:
        raise ValueError("`plan` knows DMPO and MaskedSFT, which have `sampler` and `replicates`; got neither.")
    for name in ("completion_length", "batch_size"):
        if not isinstance(data.get(name), int):
            raise ValueError(f"`plan` needs `data.init_args.{name}`, got {data.get(name)!r}.")
    length, batch_size = data["completion_length"], data["batch_size"]
    return Workload(
        prompt_length=prompt_length,
        completion_length=length,
        schedule=Schedule(
            # A demonstration stands alone, there is nothing to compare it with.
            group_size=1,
            prompts_per_buffer=batch_size * accumulation,
            micro_batch_size=batch_size,
            accumulation=accumulation,
            ranks=ranks,
        ),
        objective=ObjectiveFootprint(training=MaskedPass.over(length, replicates=int(options["replicates"]))),
    )


def _devices(value: Any, notes: list[str]) -> int:
    """A number of devices, a list of them, or a string of either."""
    if isinstance(value, list):
        return len(value)
    text = str(value if value is not None else "auto")
    if "," in text:
        return len([part for part in text.split(",") if part.strip()])
    if text.isdecimal():
        return int(text)
    notes.append(f"devices: {text} counts as 1; say --trainer.devices N for more")
    return 1


def _init_args(spec: Options | None) -> Options:
    return (spec or {}).get("init_args") or {}
