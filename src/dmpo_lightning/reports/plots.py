"""What is plotted of runs, drawn by matplotlib for a page whose colours are not known yet, or as pictures."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmpo_lightning.reports.record import Point, Run
from dmpo_lightning.terminal import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AXES = {"step": "optimizer step", "rollouts": "rollouts seen", "seconds": "seconds of fitting"}
"""What a report can be plotted over."""
MOST_POINTS = 400
"""Of a measure, over all runs. More are averaged, neighbour by neighbour, because nobody sees them apart."""
FIRST = ("val", "reward", "weight", "policy", "completion", "gradient", "train")
"""Nouns in the order in which people look at them. Others follow by name."""
ERROR = "_stderr"
INK = "#010203"
"""Stands for the colour of text until the page has one. No series has it."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#777777")
"""Of series, told apart by most who see few colours (Okabe and Ito 2008). The page replaces them too."""
SIZE = (4.6, 2.7)
"""Inches. At 72 points each a plot is about as wide as a small screen, so that its text keeps its size there."""
AXES_BOX = (0.12, 0.17, 0.83, 0.76)
"""Left, bottom, width and height as shares: room for five characters beside the axis, and a power of ten above it."""
STYLE: dict[Any, Any] = {
    "font.size": 9,
    # Text stays text, which takes the page's font and colour.
    "svg.fonttype": "none",
    # Without it ids and with them files differ from run to run.
    "svg.hashsalt": "dmpo",
    # Names of metrics are names, and `$` begins no formula.
    "text.parse_math": False,
}


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
    drawn = [
        Panel(noun, name, axis, tuple(series))
        for (noun, name), series in lines.items()
        if any(each.y for each in series)
    ]
    return sorted(drawn, key=_order)


def _order(panel: Panel) -> tuple[int, str, bool, str]:
    rank = FIRST.index(panel.noun) if panel.noun in FIRST else len(FIRST)
    return rank, panel.noun, panel.name not in ("accuracy", "total", "loss"), panel.name


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


def draw(panel: Panel, *, ink: str = "#222222") -> "Figure":
    """The figure of a panel. ``ink`` is the colour of text and axes."""
    # Slow to import, and needed when a report is written alone (docs/decisions/006-matplotlib.md).
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=SIZE)
        # A layout that is computed takes twice the time.
        axes = figure.add_axes(AXES_BOX)
        for series in panel.series:
            colour = COLOURS[series.colour % len(COLOURS)]
            few: dict[str, Any] = {"marker": "o", "markersize": 2.5} if len(series.x) <= 60 else {}
            axes.plot(series.x, series.y, color=colour, linewidth=1.4, label=shown(series.label, 60), **few)
            if series.errors:
                low = [y - error for y, error in zip(series.y, series.errors, strict=True)]
                high = [y + error for y, error in zip(series.y, series.errors, strict=True)]
                axes.fill_between(series.x, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.set_xlabel(AXES[panel.axis])
        axes.grid(color=ink, alpha=0.15, linewidth=0.6)
        axes.tick_params(colors=ink)
        axes.xaxis.label.set_color(ink)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[:].set_color(ink)
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
    return figure


def learning_curve(run: Run, bases: Mapping[str, tuple[str, float]]) -> "Figure":
    """Validation metrics by their names, each with the accuracy of a base as a dashed line of its colour.

    Args:
        run: whose record has the validations.
        bases: by the name of the metric, what the base was sampled with and its accuracy.
    """
    series = [
        _series(run.validations, name, "step", label=name, colour=colour, most=MOST_POINTS)
        for colour, name in enumerate(bases)
    ]
    figure = draw(Panel("val", "accuracy", "step", tuple(series)))
    figure.set_size_inches(7, 4)
    axes = figure.axes[0]
    for each, (label, accuracy) in zip(series, bases.values(), strict=True):
        colour = COLOURS[each.colour % len(COLOURS)]
        axes.axhline(accuracy, color=colour, linestyle="--", linewidth=1, label=f"base, {label}")
    axes.set(ylabel="accuracy", ylim=(0, 1))
    axes.legend()
    figure.patch.set_visible(True)
    return figure


def to_svg(panel: Panel) -> tuple[str, dict[str, Any]]:
    """The plot as an element of a page, and where its data lies within it, by which a script finds what is under a
    pointer: the axes' rectangle as shares of the plot, and its limits.

    Its colours are ``currentColor`` and the page's ``--series-N``. Ids begin with the panel's name, because all plots
    of a page share one space of them.
    """
    from matplotlib import rc_context

    figure, buffer = draw(panel, ink=INK), io.StringIO()
    with rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    # Without the prolog of a file of its own, what the page does not need, and a style that would hold for all of it.
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    head = r'<svg viewBox="\1" role="img" aria-hidden="true">'
    svg = re.sub(r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', head, svg, count=1)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{panel.slug}-", svg)
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
    svg = svg.replace(INK, "currentColor")
    for number, colour in enumerate(COLOURS):
        svg = svg.replace(colour, f"var(--series-{number})")
    axes = figure.axes[0]
    box = axes.get_position()
    rectangle = {"left": box.x0, "right": box.x1, "top": 1 - box.y1, "bottom": 1 - box.y0}
    return svg, rectangle | {"x": list(axes.get_xlim()), "y": list(axes.get_ylim())}


def write_pictures(found: Sequence[Panel], folder: Path) -> list[Path]:
    """Writes each panel as a PNG, with its name and legend.

    Raises:
        ValueError: the folder cannot be written.
    """
    paths = []
    for panel in found:
        figure = draw(panel)
        figure.axes[0].set_title(shown(f"{panel.noun}/{panel.name}", 80), fontsize=9, parse_math=False)
        if len(panel.series) > 1:
            figure.axes[0].legend(fontsize=7)
        figure.patch.set_visible(True)
        paths.append(folder / f"{panel.slug}.png")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(paths[-1], dpi=150)
        except OSError as error:
            raise ValueError(f"`--png` must be a folder that can be written; got {folder}: {error}.") from error
    return paths
