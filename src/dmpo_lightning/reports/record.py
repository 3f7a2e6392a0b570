"""A run as its directory tells it. Files that are missing or half-written leave gaps and no errors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmpo_lightning.reports.lines import read_file, read_lines

RUN, METRICS, ROLLOUTS = "run.json", "metrics.jsonl", "rollouts"
"""What `RunRecorder` writes into a run directory: what the run is, its scalars, its rollouts."""
SUMMARY, EVALUATION, REPORT = "summary.json", "evaluation.json", "report.html"
COMPLETIONS = "completions.jsonl"
BEFORE, AFTER = "before", "after"
"""The names of files within `ROLLOUTS` that hold held-out examples, of before a fit and of after it."""
RECENT = 16
"""How many of the last buffers a report looks at."""
KNOWN = (RUN, METRICS, ROLLOUTS, SUMMARY, EVALUATION)
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
    moment: str
    """Of a held-out example before or after, else the buffer."""
    reward: float | None = None
    facts: Mapping[str, float] = field(default_factory=dict)
    """The components of the score, and of training weight, signal and log_rnd."""
    tokens: tuple[str, ...] = ()
    steps: tuple[int, ...] = ()
    """When each token was revealed. One that is negative was filled in without a step of its own."""
    confidences: tuple[float, ...] = ()


@dataclass(frozen=True)
class Run:
    """All that a report says of one run but its rollouts, which may be many (`shown_completions`)."""

    name: str
    folder: Path
    facts: Mapping[str, Any]
    buffers: tuple[Point, ...]
    validations: tuple[Point, ...]
    summary: Mapping[str, Any]
    guards: tuple[tuple[float, str, str], ...]
    """Step, name and message."""


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
    guards = [each for each in metrics if each.get("kind") == "guard"]
    return Run(
        name=name,
        folder=folder,
        facts=read_file(folder / RUN),
        buffers=_points(metrics, "buffer"),
        validations=_points(metrics, "validation"),
        summary=read_file(folder / SUMMARY),
        guards=tuple((each["step"], each["name"], each["message"]) for each in guards),
    )


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs of a report, each under a name that no other has.

    Raises:
        ValueError: a folder is none, or is not a run's.
    """
    resolved = [folder.resolve() for folder in folders]
    names = [folder.name for folder in resolved]
    # By itself a version says nothing.
    if len(set(names)) < len(names) or any(name.startswith("version_") for name in names):
        names = [f"{folder.parent.name}/{folder.name}" for folder in resolved]
    if len(set(names)) < len(names):
        names = [f"{number + 1} {name}" for number, name in enumerate(names)]
    return [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]


def shown_completions(run: Run, count: int) -> list[tuple[str, Completion]]:
    """Held-out examples, best and worst rollouts, at most ``count`` of each and one per prompt, with their heading.

    Examples come in pairs of before and after, those whose reward changed most first. Best and worst are of the last
    buffers, in which the policy is nearly what it became.
    """
    folder = run.folder / ROLLOUTS
    buffers = {path: int(path.stem.rpartition("-")[2]) for path in sorted(folder.glob("rank*-*.jsonl"))}
    recent = [path for path, buffer in buffers.items() if buffer > max(buffers.values()) - RECENT]
    rollouts = [
        _completion(record) for path in recent for record in read_lines(path) if record.get("reward") is not None
    ]
    shown = _examples(folder, count)
    for kind, sign in (("best", 1), ("worst", -1)):
        ranked = sorted(rollouts, key=lambda each: sign * (each.reward or 0.0))
        # Of each prompt the one that comes last.
        chosen = {each.prompt_index: each for each in ranked}.values()
        shown += [(kind, each) for each in sorted(chosen, key=lambda each: -sign * (each.reward or 0.0))[:count]]
    return shown


def _examples(folder: Path, count: int) -> list[tuple[str, Completion]]:
    before, after = (
        {each.prompt_index: each for each in map(_completion, read_lines(folder / f"{moment}.jsonl"))}
        for moment in (BEFORE, AFTER)
    )
    pairs = [(before[index], after[index]) for index in before if index in after]
    if not pairs:
        # A run that has not ended.
        return [("held out", each) for each in list(before.values())[:count]]
    # What became better first, and what became worse before what stayed.
    gains = {id(pair): (pair[1].reward or 0.0) - (pair[0].reward or 0.0) for pair in pairs}
    pairs.sort(key=lambda pair: (-abs(gains[id(pair)]), -gains[id(pair)], pair[0].text == pair[1].text))
    return [("most changed", each) for pair in pairs[:count] for each in pair]


def _points(records: list[dict[str, Any]], kind: str) -> tuple[Point, ...]:
    """The lines of one kind in the order of their steps."""
    found = [
        Point(record["step"], record.get("rollouts", 0), record.get("seconds", 0), known(record["values"]))
        for record in records
        if record.get("kind") == kind
    ]
    return tuple(sorted(found, key=lambda point: point.step))


def _completion(record: Mapping[str, Any]) -> Completion:
    buffer = record.get("buffer", record.get("iteration"))
    targets = {name: record.get(name) for name in ("weight", "signal", "log_rnd")}
    return Completion(
        prompt=record["prompt"],
        text=record["completion"],
        prompt_index=record["prompt_index"],
        moment=record["moment"] if buffer is None else f"in buffer {buffer}",
        reward=record["reward"],
        facts=known(record.get("components", {}) | targets),
        tokens=tuple(record.get("tokens", ())),
        steps=tuple(record.get("reveal_step", ())),
        confidences=tuple(record.get("confidence", ())),
    )


def known(values: Mapping[str, float | None]) -> dict[str, float]:
    """The values without those that JSON has no number for, such as NaN."""
    return {name: value for name, value in values.items() if value is not None}
