"""What is plotted of runs: panels of series over steps, rollouts or seconds, by the nouns of their names."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dmpo_lightning.reports.run import Point, Run

AXES = {"step": "optimizer step", "rollouts": "rollouts seen", "seconds": "seconds of fitting"}
"""What a report can be plotted over."""
MOST_POINTS = 400
"""Of a measure, over all runs. More are averaged, neighbour by neighbour, because nobody sees them apart."""
MOST_PANELS = 100
"""Of a page. Those that people look at first come first."""
FIRST = ("val", "reward", "weight", "policy", "completion", "gradient", "train")
"""Nouns in the order in which people look at them. Others follow by name."""
ERROR = "_stderr"


@dataclass(frozen=True)
class Series:
    """One line."""

    label: str
    colour: int
    x: tuple[float, ...]
    y: tuple[float, ...]
    errors: tuple[float, ...] = ()
    """Standard errors, which are drawn as a band, or nothing."""


@dataclass(frozen=True)
class Panel:
    """One plot: a measure, of all runs."""

    noun: str
    name: str
    axis: str
    """A key of `AXES`."""
    series: tuple[Series, ...]

    @property
    def slug(self) -> str:
        """A name for files and ids."""
        return re.sub(r"[^A-Za-z0-9_]+", "-", f"{self.noun}-{self.name}").strip("-")[:80]


def panels(runs: Sequence[Run], axis: str = "step") -> list[Panel]:
    """All panels, in the order of their nouns. Scalars of a validation share one panel for all samplers."""
    lines: dict[tuple[str, str], list[Series]] = {}
    most = max(MOST_POINTS // max(len(runs), 1), 2)
    for number, run in enumerate(runs):
        own = f"{run.name} " if len(runs) > 1 else ""
        for name in _names(run.buffers):
            noun, _, rest = name.partition("/")
            series = _series(run.buffers, name, axis, label=run.name, colour=number, most=most)
            lines.setdefault((noun, rest or noun), []).append(series)
        for name in _names(run.validations):
            parts = name.split("/")
            sampler, measure = parts[1] if len(parts) > 2 else "", "/".join(parts[2:] or parts[1:])
            others = lines.setdefault(("val", measure), [])
            label, colour = f"{own}{sampler}".strip(), len(others)
            others.append(_series(run.validations, name, axis, label=label, colour=colour, most=most))
    found = [
        Panel(noun, name, axis, tuple(series))
        for (noun, name), series in lines.items()
        if any(each.y for each in series)
    ]
    return sorted(found, key=_order)[:MOST_PANELS]


def _order(panel: Panel) -> tuple[int, str, bool, str]:
    place = FIRST.index(panel.noun) if panel.noun in FIRST else len(FIRST)
    return place, panel.noun, panel.name not in ("accuracy", "total", "loss"), panel.name


def _names(points: Sequence[Point]) -> list[str]:
    names = dict.fromkeys(name for point in points for name in point.values)
    return [name for name in names if not (name.endswith(ERROR) and name.removesuffix(ERROR) in names)]


def _series(points: Sequence[Point], name: str, axis: str, *, label: str, colour: int, most: int) -> Series:
    own = [point for point in points if name in point.values]
    x, y = [getattr(point, axis) for point in own], [point.values[name] for point in own]
    errors = [point.values.get(name + ERROR, 0.0) for point in own]
    size = -(-len(own) // most) or 1
    x, y, errors = _averaged(x, size), _averaged(y, size), _averaged(errors, size)
    return Series(label, colour, tuple(x), tuple(y), tuple(errors) if any(errors) else ())


def _averaged(values: list[float], size: int) -> list[float]:
    cut = [values[start : start + size] for start in range(0, len(values), size)]
    return [sum(part) / len(part) for part in cut]
