"""A run as its directory tells it. Files that are missing or half-written leave gaps and no errors."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dmpo_lightning.reports.lines import read_file, read_lines
from dmpo_lightning.terminal import shown

RUN, METRICS, ROLLOUTS = "run.json", "metrics.jsonl", "rollouts"
"""What `RunRecorder` writes into a run directory: what the run is, its scalars, its rollouts."""
SUMMARY, EVALUATION, REPORT = "summary.json", "evaluation.json", "report.html"
COMPLETIONS = "completions.jsonl"
BEFORE, AFTER, BASE = "before", "after", "base"
"""The names of files within `ROLLOUTS` that hold held-out examples, of before a fit and of after it, and the kind of
line that says what was measured before, which a run has that has not ended.
"""
MOST_BYTES = 2**26
"""Of rollouts, and of an evaluation's completions, that a report reads, the newest buffers first."""
MOST = 1e100
"""No measure is larger, and sums and squares of such numbers are still numbers."""
KNOWN = (RUN, METRICS, ROLLOUTS, SUMMARY, EVALUATION, COMPLETIONS)
"""By any of these a folder is known as a run's."""
SOLVED = ("correct", "solved")
"""Components of a reward that say whether a completion is right, by which a prompt counts as solved."""
CURVE = {"val/sampled/accuracy": "temperature_1", "val/greedy/accuracy": "greedy"}
"""The sampler of the base that belongs to a validation metric, where a run does not say."""
PLACES = ("trainer.logger", "trainer.default_root_dir", "ckpt_path", "config", "started", "resumed", "run", "results")
"""Options and facts that say where and when a run was, and not what."""


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
    """Of a held-out example before or after, of an evaluation its sampler and length, else the buffer."""
    reward: float | None = None
    facts: Mapping[str, float] = field(default_factory=dict)
    """The components of the score, and of training weight, signal and log_rnd."""
    buffer: int = -1
    """Of a rollout."""
    verdict: str = ""
    """Of an evaluation: right or wrong, and the answer that was read."""
    difficulty: str = ""
    """The task's own, of a rollout."""
    drawings: tuple[str, str] = ("", "")
    """The task's own pictures of the question and of the answer."""
    tokens: tuple[str, ...] = ()
    steps: tuple[int, ...] = ()
    """When each token was revealed. One that is negative was filled in without a step of its own."""
    confidences: tuple[float, ...] = ()


@dataclass(frozen=True)
class Run:
    """All that a report says of one run but its completions, which may be many."""

    name: str
    folder: Path
    facts: Mapping[str, Any]
    buffers: tuple[Point, ...]
    validations: tuple[Point, ...]
    summary: Mapping[str, Any]
    """Results before and after, by sampler and measure."""
    curve: Mapping[str, str]
    """By validation metric, which sampler's base it began with."""
    results: tuple[Mapping[str, Any], ...]
    """Of an evaluation: sampler, length, n (prompts) and means with their errors."""
    guards: tuple[tuple[float, str, str], ...]
    """Step, name and message."""
    unread: Counter[str]
    """How often there was what, in which file, that is left out because it is not what it should be."""

    def base(self, metric: str) -> Mapping[str, float] | None:
        """Mean and standard error that a validation metric had before fitting, of the test split."""
        sampler, _, measure = metric.removeprefix("val/").partition("/")
        known = self.curve.get(f"val/{sampler}/accuracy", "")
        return self.summary[BEFORE].get(known, {}).get(measure)


def holds_run(folder: Path) -> bool:
    """Whether there is anything in a folder by which it is known."""
    return any((folder / known).exists() for known in KNOWN)


