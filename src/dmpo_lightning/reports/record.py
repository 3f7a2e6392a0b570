"""A run as its directory tells it. Files that are missing or half-written leave gaps and no errors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from dmpo_lightning.reports.lines import made_of_lines, read_file
from dmpo_lightning.terminal import shown

RUN, METRICS, ROLLOUTS = "run.json", "metrics.jsonl", "rollouts"
"""What `RunRecorder` writes into a run directory: what the run is, its scalars, its rollouts."""
SUMMARY, EVALUATION, REPORT = "summary.json", "evaluation.json", "report.html"
COMPLETIONS = "completions.jsonl"
BEFORE, AFTER, BASE = "before", "after", "base"
"""The names of files within `ROLLOUTS` that hold held-out examples, of before a fit and of after it. Kinds of lines of
`METRICS` are `BASE`, with what was measured before, which a run has that has not ended, and `AFTER`.
"""
MOST_BYTES = 2**25
"""Of rollouts that a report reads, the newest buffers first."""
KNOWN = (RUN, METRICS, ROLLOUTS, SUMMARY, EVALUATION, COMPLETIONS)
"""By any of these a folder is known as a run's."""
SOLVED = ("correct", "solved")
"""Components of a reward that say whether a completion is right."""
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
    """Right or wrong, and the answer that was read, where that is recorded."""
    difficulty: str = ""
    """The task's own, of a rollout."""
    drawings: tuple[str, str] = ("", "")
    """The task's own pictures of the question and of the answer."""
    tokens: tuple[tuple[str, int, float], ...] = ()
    """Each with the step that revealed it, negative if it was filled in without one, and how sure it was then."""


@dataclass(frozen=True)
class Result:
    """What was measured by one sampler."""

    sampler: str
    moment: str
    """`BEFORE` or `AFTER` a fit, of an evaluation its length."""
    examples: Any
    """How many, if that is known."""
    means: Mapping[str, Mapping[str, float]]
    """Mean and standard error of each measure."""


@dataclass(frozen=True)
class Run:
    """All that a report says of one run but its completions, which may be many."""

    name: str
    folder: Path
    facts: Mapping[str, Any]
    buffers: tuple[Point, ...]
    validations: tuple[Point, ...]
    base: tuple[Point, ...]
    """With which validations begin: the evaluation before the fit."""
    after: tuple[Point, ...]
    """The evaluation after the fit."""
    results: tuple[Result, ...]
    guards: tuple[tuple[float, str, str], ...]
    """Step, name and message."""

    @property
    def seconds(self) -> float:
        """Of the whole fit."""
        points = (*self.base, *self.buffers, *self.validations, *self.after)
        # The record may have begun behind the first evaluation.
        unseen = [each.values.get("time/evaluation", 0.0) - each.seconds for each in self.base]
        return max((point.seconds for point in points), default=0.0) + max([0.0, *unseen])


def holds_run(folder: Path) -> bool:
    """Whether there is anything in a folder by which it is known."""
    return any((folder / known).exists() for known in KNOWN)


def read_run(folder: Path, name: str) -> Run:
    """Reads a run directory.

    Raises:
        ValueError: there is no such folder, or nothing in it is a run's.
    """
    if not holds_run(folder):
        inside = sorted(str(path.parent) for known in KNOWN for path in folder.glob(f"*/{known}"))
        meant = f"Did you mean {inside[-1]}?" if inside else "It holds no record of one."
        raise ValueError(f"RUN must be the directory of a run, such as runs/sudoku_tiny/latest; got {folder}. {meant}")
    facts, summary, evaluation = (read_file(folder / file) for file in (RUN, SUMMARY, EVALUATION))
    lines = list(made_of_lines(folder / METRICS, _line))
    buffers, validations, bases, ends = (
        tuple(sorted((point for own, point, _ in lines if own == kind), key=lambda point: point.step))
        for kind in ("buffer", "validation", BASE, AFTER)
    )
    tested = [
        Result(str(each["sampler"]), f"length {each['length']}", each["n"], _means(each["means"]))
        for each in evaluation.pop("results", [])
    ]
    # Of a run that has not ended, the line has what was measured before.
    measured = summary | {name: each for kind, _, line in lines if kind == BASE for name, each in line.items()}
    return Run(
        name=name,
        folder=folder,
        results=(*_results(measured), *tested),
        # A folder may hold a training and what was evaluated in it.
        facts={**evaluation, **facts},
        buffers=buffers,
        validations=validations,
        base=bases[-1:],
        after=ends[-1:],
        guards=tuple(
            (at.step, str(it.get("name")), str(it.get("message"))) for kind, at, it in lines if kind == "guard"
        ),
    )


def number(value: Any) -> float:
    """The value, if it can be drawn and averaged. Raises ValueError."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100:
        return value
    raise ValueError(f"no number: {value!r}")


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Those that are known. None stands for NaN, which JSON does not have."""
    return {name: number(value) for name, value in values.items() if value is not None}


def _line(line: dict[str, Any]) -> list[tuple[str, Point, dict[str, Any]]]:
    seen, seconds = (number(line.get(name) or 0) for name in ("rollouts", "seconds"))
    return [(str(line.get("kind")), Point(number(line["step"]), seen, seconds, numbers(line.get("values", {}))), line)]


def _results(summary: Mapping[str, Any]) -> list[Result]:
    return [
        Result(sampler, moment, summary.get("examples"), _means(means))
        for moment in (BEFORE, AFTER)
        for sampler, means in summary.get(moment, {}).items()
    ]


