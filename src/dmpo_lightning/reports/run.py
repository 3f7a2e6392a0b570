"""A run as its directory tells it. Files that are missing, old or half-written leave gaps and no errors."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmpo_lightning.reports.lines import read_lines

RUN, METRICS, ROLLOUTS, EXAMPLES, GUARDS = "run.json", "metrics.jsonl", "rollouts", "examples.jsonl", "guards.jsonl"
SUMMARY, EVALUATION, REPORT = "summary.json", "evaluation.json", "report.html"
"""Names within a run directory."""
KNOWN = (RUN, METRICS, ROLLOUTS, EXAMPLES, GUARDS, SUMMARY, EVALUATION)
"""By any of these a folder is known as a run's."""


@dataclass(frozen=True)
class Point:
    """What was known of a run at one moment: after a rollout buffer, or after a validation."""

    step: float
    rollouts: float
    seconds: float
    values: Mapping[str, float]


@dataclass(frozen=True)
class Completion:
    """A completion with how it came about, as far as it is known."""

    prompt: str
    text: str
    prompt_index: int
    iteration: int | None = None
    reward: float | None = None
    components: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, float] = field(default_factory=dict)
    """Of training: weight, signal, log_rnd."""
    moment: str = ""
    """Of a held-out example: before or after fitting."""
    tokens: tuple[str, ...] = ()
    steps: tuple[int, ...] = ()
    """When each token was revealed. One that is negative was filled in without a step of its own."""
    confidences: tuple[float, ...] = ()


@dataclass(frozen=True)
class Run:
    """All that a report says of one run but its rollouts, which may be many (`rollouts.chosen`)."""

    name: str
    folder: Path
    facts: Mapping[str, Any]
    buffers: tuple[Point, ...]
    validations: tuple[Point, ...]
    summary: Mapping[str, Any]
    guards: tuple[tuple[float | None, str, str], ...]
    """Step, name and message."""
    examples: tuple[Completion, ...]


def read_run(folder: Path, name: str) -> Run:
    """Reads a run directory.

    Raises:
        ValueError: there is no such folder, or nothing in it is a run's.
    """
    if not folder.is_dir():
        raise ValueError(f"RUN must be the directory of a run, such as runs/sudoku_tiny/latest; got {folder}.")
    if not any((folder / known).exists() for known in KNOWN):
        inside = sorted(str(path.parent) for known in KNOWN for path in folder.glob(f"*/{known}"))
        meant = f" Did you mean {inside[-1]}?" if inside else ""
        raise ValueError(f"RUN must hold one of {', '.join(KNOWN)}; got {folder}, which holds none.{meant}")
    metrics = list(read_lines(folder / METRICS))
    guards = read_lines(folder / GUARDS)
    return Run(
        name=name,
        folder=folder,
        facts=read_object(folder / RUN),
        buffers=points(metrics, "buffer", "iteration"),
        validations=points(metrics, "validation", "step"),
        summary=read_object(folder / SUMMARY),
        guards=tuple((number(each.get("step")), text(each.get("name")), text(each.get("message"))) for each in guards),
        examples=tuple(completion(record) for record in read_lines(folder / EXAMPLES)),
    )


def read_object(path: Path) -> dict[str, Any]:
    """The object of a JSON file, an empty one where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def points(records: list[dict[str, Any]], kind: str, key: str) -> tuple[Point, ...]:
    """The lines of one kind in the order of their steps. Of several with the same ``key`` the last counts."""
    found: dict[float, Point] = {}
    for record in records:
        place, step, values = number(record.get(key)), number(record.get("step")), record.get("values")
        if record.get("kind") == kind and place is not None and step is not None and isinstance(values, dict):
            found[place] = Point(
                step=step,
                rollouts=number(record.get("rollouts")) or 0.0,
                seconds=number(record.get("seconds")) or 0.0,
                values=numbers(values),
            )
    return tuple(sorted(found.values(), key=lambda point: point.step))


def completion(record: Mapping[str, Any]) -> Completion:
    """A line of rollouts or of examples."""
    tokens = [text(each) for each in of_kind(record.get("tokens"), list)]
    steps = [number(each) for each in of_kind(record.get("reveal_step"), list)]
    confidences = [number(each) for each in of_kind(record.get("confidence"), list)]
    is_whole = tokens and len(tokens) == len(steps) == len(confidences)
    iteration = number(record.get("iteration"))
    return Completion(
        prompt=text(record.get("prompt")),
        text=text(record.get("completion")),
        prompt_index=int(number(record.get("prompt_index")) or 0),
        iteration=None if iteration is None else int(iteration),
        reward=number(record.get("reward")),
        components=numbers(of_kind(record.get("components"), dict)),
        facts=numbers({name: record.get(name) for name in ("weight", "signal", "log_rnd")}),
        moment=text(record.get("moment")),
        tokens=tuple(tokens) if is_whole else (),
        steps=tuple(int(step or 0) for step in steps) if is_whole else (),
        confidences=tuple(min(max(each or 0.0, 0.0), 1.0) for each in confidences) if is_whole else (),
    )


def of_kind(value: Any, kind: type) -> Any:
    """The value if it is of this kind, else an empty one."""
    return value if isinstance(value, kind) else kind()


def number(value: Any) -> float | None:
    """A finite number, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        as_float = float(value)
    # Of a whole number that is too large.
    except OverflowError:
        return None
    return as_float if math.isfinite(as_float) else None


def numbers(values: Mapping[Any, Any]) -> dict[str, float]:
    """Those of the values that are finite numbers."""
    return {str(name): found for name, each in values.items() if (found := number(each)) is not None}


def text(value: Any) -> str:
    """A text, empty for None."""
    return "" if value is None else str(value)