def read_run(folder: Path, name: str) -> Run:
    """Reads a run directory.

    Raises:
        ValueError: there is no such folder, or nothing in it is a run's.
    """
    if not folder.is_dir():
        raise ValueError(f"RUN must be the directory of a run, such as runs/sudoku_tiny/latest; got {folder}.")
    if not holds_run(folder):
        inside = sorted(str(path.parent) for known in KNOWN for path in folder.glob(f"*/{known}"))
        meant = f" Did you mean {inside[-1]}?" if inside else ""
        raise ValueError(f"RUN must hold one of {', '.join(KNOWN)}; got {folder}, which holds none.{meant}")
    unread: Counter[str] = Counter()
    facts, summary, evaluation = (
        Foreign(read_file(folder / file, unread), file, unread) for file in (RUN, SUMMARY, EVALUATION)
    )
    metrics = [Foreign(record, METRICS, unread) for record in read_lines(folder / METRICS, unread)]
    configuration = {name: facts.inner(name).content for name in ("configuration", "versions")}
    base = [each for _, each in _of(metrics, BASE)][-1:]
    first, last = (_results((base or [summary])[0].inner(BEFORE)), _results(summary.inner(AFTER)))
    curve = {name: str(sampler) for each in base for name, sampler in each.inner("curve").content.items()}
    return Run(
        name=name,
        folder=folder,
        # A folder may hold a training and what was evaluated in it.
        facts={**evaluation.content, **facts.content, **configuration},
        buffers=_points(metrics, "buffer"),
        validations=_points(metrics, "validation"),
        summary={BEFORE: first, AFTER: last},
        curve=curve or CURVE,
        results=tuple(_evaluation(evaluation)),
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
    """The runs of a report, each under a name that no other has: what it has otherwise than they, or its folder.

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
    runs = [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]
    stated = [", ".join(f"{name} {value}" for name, value in own.items()) for own in differing(runs)]
    # Where they differ in much, or in nothing, that would be no name.
    if len(runs) > 1 and len(set(stated)) == len(runs) and max(map(len, stated)) <= 60:
        runs = [replace(run, name=name) for run, name in zip(runs, stated, strict=True)]
    return runs


def differing(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Of each run the options in which they differ, by the last part of their names, or by the whole of them where two
    share it.
    """
    options = [flat(run.facts["configuration"] or run.facts) for run in runs]
    names = [
        name
        for name in dict.fromkeys(name for own in options for name in own)
        if len({own.get(name) for own in options}) > 1 and not name.startswith(PLACES)
    ]
    columns: dict[str, list[str]] = {}
    for name in names:
        column, short = [own.get(name, "none") for own in options], name.rpartition(".")[2]
        short = "seed" if short == "seed_everything" else short
        columns[short if columns.get(short, column) == column else name] = column
    return [{name: column[number] for name, column in columns.items()} for number in range(len(runs))]


def flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested options by their dotted names. Class and arguments of an object stand beside each other."""
    if isinstance(value, Mapping):
        found: dict[str, str] = {}
        for name, each in value.items():
            inner = prefix if name == "init_args" else f"{prefix}.{name}".lstrip(".")
            found |= flat(each, inner)
        return found
    if isinstance(value, list) and any(isinstance(each, Mapping) for each in value):
        return flat({str(place): each for place, each in enumerate(value)}, prefix)
    if isinstance(value, list):
        return {prefix: ", ".join(map(str, value))}
    return {prefix: "" if value is None else str(value)}


def rollouts(run: Run, most_bytes: int = MOST_BYTES) -> list[Completion]:
    """The rollouts of the last buffers, as many as have these bytes, and of one buffer in any case."""
    numbers = {path: path.stem.rpartition("-")[2] for path in sorted((run.folder / ROLLOUTS).glob("rank*-*.jsonl"))}
    buffers = {path: int(number) for path, number in numbers.items() if number.isdecimal()}
    chosen: list[Path] = []
    for number in sorted(set(buffers.values()), reverse=True):
        paths = [path for path, own in buffers.items() if own == number]
        most_bytes -= sum(path.stat().st_size for path in paths if path.is_file())
        if chosen and most_bytes < 0:
            break
        chosen += paths
    found = [each for path in chosen for each in _completions(path, run.unread) if each.reward is not None]
    return sorted(found, key=lambda each: each.buffer)


def held_out(run: Run) -> list[tuple[Completion, ...]]:
    """Held-out examples before and after, those whose reward changed most first. A run that goes on has no second."""
    before, after = found = [
        {each.prompt_index: each for each in _completions(run.folder / ROLLOUTS / f"{moment}.jsonl", run.unread)}
        for moment in (BEFORE, AFTER)
    ]
    # Of older runs both are in one file.
    for each in _completions(run.folder / "examples.jsonl", run.unread):
        found[each.moment == AFTER].setdefault(each.prompt_index, each)
    pairs = [(before[index], after[index]) for index in before if index in after]
    if not pairs:
        return [(each,) for each in before.values()]
    # What became better first, and what became worse before what stayed.
    gains = {id(pair): (pair[1].reward or 0.0) - (pair[0].reward or 0.0) for pair in pairs}
    return sorted(pairs, key=lambda pair: (-abs(gains[id(pair)]), -gains[id(pair)], pair[0].text == pair[1].text))


def evaluated(run: Run) -> list[tuple[Completion, ...]]:
    """What an evaluation has made of each prompt, those first that were right by one sampler or length alone, and
    those last that were right by all.
    """
    prompts: dict[int, list[Completion]] = {}
    for line in read_lines(run.folder / COMPLETIONS, run.unread, MOST_BYTES):
        record = Foreign(line, COMPLETIONS, run.unread)
        text, index = record.get("completion", is_text), record.content.get("index")
        if text is None or not isinstance(index, int) or record.content.get("rollout"):
            continue
        scores = record.inner("scores").numbers()
        answer, correct = record.content.get("answer"), record.content.get("correct")
        said = {True: "right", False: "wrong"}.get(correct, "") if isinstance(correct, bool) else ""
        example = record.content.get("example")
        asked = example if isinstance(example, dict) else {"example": example}
        prompts.setdefault(index, []).append(
            Completion(
                prompt="\n".join(f"{name}: {value}" for name, value in asked.items()),
                text=text,
                prompt_index=index,
                moment=f"{record.get('sampler')}, length {record.get('length')}",
                reward=scores.pop("reward", None),
                facts=scores,
                verdict=", ".join([said, *([] if answer is None else [f"answer {answer}"])]).strip(", "),
            )
        )
    verdicts = {index: {each.verdict[:5] for each in group} for index, group in prompts.items()}
    ordered = sorted(prompts, key=lambda index: (-len(verdicts[index]), "right" in verdicts[index]))
    return [tuple(prompts[index]) for index in ordered]


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
    return {name: _measures(samplers.inner(name)) for name in samplers.content}


def _measures(measures: Foreign) -> dict[str, dict[str, float]]:
    found = {name: measures.inner(name).numbers() for name in measures.content}
    return {name: each for name, each in found.items() if {"mean", "standard_error"} <= set(each)}


def _evaluation(evaluation: Foreign) -> Iterator[dict[str, Any]]:
    for content in evaluation.items("results", lambda value: isinstance(value, dict)):
        each = Foreign(content, EVALUATION, evaluation.unread)
        numbers = {name: each.get(name, is_number, 0.0) for name in ("length", "n")}
        yield {"sampler": str(each.get("sampler")), **numbers, "means": _measures(each.inner("means"))}


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
    drawings = record.items("drawings", is_text)
    targets = {name: record.get(name, is_number) for name in ("weight", "signal", "log_rnd")}
    return Completion(
        prompt=prompt,
        text=text,
        prompt_index=record.content["prompt_index"],
        moment=str(record.get("moment")) if buffer is None else f"in buffer {buffer}",
        reward=record.get("reward", is_number),
        facts=record.inner("components").numbers() | {name: each for name, each in targets.items() if each is not None},
        buffer=buffer if is_number(buffer) and isinstance(buffer, int) else -1,
        difficulty=shown(str(record.content.get("difficulty") or ""), 40),
        drawings=(drawings[0], drawings[1]) if len(drawings) == 2 else ("", ""),
        tokens=tokens,
        steps=steps,
        confidences=tuple(value or 0.0 for value in confidences),
    )
