"""What a run of DMPO changed on held-out examples: a table, ``summary.json``, a learning curve, and the report."""

import time
from collections.abc import Mapping
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from dmpo_lightning.callbacks.completion_records import example_records
from dmpo_lightning.callbacks.facts import named_means
from dmpo_lightning.callbacks.preemption import leave_if_told
from dmpo_lightning.callbacks.progress import ProgressLine
from dmpo_lightning.callbacks.records import RunRecorder
from dmpo_lightning.distributed.internals import callbacks_of
from dmpo_lightning.evaluation.batch import MEASURES
from dmpo_lightning.evaluation.metrics import EvaluationMetrics
from dmpo_lightning.modules.dmpo import DMPO
from dmpo_lightning.modules.run_directory import run_directory
from dmpo_lightning.reports.lines import encoded, read_lines, replace, write_object
from dmpo_lightning.reports.plots import learning_curve
from dmpo_lightning.reports.record import AFTER, BASE, BEFORE, ROLLOUTS, SUMMARY, read_runs
from dmpo_lightning.samplers import Sampler
from dmpo_lightning.tasks.answers import before_end
from dmpo_lightning.terminal import escaped, printable, shortened

Result = dict[str, tuple[float, float]]
"""Mean and standard error of each score component."""
CURVE = "learning_curve.png"
EXAMPLES = 64
"""How many of the test split are recorded."""


