"""What an evaluation leaves: its table, with all that makes the numbers comparable, and its completions."""

import json
import math
from itertools import product
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from dmpo_lightning.callbacks.facts import named_means, task_facts
from dmpo_lightning.callbacks.records import write_page
from dmpo_lightning.distributed.ranks import gather_ranks
from dmpo_lightning.evaluation.metrics import EvaluationResult
from dmpo_lightning.modules.dmpo import DMPO
from dmpo_lightning.modules.run_directory import run_directory
from dmpo_lightning.reports.lines import finite, set_aside, write_object
from dmpo_lightning.reports.record import COMPLETIONS, EVALUATION
from dmpo_lightning.samplers import Sampler
from dmpo_lightning.terminal import escaped, shortened


class EvaluationReport(Callback):
    """Prints a table at the end of ``validate`` and ``test``, and writes it and all completions into the run directory.

    The table and ``evaluation.json`` state what was evaluated and how, without which accuracies cannot be compared. The
    table takes the place of Lightning's own. ``completions.jsonl``, of ``predict`` too, has one JSON object per
    completion: index, sampler, length, rollout, example, completion, answer, correct, scores and effective_length.
    ``dmpo-lightning score`` reads them. Lines are appended while the run goes, so that an interrupted run leaves what
    it has evaluated. The command line adds the callback by itself.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from dmpo_lightning import EvaluationReport
        >>> trainer = Trainer(callbacks=[EvaluationReport()])
    """

    def __init__(self) -> None:
        self._file: Path | None = None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins a file of completions, unless this run writes none."""
        self._file = None
        # Each validation while fitting would begin it anew.
        if trainer.state.fn == TrainerFn.FITTING or not isinstance(pl_module, DMPO):
            return
        # Without the table of Lightning's own.
        trainer.validate_loop.verbose = trainer.test_loop.verbose = False
        # On all ranks, because it is a broadcast (docs/decisions/016-equal-forwards.md).
        directory = run_directory(trainer)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._file = directory / COMPLETIONS
            if trainer.is_global_zero:
                directory.mkdir(parents=True, exist_ok=True)
                set_aside(self._file)

    on_validation_start = on_predict_start = on_test_start

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *batch: Any, **options: Any
    ) -> None:
        """Adds what all ranks have evaluated, in the order of the prompts. They have equally many batches."""
        if self._file is None:
            return
        own = outputs["records"] if isinstance(outputs, dict) else outputs
        records = sorted((each for rank in gather_ranks(own) for each in rank), key=lambda record: record["index"])
        if trainer.is_global_zero:
            # Closed after each batch, so that what an interrupted run leaves can be read.
            # Half a surrogate, which UTF-8 cannot hold, becomes the escape that JSON has for it.
            with self._file.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(json.dumps(finite(record), ensure_ascii=False) + "\n" for record in records)

    on_validation_batch_end = on_predict_batch_end = on_test_batch_end

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints and writes what there is."""
        if trainer.state.fn == TrainerFn.FITTING or not isinstance(pl_module, DMPO) or not trainer.is_global_zero:
            return
        facts, results = evaluation_facts(trainer, pl_module), pl_module.evaluator.results
        print("\n".join([*table(facts["task"], results), "", *fact_lines(facts)]))
        if self._file is not None:
            directory = self._file.parent
            set_aside(directory / EVALUATION)
            plain = [vars(each) | {"n": each.prompts, "means": named_means(each.means)} for each in results]
            write_object(directory / EVALUATION, facts | {"results": plain})
            write_page(directory)

    on_validation_end = on_test_end


def evaluation_facts(trainer: Trainer, module: DMPO) -> dict[str, Any]:
    """What the numbers depend on, ready for JSON. A fact is None where data or reward do not say."""
    of_task = task_facts(getattr(trainer, "datamodule", None))
    if module.evaluator.own_reward is not None:
        of_task["rewards"] = module.evaluator.reward.name
    # The task may have a check, but a reward of one's own may be without.
    if module.evaluator.reward.check is None:
        of_task["check"] = None
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
    # Of a task of which no example was evaluated.
    nothing = (math.nan, math.nan)
    rows = [["", "length", "accuracy", *votes, "effective length", "truncated", "tokens/s"]]
    for result, (name, prefix) in product(results, lines.items()):
        accuracy, error = result.means.get(f"{prefix}accuracy", nothing)
        label = escaped(result.sampler if name is None else f"{name}/{result.sampler}")
        row = [label, str(result.length), f"{accuracy:.4f} +- {error:.4f}"]
        row += [f"{result.means.get(prefix + vote, nothing)[0]:.4f}" for vote in votes]
        length, truncated = (result.means.get(prefix + each, nothing)[0] for each in ("effective_length", "truncated"))
        # Throughput is known of all tasks together.
        rows.append([*row, f"{length:.1f}", f"{truncated:.4f}", "" if prefix else f"{result.tokens_per_second:.0f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


def fact_lines(facts: dict[str, Any]) -> list[str]:
    """One line per fact, of a long text its beginning and end. ``evaluation.json`` has it all."""
    width = max(map(len, facts))
    texts = {name: each if isinstance(each, str) else json.dumps(each) for name, each in facts.items()}
    return [f"{name.ljust(width)}  {shortened(text)}" for name, text in texts.items()]


CompletionWriter = EvaluationReport
"""The name of the part that writes completions, which configurations still give."""
