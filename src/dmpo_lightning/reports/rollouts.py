"""The few rollouts of a run that a report shows, found among all that were written."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dmpo_lightning.reports.lines import LONGEST_LINE, decoded, raw_lines
from dmpo_lightning.reports.run import ROLLOUTS, Completion, Run, completion, number

_START = re.compile(
    rb'\{"iteration":(\d{1,9}),"prompt_index":(\d{1,18}),"rollout":\d{1,9},"reward":(-?[\d.e+-]{1,30}),'
)
"""How `RunRecorder` begins a line. Most lines are never needed as a whole."""
Kind = str
"""Under which heading a completion is shown."""
BEST, WORST, CHANGED = "best", "worst", "most changed"


@dataclass(frozen=True)
class Place:
    """Where the line of a rollout is, with what it is chosen by."""

    path: Path
    start: int
    iteration: int
    prompt_index: int
    reward: float

    def read(self) -> Completion | None:
        """The rollout, None if the line is gone."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.start)
                record = decoded(file.readline(LONGEST_LINE))
        except OSError:
            return None
        return None if record is None else completion(record)


def places(folder: Path) -> Iterator[Place]:
    """All rollouts on disk whose reward is known, file by file."""
    for path in sorted((folder / ROLLOUTS).glob("*.jsonl")):
        for start, line in raw_lines(path):
            if found := _START.match(line):
                try:
                    yield Place(path, start, int(found[1]), int(found[2]), float(found[3]))
                    continue
                except ValueError:
                    pass
            record = decoded(line) or {}
            known = [number(record.get(name)) for name in ("iteration", "prompt_index", "reward")]
            if None not in known:
                yield Place(path, start, int(known[0] or 0), int(known[1] or 0), known[2] or 0.0)


def chosen(run: Run, count: int) -> list[tuple[Kind, Completion]]:
    """Most changed, best and worst completions, at most ``count`` of each and one per prompt.

    Best and worst are of the last quarter of the buffers, in which the policy is nearly what it became. What changed
    most is taken from the held-out examples, each before and after. Where there are none it is taken from prompts that
    were sampled in different buffers, by their first and last mean reward.
    """
    found = list(places(run.folder))
    last = max((place.iteration for place in found), default=0)
    recent = [place for place in found if place.iteration > 0.75 * last or last == 0]
    changed = changed_examples(run, count) or _read(CHANGED, _changed(found, count))
    best = _distinct(sorted(recent, key=lambda place: -place.reward), count)
    worst = _distinct(sorted(recent, key=lambda place: place.reward), count)
    return [*changed, *_read(BEST, best), *_read(WORST, worst)]


def changed_examples(run: Run, count: int) -> list[tuple[Kind, Completion]]:
    """Held-out examples before and after, those whose reward changed most first."""
    moments: dict[int, dict[str, Completion]] = {}
    for each in run.examples:
        moments.setdefault(each.prompt_index, {})[each.moment] = each
    pairs = [(pair["before"], pair["after"]) for pair in moments.values() if {"before", "after"} <= set(pair)]
    # What became better first, and what became worse before what stayed.
    pairs.sort(key=lambda pair: (-abs(_gain(pair)), -_gain(pair), pair[0].text == pair[1].text))
    if pairs:
        return [(CHANGED, each) for pair in pairs[:count] for each in pair]
    # A run that has not ended.
    return [("held out", each) for each in run.examples[:count]]


def _gain(pair: tuple[Completion, Completion]) -> float:
    return (pair[1].reward or 0.0) - (pair[0].reward or 0.0)


def _changed(found: list[Place], count: int) -> list[Place]:
    """The first and the last rollout of the prompts whose mean reward changed most between two buffers."""
    prompts: dict[int, dict[int, list[Place]]] = {}
    for place in found:
        prompts.setdefault(place.prompt_index, {}).setdefault(place.iteration, []).append(place)
    changes = []
    for buffers in prompts.values():
        first, last = buffers[min(buffers)], buffers[max(buffers)]
        if first is not last:
            changes.append((_mean(last) - _mean(first), first, last))
    changes.sort(key=lambda change: -abs(change[0]))
    return [_middle(group) for _, first, last in changes[:count] for group in (first, last)]


def _middle(group: list[Place]) -> Place:
    """The rollout nearest to the group's mean, which stands for all of it."""
    mean = _mean(group)
    return min(group, key=lambda place: abs(place.reward - mean))


def _mean(group: list[Place]) -> float:
    return sum(place.reward for place in group) / len(group)


def _distinct(ordered: list[Place], count: int) -> list[Place]:
    """The first ones, one per prompt."""
    first: dict[int, Place] = {}
    for place in ordered:
        first.setdefault(place.prompt_index, place)
        if len(first) >= count:
            break
    return list(first.values())


def _read(kind: Kind, found: list[Place]) -> list[tuple[Kind, Completion]]:
    return [(kind, each) for place in found if (each := place.read()) is not None]
