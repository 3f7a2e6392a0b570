"""What a run of DMPO changed on held-out examples: a table, ``summary.json``, a learning curve, and the report."""

import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from dmpo_lightning.callbacks.completion_records import example_records
from dmpo_lightning.callbacks.facts import named_means
from dmpo_lightning.callbacks.preemption import leave_if_told
from dmpo_lightning.callbacks.progress import ProgressLine
from dmpo_lightning.callbacks.records import RunRecorder, write_page
from dmpo_lightning.distributed.internals import callbacks_of
from dmpo_lightning.evaluation.batch import MEASURES, EvaluatedBatch
from dmpo_lightning.evaluation.metrics import EvaluationMetrics
from dmpo_lightning.modules.dmpo import DMPO
from dmpo_lightning.modules.run_directory import run_directory
from dmpo_lightning.reports.lines import encoded, read_lines, replace, write_object
from dmpo_lightning.reports.plots import learning_curve
from dmpo_lightning.reports.record import AFTER, BASE, BEFORE, ROLLOUTS, SUMMARY, read_runs
from dmpo_lightning.rollout import PromptBatch
from dmpo_lightning.samplers import Sampler
from dmpo_lightning.tasks.answers import before_end
from dmpo_lightning.tasks.base import Example, Task
from dmpo_lightning.terminal import escaped, printable, shortened

Result = dict[str, tuple[float, float]]
"""Mean and standard error of each score component."""
CURVE = "learning_curve.png"
EXAMPLES = 64
"""How many of the test split are recorded."""


