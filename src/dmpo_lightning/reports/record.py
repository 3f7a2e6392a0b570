"""A run as its directory tells it. Files that are missing or half-written leave gaps and no errors."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
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
MOST = 1e100
"""No measure is larger, and sums and squares of such numbers are still numbers."""
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
    unread: Counter[str]
    """How often there was what, in which file, that is left out because it is not what it should be."""


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
    unread: Counter[str] = Counter()
    facts, summary = (Foreign(read_file(folder / file, unread), file, unread) for file in (RUN, SUMMARY))
    metrics = [Foreign(record, METRICS, unread) for record in read_lines(folder / METRICS, unread)]
    return Run(
        name=name,
        folder=folder,
        facts=facts.content | {name: facts.inner(name).content for name in ("configuration", "versions")},
        buffers=_points(metrics, "buffer"),
        validations=_points(metrics, "validation"),
        summary={moment: _results(summary.inner(moment)) for moment in (BEFORE, AFTER)},
        guards=tuple((step, str(each.get("name")), str(each.get("message"))) for step, each in _of(metrics, "guard")),
        unread=unread,
    )


@dataclass(frozen=True)
class Foreign:
    """An object of a file, which may hold anything. A value that is of another kind than it is asked for is counted."""

    content: dict[str, Any]
    file: str
    unread: Counter[str]

    def get(self, name: str, kind: Callable[[Any], bool] = bool, otherwise: Any = None) -> Any:
        value = self.content.get(name)
        if kind(value):
            return value
        # None stands for what is not known, and for a number that JSON does not have, such as NaN.
        self.unread[f"{self.file}: {name}"] += value is not None and kind is not bool
        return otherwise

    def inner(self, name: str) -> "Foreign":
        return Foreign(self.get(name, lambda value: isinstance(value, dict), {}), self.file, self.unread)

    def numbers(self) -> dict[str, float]:
        found = {name: self.get(name, is_number) for name in self.content}
        return {name: value for name, value in found.items() if value is not None}

    def items(self, name: str, kind: Callable[[Any], bool]) -> tuple[Any, ...]:
        return tuple(self.get(name, lambda value: isinstance(value, list) and all(map(kind, value)), ()))


def is_number(value: Any) -> bool:
    """Whether a value can be drawn and averaged."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MOST


def is_text(value: Any) -> bool:
    """Whether a value is a text."""
    return isinstance(value, str)


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
    numbers = {path: path.stem.rpartition("-")[2] for path in sorted(folder.glob("rank*-*.jsonl"))}
    buffers = {path: int(number) for path, number in numbers.items() if number.isdecimal()}
    last = sorted(set(buffers.values()))[-RECENT:]
    recent = [path for path, buffer in buffers.items() if buffer in last]
    rollouts = [each for path in recent for each in _completions(path, run.unread) if each.reward is not None]
    shown = _examples(folder, count, run.unread)
    for kind, sign in (("best", 1), ("worst", -1)):
        ranked = sorted(rollouts, key=lambda each: sign * (each.reward or 0.0))
        # Of each prompt the one that comes last.
        chosen = {each.prompt_index: each for each in ranked}.values()
        shown += [(kind, each) for each in sorted(chosen, key=lambda each: -sign * (each.reward or 0.0))[:count]]
    return shown


def _examples(folder: Path, count: int, unread: Counter[str]) -> list[tuple[str, Completion]]:
    before, after = (
        {each.prompt_index: each for each in _completions(folder / f"{moment}.jsonl", unread)}
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


def _of(metrics: list[Foreign], kind: str) -> Iterator[tuple[float, Foreign]]:
    """The lines of one kind with their steps, without which nothing can be said of them."""
    for each in metrics:
        if each.content.get("kind") == kind:
            step = each.get("step", is_number)
            if step is not None:
                yield step, each


def _points(metrics: list[Foreign], kind: str) -> tuple[Point, ...]:
    """The lines of one kind in the order of their steps."""
    found = [
        Point(
            step, each.get("rollouts", is_number, 0), each.get("seconds", is_number, 0), each.inner("values").numbers()
        )
        for step, each in _of(metrics, kind)
    ]
    return tuple(sorted(found, key=lambda point: point.step))


def _results(samplers: Foreign) -> dict[str, dict[str, dict[str, float]]]:
    """Means and standard errors by sampler and measure."""
    found = {name: samplers.inner(name) for name in samplers.content}
    results = {name: {each: own.inner(each).numbers() for each in own.content} for name, own in found.items()}
    return {
        name: {each: own for each, own in result.items() if {"mean", "standard_error"} <= set(own)}
        for name, result in results.items()
    }


def _completions(path: Path, unread: Counter[str]) -> Iterator[Completion]:
    for line in read_lines(path, unread):
        record = Foreign(line, path.name, unread)
        texts = [record.get(name, is_text) for name in ("prompt", "completion")]
        # Of a line without one of them, such as the first one of older files, nothing can be shown.
        if None not in texts and isinstance(record.content.get("prompt_index"), int):
            yield _completion(record, *texts)


def _completion(record: Foreign, prompt: str, text: str) -> Completion:
    buffer = record.content.get("buffer", record.content.get("iteration"))
    tokens, steps = record.items("tokens", is_text), record.items("reveal_step", lambda value: isinstance(value, int))
    confidences = record.items("confidence", lambda value: value is None or is_number(value))
    if not len(tokens) == len(steps) == len(confidences):
        # The text is shown alone.
        tokens = steps = confidences = ()
    targets = {name: record.get(name, is_number) for name in ("weight", "signal", "log_rnd")}
    return Completion(
        prompt=prompt,
        text=text,
        prompt_index=record.content["prompt_index"],
        moment=str(record.get("moment")) if buffer is None else f"in buffer {buffer}",
        reward=record.get("reward", is_number),
        facts=record.inner("components").numbers() | {name: each for name, each in targets.items() if each is not None},
        tokens=tokens,
        steps=steps,
        confidences=tuple(value or 0.0 for value in confidences),
    )
