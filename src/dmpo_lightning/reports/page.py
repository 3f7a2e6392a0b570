"""The report: one file of HTML that needs nothing else and asks no network."""

import base64
import hashlib
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from dmpo_lightning.reports.completions import viewer_items
from dmpo_lightning.reports.curves import AXES, Panel, panels
from dmpo_lightning.reports.figures import COLOURS, to_svg
from dmpo_lightning.reports.lines import replace
from dmpo_lightning.reports.run import Run, read_run
from dmpo_lightning.reports.sections import about, before_and_after, guards
from dmpo_lightning.reports.shown import escaped_html, rounded, script_json, shown

TITLES = {
    "val": "Learning curves",
    "reward": "Reward",
    "weight": "Weights",
    "policy": "Policy",
    "completion": "Completions",
    "gradient": "Gradient",
    "train": "Training",
    "time": "Time",
}
"""Headings of the nouns that are known. Others are their own."""
VIEWER = """\
<h2 id="completions">How completions were denoised</h2>
<noscript><p>The viewer needs JavaScript.</p></noscript>
<div id="viewer" tabindex="0" role="group" aria-label="denoising viewer">
<div class="controls"><button id="earlier" type="button" aria-label="previous completion">&lsaquo;</button>
<select id="which" aria-label="completion"></select>
<button id="later" type="button" aria-label="next completion">&rsaquo;</button></div>
<p id="about" class="soft"></p>
<div class="controls"><button id="play" type="button" aria-pressed="false">Play</button>
<input id="step" type="range" min="0" max="0" step="1" aria-label="denoising step">
<output id="position"></output></div>
<div id="panes"></div>
<h3>Prompt</h3><pre id="prompt" dir="auto"></pre>
<p class="soft">Colour: when a token appeared, first <span class="bar"></span> last.
Opacity: how likely the policy held it then.
Keys: ← → step, Home End, space plays, ↑ ↓ choose.</p>
</div>"""


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


def page(runs: Sequence[Run], found: Sequence[Panel]) -> str:
    """The whole file."""
    assets = Path(__file__).parent
    script, style = ((assets / name).read_text(encoding="utf-8") for name in ("report.js", "report.css"))
    figures, plots = _figures(found)
    completions = viewer_items(runs)
    title = escaped_html(", ".join(run.name for run in runs), 200)
    # Only the script of this package runs, and nothing is fetched from anywhere.
    policy = f"default-src 'none'; script-src '{_digest(script)}'; style-src 'unsafe-inline'; base-uri 'none'"
    data = script_json({"plots": plots, "completions": completions})
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}; form-action 'none'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{_links(found, has_completions=bool(completions))}
{about(runs)}
{before_and_after(runs)}
{guards(runs)}
{figures}
{VIEWER if completions else ""}
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def _links(found: Sequence[Panel], *, has_completions: bool) -> str:
    """To the parts of a page that may be long."""
    targets = {f"of-{noun}": TITLES.get(noun, noun.capitalize()) for noun in dict.fromkeys(each.noun for each in found)}
    targets |= {"completions": "Denoising"} if has_completions else {}
    links = "".join(f'<a href="#{escaped_html(name)}">{escaped_html(title)}</a>' for name, title in targets.items())
    return f"<nav>{links}</nav>"


def _digest(script: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _figures(found: Sequence[Panel]) -> tuple[str, dict[str, Any]]:
    """All plots, below a heading for each noun, and what the script has to know of them."""
    parts: list[str] = []
    plots: dict[str, Any] = {}
    for noun, group in groupby(found, key=lambda panel: panel.noun):
        drawn = []
        for panel in group:
            svg, place = to_svg(panel)
            key = str(len(plots))
            plots[key] = place | {"axis": AXES[panel.axis], "series": _series(panel)}
            drawn.append(
                f'<figure data-plot="{key}"><figcaption>{escaped_html(panel.noun)}/{escaped_html(panel.name)}'
                f'{_legend(panel)}</figcaption><div class="plot">{svg}<div class="cursor"></div></div>'
                "<output></output></figure>"
            )
        note = '<p class="soft">Bands are standard errors over prompts.</p>' if noun == "val" else ""
        heading = escaped_html(TITLES.get(noun, noun.capitalize()))
        parts.append(f'<h2 id="of-{escaped_html(noun)}">{heading}</h2>{note}<div class="plots">{"".join(drawn)}</div>')
    return "".join(parts), plots


def _series(panel: Panel) -> list[dict[str, Any]]:
    several = len(panel.series) > 1
    return [
        {
            "label": shown(each.label, 100) if several else "",
            "x": [rounded(value) for value in each.x],
            "y": [rounded(value) for value in each.y],
            "e": [rounded(value) for value in each.errors],
        }
        for each in panel.series
    ]


def _legend(panel: Panel) -> str:
    if len(panel.series) < 2:
        return ""
    keys = "".join(
        f'<span class="key" style="background: var(--series-{each.colour % len(COLOURS)})"></span>'
        f"{escaped_html(each.label, 100)}"
        for each in panel.series
    )
    return f"<small>{keys}</small>"


def write_report(folders: Sequence[Path], output: Path, axis: str = "step") -> list[Panel]:
    """Writes a report of these runs, complete or not at all, and returns what it plots.

    Raises:
        ValueError: a folder is not a run's, or the file cannot be written.
    """
    runs = read_runs(folders)
    found = panels(runs, axis)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        replace(output, page(runs, found).encode("utf-8", errors="backslashreplace"))
    except OSError as error:
        raise ValueError(f"`-o` must be a file that can be written; got {output}: {error}.") from error
    return found