class BeforeAfterReport(Callback):
    """Evaluates the test split before and after fitting, and writes what changed into the run directory.

    ``summary.json`` holds ``solve_rate_before``, ``solve_rate_best_temperature_before`` and ``solve_rate_after`` (at
    T = 1 unless ``sampled`` says otherwise), ``greedy_before``, ``greedy_after`` and all results. Its ``seconds`` of
    fitting include validation but not the two evaluations of this report. ``learning_curve.png`` shows the validations
    that `RunRecorder` has recorded, and ``rollouts`` gets the completions of the first examples by ``sampled``, before
    and after, token by token.

    The final weights are evaluated. Not for strategies that divide the model's weights, because the report runs outside
    of the training loop.

    Args:
        samplers: by name. All of them are evaluated before fitting.
        sampled: the name of the sampler at T = 1.
        greedy: the name of the greedy sampler. It and ``sampled`` are evaluated again afterwards, and their bases are
            drawn beside ``val/greedy/accuracy`` and ``val/sampled/accuracy``.

    Raises:
        ValueError: ``sampled`` or ``greedy`` is not among the samplers.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from dmpo_lightning import BeforeAfterReport, ConfidenceSampler
        >>> samplers = {"temperature_1": ConfidenceSampler(), "greedy": ConfidenceSampler(temperature=0.0)}
        >>> trainer = Trainer(max_steps=200, callbacks=[BeforeAfterReport(samplers)])
    """

    def __init__(
        self, samplers: Mapping[str, Sampler], *, sampled: str = "temperature_1", greedy: str = "greedy"
    ) -> None:
        for name in (sampled, greedy):
            if name not in samplers:
                raise ValueError(f"`samplers` must contain {name!r}, got {sorted(samplers)}.")
        self.samplers, self.sampled, self.greedy = dict(samplers), sampled, greedy
        self.curve = {"val/sampled/accuracy": sampled, "val/greedy/accuracy": greedy}
        self.before: dict[str, Result] = {}
        self.after: dict[str, Result] = {}
        self.seconds = 0.0
        self._started: float | None = None
        self._took = 0.0
        self._examples = 0
        """How many are evaluated."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        # A resumed run knows it from its first part, and its weights are not the base's any more.
        if not self.before:
            self.before = self._evaluate(trainer, pl_module, BEFORE, list(self.samplers))
            line = {"kind": BASE, "examples": self._examples, BEFORE: _named(self.before)}
            # What a validation would have measured of the base, by the names that it gives.
            values: dict[str, float] = {}
            for metric, sampler in self.curve.items():
                values |= {metric.replace("accuracy", name): mean for name, (mean, _) in self.before[sampler].items()}
                values[f"{metric}_stderr"] = self.before[sampler]["accuracy"][1]
            self._note(trainer, pl_module, line, values)
        if isinstance(bar := trainer.progress_bar_callback, ProgressLine) and bar.clock is not None:
            steps = (self.samplers[name].num_steps(pl_module.completion_length) for name in (self.sampled, self.greedy))
            bar.clock.ending = self._examples * pl_module.evaluator.completions / trainer.world_size * sum(steps)
        # Moved back by what the run took before it was resumed.
        self._started = time.perf_counter() - self.seconds

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.seconds, self._started = self._seconds_by_now(), None
        self.after = self._evaluate(trainer, pl_module, AFTER, [self.sampled, self.greedy])
        self._note(trainer, pl_module, {"kind": AFTER}, {})

    def _note(self, trainer: Trainer, module: LightningModule, line: dict[str, Any], values: dict[str, float]) -> None:
        for recorder in callbacks_of(trainer, RunRecorder):
            recorder.note(trainer, module, line | {"values": values | {"time/evaluation": self._took}})

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Reports, now that other callbacks have written what is shown."""
        # On all ranks, because it is a broadcast.
        directory = run_directory(trainer)
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        # Printed first: files may fail, and what took hours is then still to be read.
        said = [self.table(pl_module.rollouts_seen), learnt_example(directory / ROLLOUTS)]
        print(printable("\n".join(filter(None, said))))
        try:
            write_object(directory / SUMMARY, self.summary(pl_module.seed, pl_module.rollouts_seen))
            learning_curve(read_runs([directory])[0], self.bases()).savefig(directory / CURVE, dpi=120)
        # Of the disk, which does not make the run fail.
        except (OSError, ValueError) as error:
            rank_zero_warn(escaped(f"{SUMMARY} and {CURVE} could not be written to {directory}: {error}"))

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before, "seconds": self._seconds_by_now(), "examples": self._examples}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before, self.seconds, self._examples = (state_dict[name] for name in ("before", "seconds", "examples"))

    def _seconds_by_now(self) -> float:
        return self.seconds if self._started is None else time.perf_counter() - self._started

    def _evaluate(self, trainer: Trainer, module: DMPO, moment: str, names: list[str]) -> dict[str, Result]:
        """Evaluates the test split by some samplers, each batch by all of them, and records the first examples."""
        data, bar, started = getattr(trainer, "datamodule", None), trainer.progress_bar_callback, time.perf_counter()
        if data is None:
            raise ValueError("BeforeAfterReport needs a datamodule, whose test split it evaluates; pass one to fit.")
        loader, limit, length = data.test_dataloader(), trainer.limit_test_batches, module.completion_length
        batches = min(limit if isinstance(limit, int) else int(limit * len(loader)), len(loader))
        self._examples = round(len(loader.kept) * batches / len(loader))
        if isinstance(bar, ProgressLine):
            what = "the base" if moment == BEFORE else "the trained model"
            bar.announce(f"Evaluating {what} on {self._examples} held-out examples with {len(names)} samplers ...")
        metrics, records = {name: EvaluationMetrics() for name in names}, list[dict[str, Any]]()
        for number, prompts in enumerate(islice(loader, batches)):
            # Lightning moves the batches of its own loops only.
            batch = prompts.to(trainer.strategy.root_device)
            for position, name in enumerate(names):
                if isinstance(bar, ProgressLine):
                    bar.note("evaluating", number * len(names) + position, batches * len(names), alone=True)
                evaluated = module.evaluator.evaluate_batch(batch, self.samplers[name], length)
                metrics[name].update(evaluated)
                # Rank 0 alone writes them, and they cost the decoding of every token.
                if name == self.sampled and trainer.is_global_zero and len(records) < EXAMPLES:
                    records += example_records(evaluated, prompts, module.policy.tokenizer, moment, data)
                # It may take minutes, of which a job that is told to end has none.
                leave_if_told(trainer)
        # On all ranks, because it is a broadcast.
        folder = run_directory(trainer) / ROLLOUTS
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            try:
                # Of an earlier run in the same folder there may be some of afterwards.
                for each, kept in {AFTER: [], moment: records[:EXAMPLES]}.items():
                    replace(folder / f"{each}.jsonl", b"".join(map(encoded, kept)))
            except OSError as error:
                rank_zero_warn(escaped(f"The run goes on without the examples of {folder}: {error}."))
        self._took = round(time.perf_counter() - started, 3)
        return {name: found.result(name, length).means for name, found in metrics.items()}

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
            "examples": self._examples,
            "seed": seed,
            "weights": "final",
            "before": _named(self.before),
            "after": _named(self.after),
        }

    def bases(self) -> dict[str, tuple[str, float]]:
        """What is drawn beside each metric of the curve: the sampler of a base, and its accuracy."""
        return {metric: (sampler, self.before[sampler]["accuracy"][0]) for metric, sampler in self.curve.items()}

    def table(self, rollouts: int) -> str:
        """One line per sampler and moment."""
        left_out = ("accuracy", "reward", *MEASURES)
        measured = [*self.before.values(), *self.after.values()]
        components = [name for name in measured[0] if name not in left_out and all(name in each for each in measured)]
        lines = [f"{'held-out examples':<28}" + "".join(f"{name:>18}" for name in components)]
        for moment, results in ((BEFORE, self.before), (AFTER, self.after)):
            for name, result in results.items():
                cells = "".join(f"{result[c][0]:>10.3f} +-{result[c][1]:.3f}" for c in components)
                lines.append(f"{moment + ', ' + name:<28}{cells}")
        lines.append(f"trained for {self.seconds:.0f} s on {rollouts} rollouts; final weights")
        return "\n".join(lines)


def _named(results: Mapping[str, Result]) -> dict[str, Any]:
    return {name: named_means(result) for name, result in results.items()}


def learnt_example(folder: Path) -> str:
    """The first recorded example that was wrong before and is right now, as its task draws it, or in words.

    It is empty where there is none.
    """
    wrong = {each["prompt_index"]: each for each in read_lines(folder / f"{BEFORE}.jsonl") if not each["correct"]}
    now = (each for each in read_lines(folder / f"{AFTER}.jsonl") if each["correct"] and each["prompt_index"] in wrong)
    if (after := next(now, None)) is None:
        return ""
    before = wrong[after["prompt_index"]]
    if "drawings" in after:
        drawings = [*before["drawings"], after["drawings"][1]]
        columns = [
            [title, *each.splitlines()] for title, each in zip(("question", BEFORE, AFTER), drawings, strict=True)
        ]
        widths = [max(map(len, column)) for column in columns]
        rows = zip_longest(*columns, fillvalue="")
        lines = ["    ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    else:
        said = {"prompt": before["prompt"], BEFORE: before["completion"], AFTER: after["completion"]}
        lines = [f"{name}: {shortened(before_end(text))}" for name, text in said.items()]
    return "\n".join(["An example that was learnt:", *lines])
