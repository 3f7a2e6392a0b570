"""The plan as text for people and as one JSON object for programs."""

from dataclasses import dataclass
from typing import Any

from dmpo_lightning.planning.memory import GIB, RUNTIME, Memory
from dmpo_lightning.planning.run import Run

REACHED = 300.0
"""TFLOP/s of one GPU: three tenths of what an H100 has on paper in bfloat16, which sampling reaches at best. It is an
assumption and printed as one."""


@dataclass(frozen=True)
class Plan:
    """A run, what it takes, and how many parameters it has, of which some are trained, and a token goes through some.

    ``gpu_memory_gb`` is what there is, None where nothing says it.
    """

    run: Run
    memory: Memory
    total: int
    trainable: int
    active: int
    gpu_memory_gb: float | None = None

    @property
    def required(self) -> float:
        """Bytes per GPU with the runtime's own share, which is CUDA's. On a CPU the tensors are all."""
        return self.memory.peak + (0 if self.run.on_cpu else RUNTIME)

    @property
    def fits(self) -> bool | None:
        """Whether that much memory holds it, None where nothing says how much there is."""
        return None if self.gpu_memory_gb is None else self.required <= self.gpu_memory_gb * GIB

    def warnings(self) -> list[str]:
        """What will not work, with the setting that makes the largest term smaller."""
        if self.fits is not False:
            return []
        phase, remedy = self.memory.worst_phase, "set a smaller --model.rows_per_forward"
        # Where what stays is more than what the phase adds, smaller batches would help little.
        if self.memory.peak > 2 * self.memory.phases[phase].peak:
            remedy = (
                "train an adapter (--model.model.adapter dmpo_lightning.LoRA), load the base in 4 bits "
                "(--model.model.quantization nf4), or shard over more GPUs with fsdp"
            )
        elif phase not in ("sampling", "scoring"):
            remedy = "set --model.model.gradient_checkpointing true, or a smaller --model.micro_batch_size"
        needed = f"{_size(self.required)} needed at the peak ({phase}), {self.gpu_memory_gb:g} GiB there"
        return [f"does not fit: {needed}; {remedy}"]

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain numbers, memory in bytes."""
        run, memory = self.run, self.memory
        return {
            "model": run.model,
            "dtype": run.module.backbone.dtype,
            "precision": run.precision,
            "strategy": run.sharding.name,
            "ranks": run.schedule.ranks,
            "tokens": {"prompt": run.prompt_length, "completion": run.completion_length},
            "parameters": {"total": self.total, "trainable": self.trainable, "active": self.active},
            "memory_per_gpu": {
                "resident": {name: round(size) for name, size in memory.resident.items()},
                "phases": {name: round(phase.peak) for name, phase in memory.phases.items()},
                "worst_phase": memory.worst_phase,
                "required": round(self.required),
                "gpu_memory_gb": self.gpu_memory_gb,
                "fits": self.fits,
            },
            **self.counts(),
            "warnings": self.warnings(),
            "notes": list(run.notes),
        }

    def counts(self) -> dict[str, dict[str, float | None]]:
        """How often what is done. What the configuration does not say is None: the length of the run.

        Further epochs take at least one buffer more each. Rewards, waiting and evaluations are not in the hours.
        """
        schedule, phases, steps = self.run.schedule, self.memory.phases, self.run.max_steps
        calls = {name: phases[name].forwards if name in phases else 0 for name in ("sampling", "scoring", "training")}
        flops, buffers = sum(each.flops for each in phases.values()), steps and -(-steps // schedule.optimizer_steps)
        hours = None if buffers is None or self.run.on_cpu else buffers * flops / (REACHED * 1e12) / 3600
        return {
            "buffer_of_a_rank": {
                "prompts": schedule.prompts_per_buffer,
                "rollouts": schedule.buffer_rollouts,
                **{f"{name}_forwards": count for name, count in calls.items()},
                "optimizer_steps": schedule.optimizer_steps,
                "flops": flops,
            },
            "optimizer_step_of_all_ranks": {"prompts": schedule.step_prompts, "rollouts": schedule.step_rollouts},
            "whole_run": {
                "optimizer_steps": steps,
                "buffers": buffers,
                "checkpoint_GiB": self.memory.checkpoint / GIB,
                f"hours_at_{REACHED:g}_TFLOP/s": hours,
            },
        }

    def to_text(self) -> str:
        """A page for people."""
        run, backbone = self.run, self.run.module.backbone
        weights = f"{backbone.dtype}{f', {backbone.quantization} layers' if backbone.quantization else ''}"
        lines = [
            f"{run.model}: weights {weights}; Trainer precision {run.precision}; {run.sharding.name}, "
            f"ranks: {run.schedule.ranks}",
            f"{self.total:,} parameters, of which {self.trainable:,} are trained "
            f"({100 * self.trainable / self.total:.2f} %)"
            + (f", and a token goes through {self.active:,}" if self.active < self.total else ""),
            f"rows of {run.prompt_length + run.completion_length} tokens: prompt {run.prompt_length}, completion "
            f"{run.completion_length}",
            "",
            *self._memory_lines(),
        ]
        for what, counts in self.counts().items():
            lines += ["", what.replace("_", " ")]
            for name, count in counts.items():
                lines += [] if count is None else [f"  {name.replace('_', ' '):<28} {count:>12.5g}"]
        notes = [f"note: {each}" for each in self.run.notes] + [f"WARNING: {each}" for each in self.warnings()]
        return "\n".join([*lines, *[""] * bool(notes), *notes])

    def _memory_lines(self) -> list[str]:
        sizes = {name: size for name, size in self.memory.resident.items() if size}
        sizes |= {f"{name} adds": phase.peak for name, phase in self.memory.phases.items()}
        runtime = "" if self.run.on_cpu else ", the CUDA runtime's 1 GiB included"
        verdict = f"{'fits' if self.fits else 'does NOT fit'} {self.gpu_memory_gb or 0:g} GiB{runtime}"
        if self.gpu_memory_gb is None:
            verdict = "of the machine's memory, for each rank on it"
        return [
            f"memory per {'rank' if self.run.on_cpu else 'GPU'}",
            *(f"  {name:<28} {_size(size):>12}" for name, size in sizes.items()),
            f"  {'peak, in ' + self.memory.worst_phase:<28} {_size(self.required):>12}   {verdict}",
        ]


def _size(size: float) -> str:
    # Embedded models would take 0.00 GiB.
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{1024 * size / GIB:.2f} MiB"
