"""Panels drawn by matplotlib, for a page whose colours are not known yet, or as pictures."""

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmpo_lightning.reports.curves import AXES, Panel
from dmpo_lightning.reports.shown import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


def to_svg(panel: Panel) -> tuple[str, dict[str, Any]]:
    """The plot as an element of a page, and where its data lies within it.

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
    svg = re.sub(
        r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img" aria-hidden="true">', svg, count=1
    )
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{panel.slug}-", svg)
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
    svg = svg.replace(INK, "currentColor")
    for number, colour in enumerate(COLOURS):
        svg = svg.replace(colour, f"var(--series-{number})")
    return svg, _place(figure)


def _place(figure: "Figure") -> dict[str, Any]:
    """The axes' rectangle as shares of the plot, with its limits, by which a script finds the data under a pointer."""
    axes = figure.axes[0]
    box = axes.get_position()
    return {
        "left": box.x0,
        "right": box.x1,
        "top": 1 - box.y1,
        "bottom": 1 - box.y0,
        "x": list(axes.get_xlim()),
        "y": list(axes.get_ylim()),
    }


def write_pictures(panels: list[Panel], folder: Path) -> list[Path]:
    """Writes each panel as a PNG, with its name and legend.

    Raises:
        ValueError: the folder cannot be written.
    """
    paths = []
    for panel in panels:
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
