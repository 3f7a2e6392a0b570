"""What is plotted of runs. The page's own script draws it, and of the learning curve that is a picture, matplotlib."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmpo_lightning.reports.record import Point, Run
from dmpo_lightning.terminal import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_POINTS = 400
"""Of a measure, over all runs. Of more, each second or third is drawn and so on, because nobody sees them apart."""
GROUPS = {
    "Learning curves": ("val",),
    "Rewards": ("reward",),
    "Weights": ("weight",),
    "Policy": ("policy",),
    "Completions": ("completion",),
    "Training": ("train", "gradient", "optimizer"),
    "Speed": ("time", "rollouts", "sampler"),
}
"""Headings with the nouns below them, in the order in which people look at them. Other nouns are headings too."""
ERROR = "_stderr"


@dataclass(frozen=True)
class Series:
    """One line: of one run, and of a validation by one sampler."""

    run: int
    label: str
    """The sampler, else nothing."""
    x: tuple[tuple[float, float, float], ...]
    """Optimizer steps, rollouts and seconds of fitting, of each point."""
    y: tuple[float, ...]
    errors: tuple[float, ...] = ()
    """Standard errors, which are drawn as a band, or nothing."""
    base: float | None = None
    """Of the base, with which the line begins and which is drawn as a line of its own."""


@dataclass(frozen=True)
class Panel:
    """One plot: a measure, of all runs."""

    name: str
    series: tuple[Series, ...]

    @property
    def group(self) -> str:
        """The heading."""
        noun = self.name.partition("/")[0]
        return next((group for group, nouns in GROUPS.items() if noun in nouns), noun.capitalize())

    @property
    def constant(self) -> float | None:
        """The value of a plot that would be a flat line, or a point."""
        values = [y for each in self.series for y in each.y]
        is_flat = max(values) - min(values) <= 1e-6 * max(map(abs, values)) or max(len(x.y) for x in self.series) < 2
        return values[0] if is_flat and len({each.y[:1] for each in self.series}) == 1 else None

    @property
    def about(self) -> tuple[str, str, str]:
        """Meaning, unit and healthy range, as docs/metrics.md has them."""
        name = self.name.replace("val/", "val/sampler/", 1)
        return next((said for pattern, said in explained() if pattern.fullmatch(name)), ("", "", ""))


def metrics_text() -> str:
    """docs/metrics.md, which a wheel has beside this file."""
    own, repository = Path(__file__).with_name("metrics.md"), Path(__file__).parents[3] / "docs" / "metrics.md"
    return next((path.read_text(encoding="utf-8") for path in (own, repository) if path.is_file()), "")


@cache
def explained() -> list[tuple[re.Pattern[str], tuple[str, str, str]]]:
    """The tables of docs/metrics.md. ``<...>`` stands for any part of a name."""
    found = []
    for line in metrics_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        for name in re.findall(r"`([\w<>@/]+/[\w<>@/]+)`", cells[0]) if len(cells) > 4 else ():
            pattern = "".join(".+" if part.startswith("<") else re.escape(part) for part in re.split("(<.*?>)", name))
            meaning, unit, healthy = (cell.replace("`", "") for cell in cells[1:4])
            found.append((re.compile(pattern), (meaning, unit, healthy)))
    # What is named itself before what fits a pattern.
    return sorted(found, key=lambda each: ".+" in each[0].pattern)


def panels(runs: Sequence[Run]) -> list[Panel]:
    """All panels, in the order of their groups. Scalars of a validation share one panel for all samplers."""
    lines: dict[str, list[Series]] = {}
    most = max(MOST_POINTS // max(len(runs), 1), 2)
    for number, run in enumerate(runs):
        for base, found in ((), run.buffers), (run.base, run.validations):
            every = -(-len(found) // most) or 1
            # With the last one.
            points = (*base, *found[::-every][::-1])
            for name in dict.fromkeys(each for point in points for each in point.values if not each.endswith(ERROR)):
                parts = name.split("/")
                # `val/accuracy` of the sampler in the middle.
                is_sampled = parts[0] == "val" and len(parts) > 2
                title, label = ("/".join(["val", *parts[2:]]), parts[1]) if is_sampled else (name, "")
                first = next((point.values.get(name) for point in base), None)
                lines.setdefault(title, []).append(_series(points, name, number, label, first))
    return sorted((Panel(name, tuple(series)) for name, series in lines.items()), key=_order)


def _order(panel: Panel) -> tuple[int, str, bool, str]:
    groups = list(GROUPS)
    rank = groups.index(panel.group) if panel.group in GROUPS else len(groups)
    return rank, panel.group, panel.name.rpartition("/")[2] not in ("accuracy", "total", "loss"), panel.name


def drawn_and_said(found: Sequence[Panel]) -> tuple[list[Panel], list[str]]:
    """The panels that are worth a plot, and a text on each of the others: one is constant, or equal to another."""
    drawn, said, seen = [], [], dict[Any, str]()
    for panel in found:
        values = tuple((each.run, each.label, each.y) for each in panel.series)
        if panel.constant is not None:
            said.append(f"{panel.name} is {panel.constant:.4g}")
        elif values in seen:
            said.append(f"{panel.name} is equal to {seen[values]}")
        else:
            seen[values] = panel.name
            drawn.append(panel)
    return drawn, said


def _series(points: Sequence[Point], name: str, run: int, label: str, base: float | None) -> Series:
    own = [point for point in points if name in point.values]
    x = tuple((point.step, point.rollouts, point.seconds) for point in own)
    y, errors = (tuple(rounded(point.values.get(each, 0.0)) for point in own) for each in (name, name + ERROR))
    return Series(run, shown(label, 60), x, y, errors if any(errors) else (), base)


def rounded(value: float) -> float:
    """Five digits, which is more than a plot shows."""
    return float(f"{value:.5g}")


def learning_curve(run: Run, bases: Mapping[str, tuple[str, float]]) -> "Figure":
    """A picture of validation metrics, which ``bases`` names, from step 0 on, where each has the accuracy of its base.

    Beside its name stand what the base was sampled with and its accuracy, which is a dashed line too.
    """
    # Slow to import, and needed for this picture alone (docs/decisions/006-matplotlib.md).
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    axes, ends = figure.add_subplot(), list[tuple[float, float, Any, str]]()
    for name, (sampler, base) in bases.items():
        own = [point for point in run.validations if name in point.values]
        x, y = [0.0, *(point.step for point in own)], [base, *(point.values[name] for point in own)]
        (line,) = axes.plot(x, y, linewidth=1.6, label=sampler)
        axes.axhline(base, color=line.get_color(), linestyle="--", linewidth=1, label=f"base, {sampler}")
        axes.annotate(" base", (x[-1], base), color=line.get_color(), va="bottom")
        ends.append((y[-1], x[-1], line.get_color(), sampler))
    axes.set(xlabel="optimizer steps", ylabel="accuracy", ylim=(0, 1.05))
    height = 1.05
    for at, end, colour, label in sorted(ends, reverse=True):
        # Below the one before, where lines end at the same place.
        height = min(at, height - 0.05)
        axes.annotate(f" {label}", (end, height), color=colour, va="center")
    axes.grid(alpha=0.15, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
