"""The table of an evaluation, with all that makes its numbers comparable."""

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from dmpo_lightning.callbacks.completions import CompletionWriter
from dmpo_lightning.callbacks.facts import task_facts
from dmpo_lightning.distributed.internals import callbacks_of
from dmpo_lightning.evaluation.metrics import EvaluationResult
from dmpo_lightning.modules.dmpo import DMPO
from dmpo_lightning.modules.run_directory import run_directory
from dmpo_lightning.reports.lines import replace
from dmpo_lightning.samplers import Sampler
from dmpo_lightning.terminal import escaped

LONGEST_TEXT = 80
"""Characters of a text of several lines, such as an instruction, below the printed table."""
NOTHING = (math.nan, math.nan)
"""Mean and error of a task of which no example was evaluated."""


class EvaluationReport(Callback):
    """Prints a table at the end of ``validate`` and ``test`` and writes ``evaluation.json`` into the run directory.

    Both state what was evaluated and how, without which accuracies cannot be compared. The table takes the place of
    Lightning's own. After ``predict`` the callback says where the completions are. The command line adds it by itself.
    Validation while fitting prints nothing.
    """

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(pl_module, DMPO):
            trainer.validate_loop.verbose = False

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(pl_module, DMPO):
            trainer.test_loop.verbose = False

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # On all ranks, because it is a broadcast.
        directory = run_directory(trainer)
        if trainer.is_global_zero:
            _print_written(trainer, directory)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report(trainer, pl_module)

    def _report(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING or not isinstance(module, DMPO):
            return
        # On all ranks, because it is a broadcast.
        directory = run_directory(trainer)
        if not trainer.is_global_zero:
            return
        facts = evaluation_facts(trainer, module)
        print("\n".join([*table(facts["task"], module.evaluator.results), "", *fact_lines(facts)]))
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            content = json.dumps(facts | {"results": [_plain(result) for result in module.evaluator.results]}, indent=2)
            try:
                directory.mkdir(parents=True, exist_ok=True)
                replace(directory / "evaluation.json", f"{content}\n".encode())
            except OSError as error:
                # What may have taken hours has been printed.
                rank_zero_warn(f"evaluation.json could not be written to {directory}: {error}")
                return
            _print_written(trainer, directory, "evaluation.json")


def _print_written(trainer: Trainer, directory: Path, *names: str) -> None:
    """Says where the files of an evaluation are, those of `CompletionWriter` included."""
    if not trainer.fast_dev_run:  # type: ignore[attr-defined]
        completions = [callback.path for callback in callbacks_of(trainer, CompletionWriter)]
        print(escaped(f"Written to {directory}: {', '.join([*names, *completions])}"))


def evaluation_facts(trainer: Trainer, module: DMPO) -> dict[str, Any]:
    """What the numbers depend on, ready for JSON. A fact is None where data or reward do not say."""
    of_task = task_facts(getattr(trainer, "datamodule", None))
    if module.evaluator.has_own_reward:
        of_task["rewards"] = module.evaluator.reward.name
    # The task may have a check, but a reward of one's own may be without.
    if module.evaluator.reward.verify is None:
        of_task["verifier"] = None
    samplers, lengths = module.evaluator.samplers, module.evaluator.lengths
    return {
        "task": of_task.pop("task"),
        "split": "test" if trainer.state.fn == TrainerFn.TESTING else "validation",
        "length": list(lengths),
        "steps": {name: [sampler.num_steps(length) for length in lengths] for name, sampler in samplers.items()},
        "block": {name: getattr(sampler, "block_length", None) for name, sampler in samplers.items()},
        "sampler": {name: _described(sampler) for name, sampler in samplers.items()},
        "temperature": {name: sampler.temperature for name, sampler in samplers.items()},
        # May be several, since PEFT keeps adapters in float32 on a base in half precision.
        "dtype": sorted({str(weight.dtype).removeprefix("torch.") for weight in module.policy.model.parameters()}),
        "precision": str(trainer.precision),
        **of_task,
        "n": module.evaluator.results[0].prompts if module.evaluator.results else 0,
        "completions per prompt": module.evaluator.completions,
        "seed": module.seed,
        "prompts dropped as too long": module.evaluator.dropped_prompts,
        "model": module.backbone.to_plain()["model"],
        "adapter": None if module.backbone.adapter is None else str(vars(module.backbone.adapter)),
        "quantization": module.backbone.quantization,
        "checkpoint": None if trainer.ckpt_path is None else str(trainer.ckpt_path),
    }


def _described(sampler: Sampler) -> str:
    """Class and options that have no line of their own."""
    shown = ("temperature", "block_length", "denoising_steps")
    stated = {name: value for name, value in vars(sampler).items() if name not in shown and value is not None}
    options = ", ".join(f"{name}={value}" for name, value in stated.items() if not name.startswith("_"))
    return f"{type(sampler).__name__}({options})"


def table(task: str | dict[str, str] | None, results: list[EvaluationResult]) -> list[str]:
    """One line per sampler and length, below a line of headings. A mixture has one per task too."""
    votes = [name for name in results[0].means if name.startswith("pass@") or name == "majority"] if results else []
    lines = {"all": "", **{name: f"{name}/" for name in task}} if isinstance(task, dict) else {task: ""}
    measures = {"effective_length": "effective length", "truncated": "truncated"}
    headings = ["", "length", "accuracy", *votes, *measures.values(), "tokens/s"]
    rows = [headings]
    for result, (name, prefix) in product(results, lines.items()):
        accuracy, error = result.means.get(f"{prefix}accuracy", NOTHING)
        label = result.sampler if name is None else f"{name}/{result.sampler}"
        row = [escaped(label), str(result.length), f"{accuracy:.4f} +- {error:.4f}"]
        row += [f"{result.means.get(prefix + vote, NOTHING)[0]:.4f}" for vote in votes]
        length, truncated = (result.means.get(prefix + measure, NOTHING)[0] for measure in measures)
        # Throughput is known of all tasks together.
        rows.append([*row, f"{length:.1f}", f"{truncated:.4f}", "" if prefix else f"{result.tokens_per_second:.0f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


def fact_lines(facts: dict[str, Any]) -> list[str]:
    """One line per fact, of a text of several lines its beginning. ``evaluation.json`` has it all."""
    width = max(map(len, facts))
    return [f"{name.ljust(width)}  {_one_line(_text(value))}" for name, value in facts.items()]


def _one_line(text: str) -> str:
    if "\n" not in text or len(text) <= LONGEST_TEXT:
        return escaped(text)
    return f"{escaped(text[:LONGEST_TEXT])}... ({len(text)} characters)"


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_text(part)}" for name, part in value.items())
    if isinstance(value, list):
        return " ".join(map(_text, value))
    return "-" if value is None else str(value)


def _plain(result: EvaluationResult) -> dict[str, Any]:
    means = {name: {"mean": mean, "standard_error": error} for name, (mean, error) in result.means.items()}
    return {
        "sampler": result.sampler,
        "length": result.length,
        "n": result.prompts,
        "tokens_per_second": result.tokens_per_second,
        "means": means,
    }
