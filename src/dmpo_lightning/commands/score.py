"""``dmpo-lightning score``: checks saved completions again, without a model. Imports no torch."""

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from dmpo_lightning.commands.arguments import CommandParser
from dmpo_lightning.data.sources import Parser, load_file
from dmpo_lightning.rewards.functions import Judge, ScoreError, call_each
from dmpo_lightning.tasks.base import Task, Verdict
from dmpo_lightning.tasks.benchmark import Benchmark
from dmpo_lightning.tasks.countdown import Countdown
from dmpo_lightning.tasks.gsm8k import GSM8K
from dmpo_lightning.tasks.math500 import Math500
from dmpo_lightning.tasks.sudoku import Sudoku

TASKS: dict[str, type[Task]] = {"gsm8k": GSM8K, "math500": Math500, "countdown": Countdown, "sudoku": Sudoku}
PARSER = CommandParser("score", __doc__)
_add = PARSER.add_argument
_add("--task", required=True, help=f"{', '.join(TASKS)}, or the dotted path of a Task class")
_add("--check", choices=("published", "verified"), default="verified", help="which variant of it")
_add("--algebra", action="store_true", help="math500: also compare by math-verify")
_add("--file", required=True, help="completions, one JSON object per line")
_add("--only", metavar="NAME", help="of a mixture: its name of the task")
_add("--json", action="store_true", help="print one JSON object")


def run(arguments: Sequence[str]) -> None:
    """Runs the command. Raises ValueError for what a user can mend."""
    options = PARSER.parse_args(arguments)
    task = make_task(options.task, options.check, algebra=options.algebra)
    summary = {"task": options.task, "check": options.check} | score_file(
        task, Path(options.file), only=options.only or options.task
    )
    if options.json:
        print(json.dumps(summary))
    else:
        runs = summary.pop("samplers", {})
        for name, value in summary.items():
            print(f"{name:15} {value}")
        for run, part in runs.items():
            print(f"{run:15} {part['correct']}/{part['n']}, accuracy {part['accuracy']}")


def make_task(name: str, check: str, *, algebra: bool = False) -> Task:
    """A task by its short name or its dotted path, with the variant ``check`` of its check if it takes one.

    Raises:
        ValueError: no such task, or computer algebra for another check than the verified one of math500.
    """
    try:
        task = TASKS.get(name) or resolve_name(name)
    except (ImportError, AttributeError, ValueError):
        task = None
    if not (isinstance(task, type) and issubclass(task, Task)):
        known = ", ".join(TASKS)
        raise ValueError(f"`--task` must be one of {known} or the dotted path of a Task class, got {name!r}.")
    if algebra and (task is not Math500 or check != "verified"):
        raise ValueError(f"`--algebra` needs --task math500 and --check verified, got {name} and {check}.")
    # `Math500` passes the option on unnamed, so that its signature alone does not tell.
    takes_check = issubclass(task, Benchmark) or "check" in inspect.signature(task).parameters
    options: dict[str, Any] = ({"check": check} if takes_check else {}) | ({"algebra": True} if algebra else {})
    try:
        return task(**options)
    except TypeError as error:
        raise ValueError(f"`--task` {name} cannot be made without arguments: {error}.") from error


def score_file(task: Task, path: Path, *, only: str | None = None) -> dict[str, Any]:
    """Counts what the check says of the completions in a JSONL file.

    Its records hold ``question``, ``ground_truth`` and ``completion``, or are those of `EvaluationReport`. The
    completions of several samplers or lengths are counted by themselves too, in ``samplers``. Of a mixture only the
    completions of the task ``only`` are counted.

    Raises:
        ValueError: a file or a line that cannot be read, named.
    """
    # Checked while the file is read, so that an error names the line.
    records = load_file(path, Parser(lambda record: _record(task, record, only), ("completion",)))
    others = {record["task"] for record in records} - {None, only}
    runs: dict[str, list[Verdict]] = {}
    for record in records:
        if record["task"] in (None, only):
            runs.setdefault(record["run"], []).append(record["verdict"])
    if not runs:
        raise ValueError(f"{path} holds completions of the tasks {sorted(others)}; name one of them by `--only`.")
    summary = _summary(task, [verdict for verdicts in runs.values() for verdict in verdicts])
    if len(runs) > 1:
        summary["samplers"] = {run: _summary(task, verdicts) for run, verdicts in runs.items()}
    return summary


def _summary(task: Task, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    correct = sum(verdict.correct for verdict in verdicts)
    summary: dict[str, Any] = {"n": len(verdicts), "correct": correct, "accuracy": correct / len(verdicts)}
    shares = [verdict.share for verdict in verdicts if verdict.share is not None]
    if len(shares) == len(verdicts):
        right, of = sum(share.right for share in shares), sum(share.of for share in shares)
        # As published: the right parts over all parts, which is no mean over the answers.
        if task.accuracy == shares[0].name:
            summary["accuracy"] = right / max(of, 1)
        summary |= {shares[0].name: right, shares[0].of_name: of}
    return summary


def _record(task: Task, record: Mapping[str, Any], only: str | None) -> dict[str, Any]:
    """The verdict on a record, the run that wrote it, and its task's name in a mixture.

    Raises whatever the check raises, and for something else than a verdict, as for a bad record.
    """
    if not isinstance(record["completion"], str):
        raise ValueError("`completion` must be a text")
    if "example" not in record and not {"question", "ground_truth"} <= set(record):
        raise ValueError("a record needs `example`, or `question` and `ground_truth` of one of " + ", ".join(TASKS))
    example = record["example"] if "example" in record else task.from_saved(record)
    if not isinstance(example, Mapping):
        raise ValueError(f"`example` must be an object, got {type(example).__name__}")
    run = f"{record['sampler']}/{record['length']}" if {"sampler", "length"} <= set(record) else ""
    found: dict[str, Any] = {"verdict": None, "run": run, "task": example.get("task")}
    # Examples of a mixture's other tasks are of other kinds, which this check could not read.
    if found["task"] in (None, only):
        text = record["completion"]
        (judged,) = call_each(Judge(lambda *_: 0.0, task.check), [(example, text, text)])
        if isinstance(judged, ScoreError):
            cause = judged.__cause__
            raise cause if isinstance(cause, ValueError | LookupError) else ValueError(f"the check failed: {judged}")
        found["verdict"] = judged.verdict
    return found