def _means(measures: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    found = {name: numbers(each) for name, each in measures.items()}
    return {name: each for name, each in found.items() if {"mean", "standard_error"} <= set(each)}


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs of a report, each named by what it has otherwise than the others, or by its folder.

    Raises:
        ValueError: a folder is none, or is not a run's.
    """
    resolved = [folder.resolve() for folder in folders]
    names = [folder.name if len(folders) == 1 else f"{folder.parent.name}/{folder.name}" for folder in resolved]
    runs = [read_run(folder, name) for folder, name in zip(folders, names, strict=True)]
    stated = [", ".join(f"{name} {value}" for name, value in own.items()) for own in differing(runs)]
    # Where they differ in much, or in nothing, that would be no name.
    if len(runs) > 1 and len(set(stated)) == len(runs) and max(map(len, stated)) <= 60:
        runs = [replace(run, name=name) for run, name in zip(runs, stated, strict=True)]
    return runs


def differing(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Of each run the options in which they differ, by the last part of their names."""
    options = [flat(run.facts.get("configuration") or run.facts) for run in runs]
    names = [
        name
        for name in dict.fromkeys(name for own in options for name in own)
        if len({own.get(name) for own in options}) > 1 and not name.startswith(PLACES)
    ]
    return [
        {name.rpartition(".")[2].removesuffix("_everything"): own.get(name, "none") for name in names}
        for own in options
    ]


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


def rollouts(run: Run) -> list[Completion]:
    """The rollouts of the last buffers, as many as have `MOST_BYTES`, in the order of the buffers.

    Right is a rollout by components that say so (`SOLVED`), and where there are none, by the highest reward of all.
    """
    paths = sorted(
        (run.folder / ROLLOUTS).glob("rank*-*.jsonl"), key=lambda path: path.stem.rpartition("-")[2], reverse=True
    )
    sizes = accumulate(path.stat().st_size if path.is_file() else 0 for path in paths)
    chosen = [path for path, size in zip(paths, sizes, strict=True) if size < MOST_BYTES or path == paths[0]]
    found = [each for path in chosen for each in _completions(path) if each.reward is not None]
    highest = max((each.reward or 0.0 for each in found), default=0.0)
    judged = (replace(each, verdict="right" if _is_right(each, highest) else "wrong") for each in found)
    return sorted(judged, key=lambda each: each.buffer)


def _is_right(rollout: Completion, highest: float) -> bool:
    verdict = [value for name, value in rollout.facts.items() if name.rpartition("/")[2] in SOLVED]
    return min(verdict) == 1 if verdict else rollout.reward == highest


def held_out(run: Run) -> list[tuple[Completion, ...]]:
    """Held-out examples before and after, those whose reward changed most first. A run that goes on has no second."""
    before, after = found = [
        {each.prompt_index: each for each in _completions(run.folder / ROLLOUTS / f"{moment}.jsonl")}
        for moment in (BEFORE, AFTER)
    ]
    # Of older runs both are in one file.
    for each in _completions(run.folder / "examples.jsonl"):
        found[each.moment == AFTER].setdefault(each.prompt_index, each)
    pairs: list[tuple[Completion, ...]] = [(each, after[index]) for index, each in before.items() if index in after]
    # What became better first, and what became worse before what stayed.
    gains = {id(pair): (pair[1].reward or 0.0) - (pair[0].reward or 0.0) for pair in pairs}
    pairs.sort(key=lambda pair: (-abs(gains[id(pair)]), -gains[id(pair)], pair[0].text == pair[1].text))
    return pairs or [(each,) for each in before.values()]


def evaluated(run: Run) -> list[tuple[Completion, ...]]:
    """What an evaluation has made of each prompt, those first that were wrong most often."""
    prompts: dict[int, list[Completion]] = {}
    for each in _completions(run.folder / COMPLETIONS):
        prompts.setdefault(each.prompt_index, []).append(each)
    return sorted(
        map(tuple, prompts.values()), key=lambda own: sum(each.verdict[:5] == "right" for each in own) / len(own)
    )


def _completions(path: Path) -> list[Completion]:
    return list(made_of_lines(path, _completion))


def _completion(line: Mapping[str, Any]) -> list[Completion]:
    """Of a line of rollouts, of held-out examples, or of an evaluation, of which each prompt's first one is shown."""
    is_evaluation = "index" in line
    # Older files of rollouts begin with a line about all others.
    if "completion" not in line or (is_evaluation and line.get("rollout")):
        return []
    scores = numbers(line.get("scores") or line.get("components") or {})
    targets = numbers({name: line.get(name) for name in ("weight", "signal", "log_rnd")})
    buffer, reward = line.get("buffer", line.get("iteration")), line.get("reward", scores.pop("reward", None))
    moment = f"{line['sampler']}, length {line['length']}" if is_evaluation else str(line.get("moment"))
    said = [] if line.get("correct") is None else ["right" if line["correct"] else "wrong"]
    said += [] if line.get("answer") is None else [f"answer {line['answer']}"]
    asked = (f"{name}: {value}".lstrip(": ") for name, value in flat(line.get("example")).items())
    question, answer = line.get("drawings", ("", ""))
    tokens = zip(*(line.get(name, ()) for name in ("tokens", "reveal_step", "confidence")), strict=True)
    return [
        Completion(
            prompt=str(line.get("prompt", "\n".join(asked))),
            text=str(line["completion"]),
            prompt_index=int(line["index"] if is_evaluation else line["prompt_index"]),
            moment=moment if buffer is None else f"in buffer {buffer}",
            reward=None if reward is None else number(reward),
            facts=scores | targets,
            buffer=-1 if buffer is None else int(buffer),
            verdict=", ".join(said),
            difficulty=shown(str(line.get("difficulty") or ""), 40),
            drawings=(str(question), str(answer)),
            tokens=tuple((str(token), int(step), number(sure or 0)) for token, step, sure in tokens),
        )
    ]
