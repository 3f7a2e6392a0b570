"""The plan as text for people and as one JSON object for programs."""

from dataclasses import dataclass
from typing import Any

from dmpo_lightning.planning.memory import GIB, RUNTIME, Memory, Phase
from dmpo_lightning.planning.run import Run

REACHED = 300.0
"""TFLOP/s of one GPU where nothing else is said: three tenths of what an H100 has on paper in bfloat16, which sampling
reaches at best. It is an assumption and printed as one."""


@dataclass(frozen=True)
class Plan:
    """A run, what it takes, and its parameters by module type, of which some are trained.

    ``gpu_memory_gb`` is what there is, and ``tflops`` what a GPU reaches in 1e12 per second, each None where nothing
    says it.
    """

    run: Run
    memory: Memory
    total: dict[str, int]
    trainable: dict[str, int]
    gpu_memory_gb: float | None = None
    tflops: float | None = None

    @property
    def required(self) -> float:
        """Bytes per GPU with the runtime's own share, which is CUDA's. On a CPU the tensors are all."""
        return self.memory.peak + (0 if self.run.on_cpu else RUNTIME)

    @property
    def fits(self) -> bool | None:
        """Whether that much memory holds it, None where nothing says how much there is."""
        return None if self.gpu_memory_gb is None else self.required <= self.gpu_memory_gb * GIB

    def warnings(self) -> list[str]:
        """What will not work, with what to do about it."""
        if self.fits is not False:
            return []
        return [
            f"does not fit: {_in('GiB', self.required)} GiB needed at the peak ({self.memory.worst_phase}), "
            f"{self.gpu_memory_gb:g} GiB there; {self._remedy()}"
        ]

    def _remedy(self) -> str:
        """The setting that makes the largest term smaller."""
        phase, backbone = self.memory.phases[self.memory.worst_phase], self.run.module.backbone
        # What stays is more than what the phase adds, so that smaller batches would help little.
        if self.memory.peak > 2 * phase.peak:
            shard = "or shard over more GPUs with fsdp"
            if self.trainable == self.total:
                return f"train an adapter (--model.model.adapter dmpo_lightning.LoRA), {shard}"
            return f"load the base in 4 bits (--model.model.quantization nf4), {shard}, or take a larger GPU"
        if self.memory.worst_phase in ("sampling", "scoring"):
            return "set a smaller --model.rows_per_forward"
        checkpoint = "" if backbone.gradient_checkpointing else "set --model.model.gradient_checkpointing true, or "
        return f"{checkpoint}set a smaller --model.micro_batch_size and accumulate more gradients"

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
            "parameters": {
                "total": sum(self.total.values()),
                "trainable": sum(self.trainable.values()),
                "total_by_module": self.total,
                "trainable_by_module": self.trainable,
            },
            "memory_per_gpu": {
                "resident": _whole(memory.resident),
                "phases": {
                    name: _whole(phase.parts) | {"peak": round(phase.peak)} for name, phase in memory.phases.items()
                },
                "worst_phase": memory.worst_phase,
                "tensors_at_peak": round(memory.peak),
                "required": round(self.required),
                "gpu_memory_gb": self.gpu_memory_gb,
                "fits": self.fits,
            },
            "schedule": self._schedule(),
            "whole_run": self._whole_run(),
            "warnings": self.warnings(),
            "notes": list(run.notes),
        }

    def _schedule(self) -> dict[str, float]:
        """Counts of one rank. Only the rollouts and prompts of an optimizer step are those of all ranks."""
        schedule = self.run.schedule
        return {
            "rollouts_per_buffer": schedule.buffer_rollouts,
            "prompts_per_buffer": schedule.prompts_per_buffer,
            **{f"{name}_forwards": self._phase(name).forwards for name in ("sampling", "scoring", "training")},
            "optimizer_steps_per_buffer": schedule.optimizer_steps,
            "step_rollouts": schedule.step_rollouts,
            "step_prompts": schedule.step_prompts,
        }

    def _phase(self, name: str) -> Phase:
        return self.memory.phases.get(name, Phase())

    def _whole_run(self) -> dict[str, Any]:
        """The length of the run, where the configuration says it: buffers of each rank, and hours of arithmetic.

        Further epochs take at least one buffer more each. Rewards, waiting and evaluations are left out.
        """
        steps, tflops = self.run.max_steps, self.tflops or (None if self.run.on_cpu else REACHED)
        buffers = None if steps is None else -(-steps // self.run.schedule.optimizer_steps)
        flops = sum(phase.flops for phase in self.memory.phases.values())
        return {
            "optimizer_steps": steps,
            "buffers": buffers,
            "flops_per_buffer_and_rank": flops,
            "assumed_tflops": tflops,
            "hours": None if buffers is None or tflops is None else buffers * flops / (tflops * 1e12) / 3600,
            "checkpoint_bytes": round(self.memory.checkpoint),
        }

    def to_text(self) -> str:
        """A page for people."""
        lines = [*self._head(), *self._parameter_lines(), *self._memory_lines(), *self._schedule_lines()]
        lines += [self._run_line(), *(f"note: {note}" for note in self.run.notes)]
        return "\n".join(lines + [f"WARNING: {warning}" for warning in self.warnings()])

    def _head(self) -> list[str]:
        run, backbone = self.run, self.run.module.backbone
        weights = f"{backbone.dtype}{f', {backbone.quantization} layers' if backbone.quantization else ''}"
        lengths = run.prompt_length, run.completion_length
        return [
            f"{run.model}: weights {weights}; Trainer precision {run.precision}; {run.sharding.name} on "
            f"{_times(run.schedule.ranks, 'rank')}",
            f"rows of {sum(lengths)} tokens: prompt {lengths[0]}, completion {lengths[1]}",
        ]

    def _parameter_lines(self) -> list[str]:
        total, trainable = (sum(counts.values()) for counts in (self.total, self.trainable))
        share = 100 * trainable / total
        lines = ["", f"{'parameters, of which trainable':<36} {total:>15,} {trainable:>15,}  ({share:.2f} %)"]
        return lines + [f"  {name:<34} {n:>15,} {self.trainable.get(name, 0):>15,}" for name, n in self.total.items()]

    def _memory_lines(self) -> list[str]:
        # Embedded models would take 0.00 GiB.
        unit = "GiB" if self.required >= GIB else "MiB"
        lines = ["", f"memory per {'rank' if self.run.on_cpu else 'GPU'}, {unit}"]
        lines += [f"  {name:<28} {_in(unit, size):>9}" for name, size in self.memory.resident.items() if size]
        for name, phase in self.memory.phases.items():
            parts = ", ".join(f"{part} {_in(unit, size)}" for part, size in phase.parts.items())
            lines.append(f"  {name + ' adds':<28} {_in(unit, phase.peak):>9}   {parts}".rstrip())
        runtime = "" if self.run.on_cpu else ", the CUDA runtime's 1 GiB included"
        verdict = f"{'fits' if self.fits else 'does NOT fit'} {self.gpu_memory_gb or 0:g} GiB{runtime}"
        if self.gpu_memory_gb is None:
            verdict = "of the machine's memory, for each rank on it"
        return [*lines, f"  {'peak, in ' + self.memory.worst_phase:<28} {_in(unit, self.required):>9}   {verdict}"]

    def _schedule_lines(self) -> list[str]:
        schedule = self.run.schedule
        step = f"optimizer step: {schedule.step_rollouts} rollouts over all ranks"
        if self.run.module.sampler is None:
            return ["", step.replace("rollouts", "rows")]
        counts = {
            "rollout": schedule.buffer_rollouts,
            "prompt": schedule.prompts_per_buffer,
            "iteration": schedule.num_iterations,
            "optimizer step": schedule.optimizer_steps,
        }
        rollouts, prompts, *passes = (_times(count, word) for word, count in counts.items())
        sampling, scoring, training = (_called(self._phase(name)) for name in ("sampling", "scoring", "training"))
        return [
            "",
            f"buffer per rank: {rollouts} of {prompts}, {', '.join(passes)}",
            f"forwards per buffer: sampling {sampling}, log_rnd {scoring}, training {training} with backward",
            f"{step} = {schedule.step_prompts:g} prompts",
        ]

    def _run_line(self) -> str:
        facts, unit = self._whole_run(), "GiB" if self.memory.checkpoint >= GIB else "MiB"
        length = "no --trainer.max_steps says how long"
        if facts["buffers"] is not None:
            length = f"{_times(facts['optimizer_steps'], 'optimizer step')}, {_times(facts['buffers'], 'buffer')}"
        if facts["hours"] is not None:
            length += f", {facts['hours']:.3g} hours of arithmetic at {facts['assumed_tflops']:g} TFLOP/s per GPU"
        return f"whole run: {length}; a checkpoint takes {_in(unit, self.memory.checkpoint)} {unit}"


def _in(unit: str, size: float) -> str:
    return f"{size / (GIB if unit == 'GiB' else GIB / 1024):.2f}"


def _times(count: int, word: str) -> str:
    return f"{count} {word}{'s' * (count != 1)}"


def _called(phase: Phase) -> str:
    return f"{phase.forwards} of {phase.rows} rows" if phase.forwards else "0"


def _whole(parts: dict[str, float]) -> dict[str, int]:
    return {name: round(size) for name, size in parts.items()}