class BeforeAfterReport(Callback):
    """Evaluates the test split before and after fitting, and writes what changed into the run directory.

    ``summary.json`` holds ``solve_rate_before``, ``solve_rate_best_temperature_before`` and ``solve_rate_after`` (at
    T = 1 unless ``sampled`` says otherwise), ``greedy_before`` and ``greedy_after``. It also holds ``seconds`` of
    fitting, which include validation but not the two evaluations of this report, ``rollouts``, ``examples`` that were
    evaluated, ``seed`` and all results. ``learning_curve.png`` shows the validations that `RunRecorder` has recorded.
    ``rollouts`` gets the completions of the first examples by ``sampled``, before and after, token by token.
    ``report.html``, which shows all of it, is the recorder's.

    The final weights are evaluated. Not for strategies that divide the model's weights, because the report runs outside
    of the training loop.

    Args:
        samplers: by name. All of them are evaluated before fitting.
        sampled: the name of the sampler at T = 1.
        greedy: the name of the greedy sampler. It and ``sampled`` are evaluated again afterwards.
        curve: logged validation metrics to draw, each with the name of the sampler whose base is drawn beside it.
            None draws ``val/sampled/accuracy`` beside ``sampled`` and ``val/greedy/accuracy`` beside ``greedy``.

    Raises:
        ValueError: ``sampled``, ``greedy`` or a name in ``curve`` is not among the samplers.
    """

    def __init__(
        self,
        samplers: Mapping[str, Sampler],
        *,
        sampled: str = "temperature_1",
        greedy: str = "greedy",
        curve: dict[str, str] | None = None,
    ) -> None:
        curve = {"val/sampled/accuracy": sampled, "val/greedy/accuracy": greedy} if curve is None else curve
        for name in (sampled, greedy, *curve.values()):
            if name not in samplers:
                raise ValueError(f"`samplers` must contain {name!r}, got {sorted(samplers)}.")
        self.samplers, self.sampled, self.greedy, self.curve = dict(samplers), sampled, greedy, dict(curve)
        self.before: dict[str, Result] = {}
        self.after: dict[str, Result] = {}
        self.seconds = 0.0
        self._started: float | None = None
        self._learnt: tuple[Example, str, str] | None = None
        self._examples = 0
        """How many are evaluated."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A resumed run knows it from its first part, and its weights are not the base's any more.
        if not self.before:
            started = time.perf_counter()
            self.before = self._evaluate(trainer, pl_module, BEFORE, list(self.samplers))
            before = {name: named_means(result) for name, result in self.before.items()}
            line = {"kind": BASE, "examples": self._examples, BEFORE: before}
            self._note(trainer, pl_module, line, self._base_values(), started)
        if isinstance(bar := trainer.progress_bar_callback, ProgressLine) and isinstance(pl_module, DMPO):
            steps = (self.samplers[name].num_steps(pl_module.completion_length) for name in (self.sampled, self.greedy))
            bar.expect_ending(self._examples * pl_module.evaluator.completions / trainer.world_size, sum(steps))
        # Moved back by what the run took before it was resumed.
        self._started = time.perf_counter() - self.seconds

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds, self._started = self._seconds_by_now(), None
        started = time.perf_counter()
        self.after = self._evaluate(trainer, pl_module, AFTER, [self.sampled, self.greedy])
        self._note(trainer, pl_module, {"kind": AFTER}, {}, started)

    def _note(
        self, trainer: Trainer, module: LightningModule, line: dict[str, Any], values: dict[str, float], started: float
    ) -> None:
        """Has the recorder write a line of an evaluation that began then."""
        line["values"] = values | {"time/evaluation": round(time.perf_counter() - started, 3)}
        for recorder in callbacks_of(trainer, RunRecorder):
            recorder.note(trainer, module, line)

    def _base_values(self) -> dict[str, float]:
        """What a validation would have measured of the base, by the names that it gives."""
        values: dict[str, float] = {}
        for metric, sampler in self.curve.items():
            place, result = metric.rpartition("/")[0], self.before[sampler]
            values |= {f"{place}/{measure}": mean for measure, (mean, _) in result.items()}
            values[f"{place}/accuracy_stderr"] = result["accuracy"][1]
        return values

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reports, now that other callbacks have written what is shown."""
        # On all ranks, because it is a broadcast.
        directory = run_directory(trainer)
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert isinstance(pl_module, DMPO)
        # Printed first: files may fail, and what took hours is then still to be read.
        print(printable(self.table(pl_module.rollouts_seen)))
        task = getattr(getattr(trainer, "datamodule", None), "task", None)
        if self._learnt is not None and isinstance(task, Task):
            print(learnt_example(task, *self._learnt))
        try:
            write_object(directory / SUMMARY, self.summary(pl_module.seed, pl_module.rollouts_seen))
            learning_curve(read_runs([directory])[0], self.bases()).savefig(directory / CURVE, dpi=120)
        # Of the disk, which does not make the run fail.
        except (OSError, ValueError) as error:
            rank_zero_warn(escaped(f"{SUMMARY} and {CURVE} could not be written to {directory}: {error}"))
        if not callbacks_of(trainer, RunRecorder):
            write_page(directory)

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before, "seconds": self._seconds_by_now(), "examples": self._examples}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        before, self.seconds = state_dict["before"], state_dict["seconds"]
        # An older checkpoint does not say.
        self._examples = state_dict.get("examples", 0)
        self.before = {name: before[name] for name in self.samplers} if before else {}

    def _seconds_by_now(self) -> float:
        return self.seconds if self._started is None else time.perf_counter() - self._started

    def _evaluate(self, trainer: Trainer, module: LightningModule, moment: str, names: list[str]) -> dict[str, Result]:
        assert isinstance(module, DMPO)
        metrics = {name: EvaluationMetrics() for name in names}
        records: list[dict[str, Any]] = []
        examples: list[Example] = []
        for name, prompts, evaluated in self._batches(trainer, module, moment, names):
            metrics[name].update(evaluated)
            # Rank 0 alone writes them, and they cost the decoding of every token.
            if name == self.sampled and trainer.is_global_zero and len(records) < EXAMPLES:
                data = getattr(trainer, "datamodule", None)
                records += example_records(evaluated, prompts, module.policy.tokenizer, moment, data)
                examples += evaluated.examples
        # On all ranks, because it is a broadcast.
        directory = run_directory(trainer)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._record(directory / ROLLOUTS, moment, records[:EXAMPLES], examples)
        return {name: found.result(name, module.completion_length).means for name, found in metrics.items()}

    def _batches(
        self, trainer: Trainer, module: DMPO, moment: str, names: list[str]
    ) -> Iterator[tuple[str, PromptBatch, EvaluatedBatch]]:
        """The test split, each batch by each of these samplers."""
        data = getattr(trainer, "datamodule", None)
        if data is None:
            raise ValueError("BeforeAfterReport needs a datamodule, whose test split it evaluates; pass one to fit.")
        loader = data.test_dataloader()
        limit = trainer.limit_test_batches
        batches = min(limit if isinstance(limit, int) else int(limit * len(loader)), len(loader))
        what, plural = {BEFORE: "the base", AFTER: "the trained model"}[moment], "s" * (len(names) > 1)
        count = self._examples = round(len(loader.kept) * batches / len(loader))
        bar = trainer.progress_bar_callback
        say: Callable[[str], None] = bar.announce if isinstance(bar, ProgressLine) else rank_zero_info
        say(f"Evaluating {what} on {count} held-out examples with {len(names)} sampler{plural} ...")
        for number, prompts in enumerate(islice(loader, batches)):
            # Lightning moves the batches of its own loops only.
            batch = prompts.to(trainer.strategy.root_device)
            for position, name in enumerate(names):
                if isinstance(bar, ProgressLine):
                    bar.note_evaluation("evaluating", number * len(names) + position, batches * len(names))
                sampler = self.samplers[name]
                yield name, prompts, module.evaluator.evaluate_batch(batch, sampler, module.completion_length)
                # It may take minutes, of which a job that is told to end has none.
                leave_if_told(trainer)

    def _record(self, folder: Path, moment: str, records: list[dict[str, Any]], examples: list[Example]) -> None:
        """Writes examples, and finds one that was learnt."""
        wrong = {each["prompt_index"]: each for each in read_lines(folder / f"{BEFORE}.jsonl") if not each["correct"]}
        for record, example in zip(records, examples, strict=False):
            if moment == AFTER and record["correct"] and record["prompt_index"] in wrong:
                self._learnt = example, wrong[record["prompt_index"]]["completion"], record["completion"]
                break
        try:
            if moment == BEFORE:
                # Of an earlier run in the same folder there may be some.
                replace(folder / f"{AFTER}.jsonl", b"")
            replace(folder / f"{moment}.jsonl", b"".join(map(encoded, records)))
        except OSError as error:
            rank_zero_warn(escaped(f"The run goes on without the examples of {folder}: {error}."))

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
            "before": {name: named_means(result) for name, result in self.before.items()},
            "after": {name: named_means(result) for name, result in self.after.items()},
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


def learnt_example(task: Task, example: Example, before: str, after: str) -> str:
    """An example beside its answers, as its task draws it, or in words."""
    answers = {BEFORE: before, AFTER: after}
    question = task.show(example, None)
    if question is None:
        prompt = task.prompt(example)
        asked = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
        said = {"prompt": asked} | {moment: before_end(answer) for moment, answer in answers.items()}
        lines = [f"{name}: {shortened(text)}" for name, text in said.items()]
    else:
        drawings = {"question": question} | {name: task.show(example, text) or "" for name, text in answers.items()}
        columns = [[title, *drawing.splitlines()] for title, drawing in drawings.items()]
        widths = [max(map(len, column)) for column in columns]
        rows = zip_longest(*columns, fillvalue="")
        lines = ["    ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(["An example that was learnt:", *lines])
