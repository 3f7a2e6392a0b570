"""What a run of DMPO changed on held-out examples: a table, ``summary.json``, a learning curve, and the report."""

import json
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from dmpo_lightning.callbacks.example_shown import LearntExample
from dmpo_lightning.callbacks.examples import example_records, write_examples
from dmpo_lightning.callbacks.preemption import leave_untrained
from dmpo_lightning.callbacks.progress import announce, note_phase
from dmpo_lightning.callbacks.rollout_records import TokenTexts
from dmpo_lightning.data.prompts import PromptLoader
from dmpo_lightning.evaluation.batch import MEASURES
from dmpo_lightning.evaluation.metrics import EvaluationMetrics
from dmpo_lightning.modules.dmpo import DMPO
from dmpo_lightning.modules.run_directory import run_directory
from dmpo_lightning.reports.lines import replace
from dmpo_lightning.reports.page import write_report
from dmpo_lightning.reports.run import EXAMPLES, REPORT
from dmpo_lightning.samplers import Sampler
from dmpo_lightning.terminal import escaped

Result = dict[str, tuple[float, float]]
"""Mean and standard error of each score component."""


class BeforeAfterReport(Callback):
    """Evaluates the test split before and after fitting, and writes what changed into the run directory.

    ``summary.json`` holds ``solve_rate_before``, ``solve_rate_best_temperature_before`` and ``solve_rate_after`` (at
    T = 1 unless ``sampled`` says otherwise), ``greedy_before`` and ``greedy_after``. It also holds ``seconds`` of
    fitting, which include validation but not the two evaluations of this report, ``rollouts``, ``seed`` and all
    results. ``learning_curve.png`` shows the validation accuracy. ``examples.jsonl`` holds the completions of the first
    examples by ``sampled``, before and after, token by token. ``report.html`` shows all of it, as ``dmpo-lightning
    report`` does.

    The final weights are evaluated. Not for strategies that divide the model's weights, because the report runs outside
    of the training loop.

    Args:
        samplers: by name. All of them are evaluated before fitting.
        sampled: the name of the sampler at T = 1.
        greedy: the name of the greedy sampler. It and ``sampled`` are evaluated again afterwards.
        curve: names of logged validation metrics to draw.
        examples: how many of the test split ``examples.jsonl`` holds.

    Raises:
        ValueError: ``sampled`` or ``greedy`` is not among the samplers.
    """

    def __init__(
        self,
        samplers: Mapping[str, Sampler],
        *,
        sampled: str = "temperature_1",
        greedy: str = "greedy",
        curve: tuple[str, ...] = ("val/sampled/accuracy", "val/greedy/accuracy"),
        examples: int = 64,
    ) -> None:
        for name in (sampled, greedy):
            if name not in samplers:
                raise ValueError(f"`samplers` must contain {name!r}, got {sorted(samplers)}.")
        self.samplers, self.sampled, self.greedy, self.curve_names = dict(samplers), sampled, greedy, curve
        self.examples = examples
        self.before: dict[str, Result] = {}
        self.after: dict[str, Result] = {}
        self.curve: list[dict[str, float]] = []
        self.seconds = 0.0
        self.example = LearntExample()
        self._started: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A resumed run knows it from its first part, and its weights are not the base's any more.
        if not self.before:
            self.before = self._evaluate(trainer, pl_module, "before", list(self.samplers))
        # Moved back by what the run took before it was resumed.
        self._started = time.perf_counter() - self.seconds

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        values = {
            name: float(trainer.callback_metrics[name]) for name in self.curve_names if name in trainer.callback_metrics
        }
        # The sanity check sees a few batches, before training starts.
        if values and not trainer.sanity_checking:
            self.curve.append({"step": float(trainer.global_step), **values})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds = self._seconds_by_now()
        self.after = self._evaluate(trainer, pl_module, "after", [self.sampled, self.greedy])
        # On all ranks, because it is a broadcast.
        directory = run_directory(trainer)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._report(trainer, pl_module, directory)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the report, now that other callbacks have written what it shows."""
        # On all ranks, because it is a broadcast.
        directory = run_directory(trainer)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            try:
                write_report([directory], directory / REPORT)
            # Of the disk, which does not make the run fail.
            except ValueError as error:
                print(escaped(f"No report: {error}"))
            else:
                print(escaped(next_step(directory / REPORT)))

    def state_dict(self) -> dict[str, Any]:
        wrong = self.example.wrong
        return {"before": self.before, "curve": self.curve, "seconds": self._seconds_by_now(), "wrong": wrong}

    def _seconds_by_now(self) -> float:
        return self.seconds if self._started is None else time.perf_counter() - self._started

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before, self.curve, self.seconds = state_dict["before"], state_dict["curve"], state_dict["seconds"]
        # Checkpoints of earlier versions have none.
        self.example.wrong = state_dict.get("wrong", {})

    def _evaluate(self, trainer: Trainer, module: LightningModule, moment: str, names: list[str]) -> dict[str, Result]:
        assert isinstance(module, DMPO)
        data = getattr(trainer, "datamodule", None)
        if data is None:
            raise ValueError("BeforeAfterReport needs a datamodule, whose test split it evaluates; pass one to fit.")
        loader = data.test_dataloader()
        metrics = {name: EvaluationMetrics(trainer.strategy.root_device) for name in names}
        batches = min(_batch_limit(trainer, len(loader)), len(loader))
        self._announce(trainer, moment, _examples(loader, batches), len(names))
        note = {"before": self.example.note_before, "after": self.example.note_after}[moment]
        records: list[dict[str, Any]] = []
        texts = TokenTexts(module.policy.tokenizer)
        for number, host_batch in enumerate(islice(loader, batches)):
            # Lightning moves the batches of its own loops only.
            batch = host_batch.to(trainer.strategy.root_device)
            for position, name in enumerate(names):
                note_phase(trainer, "evaluating", number * len(names) + position, batches * len(names))
                evaluated = module.evaluator.evaluate_batch(batch, self.samplers[name], module.completion_length)
                metrics[name].update(evaluated)
                if name == self.sampled:
                    note(evaluated)
                # Rank 0 alone writes them, and they cost the decoding of every token.
                if name == self.sampled and trainer.is_global_zero and len(records) < self.examples:
                    records += example_records(evaluated, host_batch, texts, moment)[: self.examples - len(records)]
            # It may take minutes, of which a job that is told to end has none.
            if moment == "before":
                leave_untrained(trainer)
        # On all ranks, because it is a broadcast.
        directory = run_directory(trainer)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            write_examples(directory / EXAMPLES, moment, records)
        return {name: found.result(name, module.completion_length).means for name, found in metrics.items()}

    def _announce(self, trainer: Trainer, moment: str, examples: int, samplers: int) -> None:
        what = {"before": "the base", "after": "the trained model"}[moment]
        plural = "s" * (samplers > 1)
        announce(trainer, f"Evaluating {what} on {examples} held-out examples with {samplers} sampler{plural} ...")

    def _report(self, trainer: Trainer, module: LightningModule, directory: Path) -> None:
        assert isinstance(module, DMPO)
        rollouts = module.rollouts_seen
        # Printed first: files may fail, and what took hours is then still to be read.
        print(self.table(rollouts))
        if text := self.example.to_text(getattr(getattr(trainer, "datamodule", None), "task", None)):
            print(text)
        try:
            self._write(directory, self.summary(module.seed, rollouts))
        except OSError as error:
            rank_zero_warn(f"summary.json and learning_curve.png could not be written to {directory}: {error}")
        else:
            print(escaped(f"Written to {directory}: summary.json, learning_curve.png"))

    def _write(self, directory: Path, summary: dict[str, Any]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        replace(directory / "summary.json", f"{json.dumps(summary, indent=2)}\n".encode())
        lines = {self.curve_names[0]: self.sampled, self.curve_names[-1]: self.greedy}
        draw_curve(self.curve, self.before, lines, directory / "learning_curve.png")

    def summary(self, seed: int, rollouts: int) -> dict[str, Any]:
        """The content of ``summary.json``."""
        rate = {name: result["accuracy"][0] for name, result in self.before.items()}
        return {
            "solve_rate_before": rate[self.sampled],
            "solve_rate_best_temperature_before": max(rate.values()),
            "solve_rate_after": self.after[self.sampled]["accuracy"][0],
            "greedy_before": rate[self.greedy],
            "greedy_after": self.after[self.greedy]["accuracy"][0],
            "seconds": round(self.seconds, 1),
            "rollouts": rollouts,
            "seed": seed,
            "weights": "final",
            "before": {name: _named(result) for name, result in self.before.items()},
            "after": {name: _named(result) for name, result in self.after.items()},
        }

    def table(self, rollouts: int) -> str:
        """One line per sampler and moment."""
        left_out = ("accuracy", "reward", *MEASURES)
        components = [name for name in next(iter(self.before.values())) if name not in left_out]
        lines = [f"{'held-out examples':<28}" + "".join(f"{name:>18}" for name in components)]
        for moment, results in (("before", self.before), ("after", self.after)):
            for name, result in results.items():
                cells = "".join(f"{result[c][0]:>10.3f} +-{result[c][1]:.3f}" for c in components)
                lines.append(f"{moment + ', ' + name:<28}{cells}")
        lines.append(f"trained for {self.seconds:.0f} s on {rollouts} rollouts; final weights")
        return "\n".join(lines)


def next_step(report: Path) -> str:
    """What somebody who has waited for a run does next."""
    return f"Next: open {report}, which shows what happened."


def _batch_limit(trainer: Trainer, batches: int) -> int:
    """How much of the test split the Trainer's flags allow: `fast_dev_run` and `limit_test_batches`."""
    limit: int | float = getattr(trainer, "fast_dev_run") or trainer.limit_test_batches
    return limit if isinstance(limit, int) and limit is not True else int(float(limit) * batches)


def _examples(loader: PromptLoader, batches: int) -> int:
    """How many examples so many batches hold, over all ranks."""
    whole = len(loader.dataset) - loader.dropped
    return whole if batches >= len(loader) else round(whole * batches / len(loader))


def _named(result: Result) -> dict[str, dict[str, float]]:
    return {component: {"mean": mean, "standard_error": error} for component, (mean, error) in result.items()}


def draw_curve(
    curve: list[dict[str, float]], before: Mapping[str, Result], baselines: Mapping[str, str], path: Path
) -> None:
    """Validation metrics over optimizer steps, and the base's test accuracy as dashed lines."""
    # Slow to import, and needed once in a run (docs/decisions/006-matplotlib.md).
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for metric, sampler in baselines.items():
        points = [point for point in curve if metric in point]
        steps, values = [point["step"] for point in points], [point[metric] for point in points]
        color = axes.plot(steps, values, marker="o", markersize=3, label=metric)[0].get_color()
        base = before[sampler]["accuracy"][0]
        axes.axhline(base, color=color, linestyle="--", linewidth=1, label=f"base, {sampler}")
    axes.set(xlabel="optimizer step", ylabel="accuracy", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
