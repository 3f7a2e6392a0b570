"""What `plan` needs of a merged configuration, as plain numbers and names."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Adapter:
    """A LoRA: rank, dropout, targets (None for all linear layers of the blocks)."""

    r: int
    dropout: float = 0.0
    targets: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Workload:
    """Rows and tokens of the forwards, per rank."""

    completion_length: int
    prompt_length: int
    """Of the longest prompt; 0 where nothing says."""
    micro_batch_size: int
    replicates: int
    antithetic: bool = True
    accumulation: int = 1
    group_size: int = 1
    prompts_per_buffer: int = 1
    num_iterations: int = 1
    rows_per_forward: int | None = None
    sampler_steps: int = 0
    """Forwards per completion; 0 where nothing is sampled (supervised fine-tuning)."""
    sampled_places: int = 0
    """Positions per row whose logits a denoising step asks for, at most."""
    temperature: float = 1.0
    scoring_replicates: int = 0
    """Maskings per rollout in one scoring forward; 0 where no forward scores."""
    trajectory_steps: int = 0
    """Those maskings are steps of a recorded order of so many, which need logits where a token was revealed, and not
    else; 0 where an ELBO is estimated."""
    scoring_passes: int = 0
    """Passes over the whole buffer that score it, once per buffer."""
    step_passes: int = 0
    """Passes over the rollouts of each optimizer step that score them again (baseline ``policy``)."""

    @property
    def length(self) -> int:
        """Tokens per row: prompt and completion."""
        return self.prompt_length + self.completion_length

    @property
    def buffer_rollouts(self) -> int:
        """Rollouts of one buffer, per rank."""
        return self.prompts_per_buffer * self.group_size

    @property
    def sampling_rows(self) -> int:
        """Rows of one sampling forward."""
        return min(self.rows_per_forward or self.buffer_rollouts, self.buffer_rollouts)

    @property
    def scoring_rows(self) -> int:
        """Rollouts of one scoring forward."""
        return min(self.rows_per_forward or self.micro_batch_size, self.buffer_rollouts)

    @property
    def scoring_positions(self) -> float:
        """Positions whose logits one scoring forward needs."""
        if self.trajectory_steps:
            return self.scoring_rows * self.completion_length * self.scoring_replicates / self.trajectory_steps
        return self.masked_positions(self.scoring_rows, self.scoring_replicates)

    def masked_positions(self, rollouts: int, replicates: int) -> float:
        """Positions at which a loss or an ELBO needs logits: (length + 1) / 2 per replicate.

        Exact with antithetic pairs, whose two counts add up to length + 1; otherwise the mean.
        """
        return rollouts * replicates * (self.completion_length + 1) / 2


@dataclass(frozen=True)
class Settings:
    """One run, as its configuration states it."""

    model: str
    dtype: str
    random_weights: bool
    adapter: Adapter | None
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
    notes: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        """Processes in all."""
        return self.devices * self.nodes


def read_settings(config: Mapping[str, Any], *, prompt_length: int | None = None) -> Settings:
    """From the merged configuration as a plain dictionary; nothing of it is instantiated but the sampler.

    Raises:
        ValueError: the model is not a name, so that nothing can be known about it.
    """
    trainer, model = config["trainer"], config["model"]
    options, data = model.get("init_args") or {}, (config.get("data") or {}).get("init_args") or {}
    if not isinstance(options.get("model"), str):
        raise ValueError("`plan` needs `model.init_args.model` to be a hub id, a folder or an embedded name.")
    notes: list[str] = []
    is_dmpo, on_cpu = "sampler" in options, trainer.get("accelerator") == "cpu"
    adapter = _adapter(options.get("adapter"))
    optimizer = options.get("optimizer") or {"class_path": "torch.optim.AdamW"}
    return Settings(
        model=options["model"],
        dtype=options.get("dtype") or "float32",
        random_weights=bool(options.get("random_weights")),
        adapter=adapter,
        quantization=options.get("quantization"),
        gradient_checkpointing=bool(options.get("gradient_checkpointing")),
        precision=trainer.get("precision"),
        strategy=trainer.get("strategy") or "auto",
        devices=_devices(trainer.get("devices"), [] if on_cpu else notes),
        nodes=int(trainer.get("num_nodes") or 1),
        on_cpu=on_cpu,
        optimizer=optimizer["class_path"],
        momentum=float((optimizer.get("init_args") or {}).get("momentum") or 0),
        reference_copy=is_dmpo and adapter is None,
        reference_refreshed=options.get("reference_refresh_interval") is not None,
        workload=_workload(
            options, data, trainer, int(prompt_length or data.get("max_prompt_length") or 0), is_dmpo=is_dmpo
        ),
        sample_merged=bool(options.get("sample_merged")),
        gather_for_generation=bool(options.get("gather_for_generation")),
        notes=tuple(notes),
    )


def _adapter(value: Mapping[str, Any] | None) -> Adapter | None:
    if value is None:
        return None
    options = value.get("init_args", value) or {}
    targets = options.get("targets")
    return Adapter(
        r=int(options.get("r", 128)),
        dropout=float(options.get("dropout", 0.05)),
        targets=None if targets is None else tuple(targets),
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


def _workload(
    options: Mapping[str, Any],
    data: Mapping[str, Any],
    trainer: Mapping[str, Any],
    prompt_length: int,
    *,
    is_dmpo: bool,
) -> Workload:
    accumulation = int(trainer.get("accumulate_grad_batches") or 1)
    if not is_dmpo:
        return Workload(
            completion_length=int(data.get("completion_length") or 256),
            prompt_length=prompt_length,
            micro_batch_size=int(data.get("batch_size") or 1),
            replicates=int(options.get("replicates") or 2),
            antithetic=bool(options.get("antithetic", True)),
            accumulation=accumulation,
        )
    length, objective = int(options["completion_length"]), options["objective"].get("init_args") or {}
    return Workload(
        completion_length=length,
        prompt_length=prompt_length,
        micro_batch_size=int(options["micro_batch_size"]),
        replicates=int(objective.get("replicates") or 4),
        antithetic=bool(objective.get("antithetic", True)),
        accumulation=accumulation,
        group_size=int(options["group_size"]),
        prompts_per_buffer=int(data.get("prompts_per_buffer") or data.get("batch_size") or 1),
        num_iterations=int(options.get("num_iterations") or 1),
        rows_per_forward=options.get("rows_per_forward"),
        **_sampling(options["sampler"], length),
        **_scoring(options, length),
    )


def _sampling(sampler: Mapping[str, Any], length: int) -> dict[str, Any]:
    instance = _instantiate(sampler)
    steps = instance.num_steps(length)
    block = getattr(instance, "block_length", None) or length
    return {
        "sampler_steps": steps,
        "sampled_places": -(-length // steps) if instance.order_is_independent else block,
        "temperature": instance.temperature,
    }


def _instantiate(spec: Mapping[str, Any]) -> Any:
    module, _, name = spec["class_path"].rpartition(".")
    return getattr(import_module(module), name)(**(spec.get("init_args") or {}))


def _scoring(options: Mapping[str, Any], length: int) -> dict[str, Any]:
    """Who scores the buffer: log p_old and log p_ref, of which a trajectory has recorded the first.

    None while the reference is renewed for every buffer, which makes log_rnd zero, or at alpha = 0, which ignores it.
    """
    objective = options["objective"].get("init_args") or {}
    log_prob = objective.get("log_prob") or {"class_path": "dmpo_lightning.ElboEstimator"}
    is_trajectory = log_prob["class_path"].endswith("TrajectoryEstimator")
    samples = int((log_prob.get("init_args") or {}).get("samples") or 4)
    uses_log_rnd = objective.get("reward_scale") is None and options.get("reference_refresh_interval") != 1
    is_policy = objective.get("baseline") == "policy"
    is_wddo = options["objective"]["class_path"].endswith("WDDO")
    passes = uses_log_rnd * (1 if is_trajectory else 2) + is_wddo + (is_policy and not is_trajectory)
    steps = _instantiate(options["sampler"]).num_steps(length) if is_trajectory else samples
    at_once = min(steps, _instantiate(log_prob).steps_per_forward) if is_trajectory else samples
    return {
        "scoring_replicates": at_once if passes or is_policy else 0,
        "trajectory_steps": steps if is_trajectory else 0,
        "scoring_passes": int(passes),
        "step_passes": int(is_policy),
    }
