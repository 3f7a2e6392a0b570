"""What is plotted of runs. The page's own script draws it; of pictures, matplotlib does."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmpo_lightning.reports.record import Point, Run
from dmpo_lightning.terminal import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AXES = {"step": "optimizer steps", "rollouts": "rollouts", "seconds": "seconds of fitting"}
"""What a report can be plotted over."""
MOST_POINTS = 400
"""Of a measure, over all runs. More are averaged, neighbour by neighbour, because nobody sees them apart."""
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
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#777777")
"""Of series, told apart by most who see few colours (Okabe and Ito 2008)."""
SIZE = (7.0, 4.0)
"""Of a picture, in inches."""
STYLE: dict[Any, Any] = {"font.size": 9, "text.parse_math": False}
"""Names of metrics are names, and `$` begins no formula."""


@dataclass(frozen=True)
class Series:
    """One line: of one run, and of a validation by one sampler."""

    run: int
    label: str
    """The sampler, else nothing."""
    x: Mapping[str, tuple[float, ...]]
    """By each of `AXES`."""
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
    def slug(self) -> str:
        """A name for files."""
        return re.sub(r"[^A-Za-z0-9_]+", "-", self.name).strip("-")[:80]

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


@cache
def explained() -> list[tuple[re.Pattern[str], tuple[str, str, str]]]:
    """The tables of docs/metrics.md, which a wheel has beside this file. ``<...>`` stands for any part of a name."""
    own, repository = Path(__file__).with_name("metrics.md"), Path(__file__).parents[3] / "docs" / "metrics.md"
    text = next((path.read_text(encoding="utf-8") for path in (own, repository) if path.is_file()), "")
    found = []
    for line in text.splitlines():
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
        for points in (averaged(run.buffers, most), averaged(run.validations, most)):
            for name in _names(points):
                parts = name.split("/")
                # `val/accuracy` of the sampler in the middle.
                is_sampled = parts[0] == "val" and len(parts) > 2
                title, label = ("/".join(["val", *parts[2:]]), parts[1]) if is_sampled else (name, "")
                lines.setdefault(title, []).append(_series(run, points, name, number, label))
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


def _names(points: Sequence[Point]) -> list[str]:
    names = dict.fromkeys(name for point in points for name in point.values)
    return [name for name in names if not (name.endswith(ERROR) and name.removesuffix(ERROR) in names)]


def _series(run: Run, points: Sequence[Point], name: str, number: int, label: str) -> Series:
    own = [point for point in points if name in point.values]
    x = {axis: tuple(getattr(point, axis) for point in own) for axis in AXES}
    y = tuple(point.values[name] for point in own)
    errors = tuple(point.values.get(name + ERROR, 0.0) for point in own)
    base = run.base(name)
    if base is not None:
        x, y = {axis: (0.0, *values) for axis, values in x.items()}, (base["mean"], *y)
        errors = (base["standard_error"] if any(errors) else 0.0, *errors)
    return Series(number, label, x, y, errors if any(errors) else (), base["mean"] if base else None)


def averaged(points: Sequence[Point], most: int) -> Sequence[Point]:
    """At most so many points. Each is the mean of neighbours, of those that have a value."""
    size = -(-len(points) // most) or 1
    return points if size == 1 else [_mean(points[start : start + size]) for start in range(0, len(points), size)]


def _mean(points: Sequence[Point]) -> Point:
    names = dict.fromkeys(name for point in points for name in point.values)
    values = {name: [point.values[name] for point in points if name in point.values] for name in names}
    means = {name: sum(own) / len(own) for name, own in values.items()}
    step, seen, seconds = (sum(getattr(point, axis) for point in points) / len(points) for axis in AXES)
    return Point(step, seen, seconds, means)


def draw(panel: Panel, axis: str, names: Sequence[str], limits: tuple[float, float] | None = None) -> "Figure":
    """The picture of a panel, whose values lie between ``limits``. Lines are named at their ends."""
    # Slow to import, and needed for pictures alone (docs/decisions/006-matplotlib.md).
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes, ends = figure.add_subplot(), list[tuple[float, float, str, str]]()
        for number, series in enumerate(panel.series):
            x, colour = series.x[axis], COLOURS[number % len(COLOURS)]
            own = names[series.run] if len(names) > 1 else ""
            label = shown(f"{own} {series.label}".strip(), 60)
            axes.plot(x, series.y, color=colour, linewidth=1.6, label=label)
            ends.append((series.y[-1], x[-1], colour, label))
            if series.errors:
                low = [y - error for y, error in zip(series.y, series.errors, strict=True)]
                high = [y + error for y, error in zip(series.y, series.errors, strict=True)]
                axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
            if series.base is not None:
                axes.axhline(series.base, color=colour, linestyle="--", linewidth=1, label=f"base, {label}")
                axes.annotate(" base", (x[-1], series.base), color=colour, va="bottom")
        axes.set(xlabel=AXES[axis], ylabel=shown(panel.name, 60), ylim=limits or axes.get_ylim())
        bottom, top = axes.get_ylim()
        room, height = 0.05 * (top - bottom), top
        for y, end, colour, label in sorted(ends, reverse=True):
            # Below the one before, where lines end at the same place.
            height = min(y, height - room)
            axes.annotate(f" {label}", (end, height), color=colour, va="center")
        axes.ticklabel_format(useOffset=False)
        axes.grid(alpha=0.15, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def learning_curve(run: Run, bases: Mapping[str, tuple[str, float]]) -> "Figure":
    """Validation metrics by their names from step 0 on, where each has the accuracy of its base, which is also a dashed
    line of its colour.

    Args:
        run: whose record has the validations.
        bases: by the name of the metric, what the base was sampled with and its accuracy.
    """
    series = []
    for name, (sampler, accuracy) in bases.items():
        own = [point for point in run.validations if name in point.values]
        x = {"step": (0.0, *(point.step for point in own))}
        series.append(Series(0, sampler, x, (accuracy, *(point.values[name] for point in own)), base=accuracy))
    return draw(Panel("accuracy", tuple(series)), "step", [run.name], limits=(0, 1.05))


def write_pictures(found: Sequence[Panel], folder: Path, axis: str, names: Sequence[str]) -> Iterator[Path]:
    """Writes each panel as a PNG.

    Raises:
        ValueError: the folder cannot be written.
    """
    for panel in found:
        path = folder / f"{panel.slug}.png"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            draw(panel, axis, names).savefig(path, dpi=150)
        except OSError as error:
            raise ValueError(f"`--png` must be a folder that can be written; got {folder}: {error}.") from error
        yield path
