"""DMPO for diffusion language models, as a PyTorch Lightning plug-in.

Everything a project usually needs is importable from here. Heavy dependencies load on first use.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "DMPO": "modules.dmpo",
    "MaskedSFT": "modules.sft",
    "WDCE": "objectives",
    "WDDO": "objectives",
    "Objective": "objectives",
    "ElboEstimator": "objectives",
    "TrajectoryEstimator": "objectives",
    "ConfidenceSampler": "samplers",
    "RandomOrderSampler": "samplers",
    "WinoSampler": "samplers",
    "Sampler": "samplers",
    "PromptBatch": "rollout",
    "PromptLoader": "data.prompts",
    "TaskDataModule": "data.task_module",
    "SudokuDataModule": "data.benchmarks",
    "GSM8KDataModule": "data.benchmarks",
    "Math500DataModule": "data.benchmarks",
    "CountdownDataModule": "data.benchmarks",
    "MixtureDataModule": "data.mixture",
    "DemonstrationsDataModule": "data.demonstrations",
    "Reward": "rewards.reward",
    "CombinedScore": "rewards.functions",
    "Rollouts": "rollout",
    "Policy": "policy",
    "Task": "tasks.base",
    "Sudoku": "tasks.sudoku",
    "GSM8K": "tasks.gsm8k",
    "Math500": "tasks.math500",
    "Countdown": "tasks.countdown",
    "ReasoningGym": "tasks.reasoning_gym",
    "CountdownDemonstrations": "tasks.demonstrations",
    "LatinSquareDemonstrations": "tasks.demonstrations",
    "JsonlPairs": "tasks.demonstrations",
    "BeforeAfterReport": "callbacks.before_after",
    "RunRecorder": "callbacks.records",
    "EvaluationReport": "callbacks.evaluation",
    "CompletionWriter": "callbacks.evaluation",
    "Guards": "callbacks.guards",
    "LoggingExtras": "callbacks.completion_records",
    "ProgressLine": "callbacks.progress",
    "RunMeter": "modules.observers",
    "SavePretrained": "callbacks.save_pretrained",
    "SkipNonFiniteSteps": "modules.non_finite",
    "Preemption": "callbacks.preemption",
    "Generation": "modules.generating",
    "FSDP1Strategy": "distributed.strategies",
    "FSDP2Strategy": "distributed.strategies",
    "ZeROStrategy": "distributed.strategies",
    "Backbone": "models.backbone",
    "LoRA": "models.lora",
    "load_model": "models.loading",
    "load_tokenizer": "models.loading",
}

__all__ = ["__version__", *_HOMES]  # noqa: PLE0604  names resolved below


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
