"""The plan as text for people and as one JSON object for programs."""

from typing import Any

from dmpo_lightning.planning.forwards import Forwards
from dmpo_lightning.planning.memory import GIB, RUNTIME, Memory
from dmpo_lightning.planning.parameters import Architecture, Parameters
from dmpo_lightning.planning.run import WholeRun
from dmpo_lightning.planning.settings import Settings
from dmpo_lightning.planning.strategy import Sharding


class Plan:
    """Everything that `plan` found out about one configuration."""

    def __init__(
        self,
        *,
        settings: Settings,
        architecture: Architecture,
        sharding: Sharding,
        parameters: Parameters,
        memory: Memory,
        forwards: Forwards,
        gpu_memory_gb: float | None,
        run: WholeRun,
    ) -> None:
        self.settings, self.architecture, self.sharding = settings, architecture, sharding
        self.parameters, self.memory, self.forwards = parameters, memory, forwards
        self.gpu_memory_gb, self.run = gpu_memory_gb, run

    @property
    def required(self) -> float:
        """Bytes per GPU with the runtime's own share."""
        # The runtime's share is CUDA's. On a processor the tensors are all.
        return self.memory.peak + (0 if self.settings.on_cpu else RUNTIME)

    @property
    def fits(self) -> bool | None:
        """Whether that much memory holds it, None where nothing says how much there is."""
        return None if self.gpu_memory_gb is None else self.required <= self.gpu_memory_gb * GIB

    def warnings(self) -> list[str]:
        """What will not work, with what to do about it."""
        problems = [f"{problem} Training will refuse this configuration." for problem in self.settings.problems]
        if self.fits is False:
            problems.append(
                f"does not fit: {_in('GiB', self.required)} GiB needed at the peak ({self.memory.worst_phase}), "
                f"{self.gpu_memory_gb:g} GiB there; {self._remedy()}"
            )
        return problems

    def _remedy(self) -> str:
        """The setting that makes the largest term smaller."""
        phase = self.memory.phases[self.memory.worst_phase]
        largest = max(phase.parts, key=lambda name: phase.parts[name], default="")
        # What stays is more than what the phase adds, so that smaller batches would help little.
        if self.memory.resident_total > phase.peak:
            return self._resident_remedy()
        if self.memory.worst_phase in ("sampling", "scoring"):
            return "set a smaller --model.rows_per_forward"
        if largest == "activations" and not self.settings.gradient_checkpointing:
            return "set --model.model.gradient_checkpointing true, or a smaller --model.micro_batch_size"
        return "set a smaller --model.micro_batch_size and accumulate more gradients"

    def _resident_remedy(self) -> str:
        if self.settings.adapter is None:
            return "train an adapter (--model.model.adapter dmpo_lightning.LoRA), or shard over more GPUs with fsdp"
        if self.settings.quantization is None:
            return "load the base in 4 bits (--model.model.quantization nf4), or shard over more GPUs with fsdp"
        return "shard over more GPUs, or take a larger one"

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain numbers, memory in bytes."""
        work = self.settings.workload
        return {
            "model": self.settings.model,
            "dtype": self.settings.dtype,
            "precision": str(self.settings.precision or "32-true"),
            "strategy": self.sharding.name,
            "ranks": self.settings.ranks,
            "tokens": {"prompt": work.prompt_length, "completion": work.completion_length},
            "parameters": {
                "total": self.parameters.total_count,
                "trainable": self.parameters.trainable_count,
                "total_by_module": self.parameters.total,
                "trainable_by_module": self.parameters.trainable,
            },
            "memory_per_gpu": {
                "resident": _whole(self.memory.resident),
                "phases": {
                    name: _whole(phase.parts) | {"peak": round(phase.peak)}
                    for name, phase in self.memory.phases.items()
                },
                "worst_phase": self.memory.worst_phase,
                "tensors_at_peak": round(self.memory.peak),
                "required": round(self.required),
                "gpu_memory_gb": self.gpu_memory_gb,
                "fits": self.fits,
            },
            "schedule": self._schedule(),
            "whole_run": {
                "optimizer_steps": self.run.optimizer_steps,
                "buffers": self.run.buffers,
                "flops_per_buffer_and_rank": self.run.buffer_flops,
                "assumed_tflops": self.run.tflops,
                "hours": self.run.hours,
                "checkpoint_bytes": round(self.run.checkpoint_bytes),
            },
            "warnings": self.warnings(),
            "notes": list(self.settings.notes),
        }

    def _schedule(self) -> dict[str, float]:
        """Counts of one rank. Only the rollouts and prompts of an optimizer step are those of all ranks."""
        schedule = self.settings.workload.schedule
        return {
            "rollouts_per_buffer": schedule.buffer_rollouts,
            "prompts_per_buffer": schedule.prompts_per_buffer,
            "sampling_forwards": self.forwards.sampling,
            "scoring_forwards": self.forwards.scoring,
            "training_forwards": self.forwards.training,
            "optimizer_steps_per_buffer": schedule.optimizer_steps,
            "step_rollouts": schedule.step_rollouts,
            "step_prompts": schedule.step_prompts,
        }

    def to_text(self) -> str:
        """A page for people."""
        lines = [*self._head(), *self._parameter_lines(), *self._memory_lines(), *self._schedule_lines()]
        lines += self._run_lines()
        lines += [f"note: {note}" for note in self.settings.notes]
        return "\n".join(lines + [f"WARNING: {warning}" for warning in self.warnings()])

    def _head(self) -> list[str]:
        settings, work = self.settings, self.settings.workload
        weights = f"{settings.dtype}{f', {settings.quantization} blocks' if settings.quantization else ''}"
        return [
            f"{settings.model}: weights {weights}; Trainer precision {settings.precision or '32-true'}; "
            f"{self.sharding.name} on {settings.ranks} rank{'s' * (settings.ranks > 1)}",
            f"rows of {work.length} tokens: prompt {work.prompt_length}, completion {work.completion_length}",
        ]

    def _parameter_lines(self) -> list[str]:
        total, trainable = self.parameters.total_count, self.parameters.trainable_count
        share = 100 * trainable / total
        lines = ["", f"{'parameters, of which trainable':<36} {total:>15,} {trainable:>15,}  ({share:.2f} %)"]
        for name, count in self.parameters.total.items():
            trained = self.parameters.trainable.get(name, 0)
            lines.append(f"  {name:<34} {count:>15,} {trained:>15,}")
        return lines

    def _memory_lines(self) -> list[str]:
        # Embedded models would take 0.00 GiB.
        unit = "GiB" if self.required >= GIB else "MiB"
        lines = ["", f"memory per {'rank' if self.settings.on_cpu else 'GPU'}, {unit}"]
        lines += [f"  {name:<28} {_in(unit, size):>9}" for name, size in self.memory.resident.items() if size]
        for name, phase in self.memory.phases.items():
            parts = ", ".join(f"{part} {_in(unit, size)}" for part, size in phase.parts.items())
            lines.append(f"  {name + ' adds':<28} {_in(unit, phase.peak):>9}   {parts}")
        runtime = "" if self.settings.on_cpu else ", the CUDA runtime's 1 GiB included"
        peak = f"  {'peak, in ' + self.memory.worst_phase:<28} {_in(unit, self.required):>9}"
        if self.gpu_memory_gb is None:
            return [*lines, f"{peak}   of the machine's memory, for each rank on it"]
        return [*lines, f"{peak}   {'fits' if self.fits else 'does NOT fit'} {self.gpu_memory_gb:g} GiB{runtime}"]

    def _run_lines(self) -> list[str]:
        run = self.run
        unit = "GiB" if run.checkpoint_bytes >= GIB else "MiB"
        checkpoint = f"a checkpoint takes {_in(unit, run.checkpoint_bytes)} {unit}"
        if run.buffers is None:
            return [f"whole run: no --trainer.max_steps says how long; {checkpoint}"]
        length = f"whole run: {_times(run.optimizer_steps or 0, 'optimizer step')}, {_times(run.buffers, 'buffer')}"
        hours = "" if run.hours is None else f", {run.hours:.3g} hours of arithmetic at {run.tflops:g} TFLOP/s per GPU"
        return [f"{length}{hours}; {checkpoint}"]

    def _schedule_lines(self) -> list[str]:
        work, forwards = self.settings.workload, self.forwards
        schedule = work.schedule
        step = f"optimizer step: {schedule.step_rollouts} rollouts over all ranks"
        if work.sampling is None:
            return ["", step.replace("rollouts", "rows")]
        buffer = (
            f"buffer per rank: {_times(schedule.buffer_rollouts, 'rollout')} of "
            f"{_times(schedule.prompts_per_buffer, 'prompt')}, {_times(schedule.num_iterations, 'iteration')}, "
            f"{_times(schedule.optimizer_steps, 'optimizer step')}"
        )
        called = (
            f"forwards per buffer: sampling {_forwards(forwards.sampling, work.sampling_rows)}, "
            f"log_rnd {_forwards(forwards.scoring, work.scoring_rows)}, "
            f"training {_forwards(forwards.training, work.training_rows)} with backward"
        )
        return ["", buffer, called, f"{step} = {schedule.step_prompts:g} prompts"]


def _in(unit: str, size: float) -> str:
    return f"{size / (GIB if unit == 'GiB' else GIB / 1024):.2f}"


def _times(count: int, word: str) -> str:
    return f"{count} {word}{'s' * (count != 1)}"


def _forwards(count: int, rows: int) -> str:
    return f"{count} of {rows} rows" if count else "0"


def _whole(parts: dict[str, float]) -> dict[str, int]:
    return {name: round(size) for name, size in parts.items()}
