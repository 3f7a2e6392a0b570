"""The report: one file of HTML that needs nothing else and asks no network.

All foreign text is shown as text. Nothing of it is read as HTML or as a script.
"""

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from string import Template
from typing import Any

from dmpo_lightning.reports.lines import replace
from dmpo_lightning.reports.plots import AXES, COLOURS, Panel, Series, panels, to_svg
from dmpo_lightning.reports.record import AFTER, BEFORE, Completion, Run, read_runs, shown_completions
from dmpo_lightning.terminal import shown

TITLES = {"val": "Learning curves", "weight": "Weights", "completion": "Completions", "train": "Training"}
"""Headings of nouns. Others are their own."""
COUNT = 12
"""Completions of each kind and run, at most."""
MOST_BYTES = 2_000_000
"""Of all completions of a page."""
LONGEST_TOKEN = 100


def write_report(folders: Sequence[Path], output: Path, axis: str = "step") -> tuple[list[Panel], list[list[str]]]:
    """Writes a report of these runs, complete or not at all, and returns what it plots and what it leaves out.

    Raises:
        ValueError: a folder is not a run's, or the file cannot be written.
    """
    runs = read_runs(folders)
    found = panels(runs, axis)
    try:
        replace(output, page(runs, found).encode("utf-8", errors="backslashreplace"))
    except OSError as error:
        raise ValueError(f"`-o` must be a file that can be written; got {output}: {error}.") from error
    return found, left_out(runs)


def page(runs: Sequence[Run], found: Sequence[Panel]) -> str:
    """The whole file."""
    assets = {each.name: each.read_text(encoding="utf-8") for each in Path(__file__).parent.glob("report.*")}
    figures, plots = _figures(found)
    completions = viewer_items(runs)
    rows = left_out(runs)
    # Once all has been read.
    unread = f"<h2>Left out</h2>{table(['run', 'what is not what it should be', 'how often'], rows)}" if rows else ""
    script = assets["report.js"]
    nouns = dict.fromkeys(panel.noun for panel in found)
    links = {f"of-{noun}": _title(noun) for noun in nouns} | ({"completions": "Denoising"} if completions else {})
    return Template(assets["report.html"]).substitute(
        # Only the script of this package runs, and nothing is fetched from anywhere.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        title=escaped_html(", ".join(run.name for run in runs), 200),
        style=assets["report.css"],
        links="".join(f'<a href="#{escaped_html(name)}">{escaped_html(title)}</a>' for name, title in links.items()),
        tables=about(runs) + before_and_after(runs) + guards(runs) + unread,
        figures=figures,
        hidden="" if completions else " hidden",
        data=script_json({"plots": plots, "completions": completions}),
        script=script,
    )


def _title(noun: str) -> str:
    return TITLES.get(noun, noun.capitalize())


def _figures(found: Sequence[Panel]) -> tuple[str, dict[str, Any]]:
    """All plots, below a heading for each noun, and what the script has to know of them."""
    parts: list[str] = []
    plots: dict[str, Any] = {}
    for noun, group in groupby(found, key=lambda panel: panel.noun):
        drawn = []
        for panel in group:
            svg, area = to_svg(panel)
            key = str(len(plots))
            plots[key] = area | {"axis": AXES[panel.axis], "series": [_series(panel, each) for each in panel.series]}
            drawn.append(
                f'<figure data-plot="{key}"><figcaption>{escaped_html(panel.noun)}/{escaped_html(panel.name)}'
                f'{_legend(panel)}</figcaption><div class="plot">{svg}<div class="cursor"></div></div>'
                "<output></output></figure>"
            )
        note = '<p class="soft">Bands are standard errors over prompts.</p>' if noun == "val" else ""
        heading = f'<h2 id="of-{escaped_html(noun)}">{escaped_html(_title(noun))}</h2>'
        parts.append(f'{heading}{note}<div class="plots">{"".join(drawn)}</div>')
    return "".join(parts), plots


def _series(panel: Panel, each: Series) -> dict[str, Any]:
    values = {"x": each.x, "y": each.y, "e": each.errors}
    label = shown(each.label, 100) if len(panel.series) > 1 else ""
    return {"label": label} | {name: [rounded(value) for value in own] for name, own in values.items()}


def _legend(panel: Panel) -> str:
    keys = "".join(
        f'<span class="key" style="background: var(--series-{each.colour % len(COLOURS)})"></span>'
        f"{escaped_html(each.label, 100)}"
        for each in panel.series
    )
    return f"<small>{keys}</small>" if len(panel.series) > 1 else ""


def about(runs: Sequence[Run]) -> str:
    """What was run and on what, one column per run, with the options in which runs differ."""
    columns = [_facts(run) for run in runs]
    rows = _rows(columns)
    parts = ["<h2>What was run</h2>", table(["", *(run.name for run in runs)], rows)]
    options = [_flat(run.facts.get("configuration") or {}) for run in runs]
    if len(runs) > 1:
        differing = [row for row in _rows(options) if len(set(row[1:])) > 1]
        if differing:
            parts += ["<h3>Options that differ</h3>", table(["", *(run.name for run in runs)], differing)]
    for run, own in zip(runs, options, strict=True):
        if own:
            content = json.dumps(run.facts["configuration"], indent=2, ensure_ascii=False)
            summary = f"Configuration of {escaped_html(run.name)}"
            parts.append(f"<details><summary>{summary}</summary><pre>{escaped_html(content, 100_000)}</pre></details>")
    return "".join(parts)


def _facts(run: Run) -> dict[str, str]:
    last = (run.buffers or run.validations)[-1:]
    progress = {
        "optimizer steps": f"{max(point.step for point in (*run.buffers, *run.validations)):.0f}" if last else "",
        "rollouts": f"{last[0].rollouts:.0f}" if last else "",
        "minutes of fitting": f"{last[0].seconds / 60:.1f}" if last else "",
    }
    left_out = ("configuration", "format", "versions")
    stated = {name: value for name, value in run.facts.items() if name not in left_out}
    stated["versions"] = [f"{name} {value}" for name, value in run.facts.get("versions", {}).items()]
    found = _flat(stated) | progress | {"directory": run.folder.name}
    return {name: value for name, value in found.items() if value}


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested options by their dotted names. Class and arguments of an object stand beside each other."""
    if isinstance(value, Mapping):
        found: dict[str, str] = {}
        for name, each in value.items():
            inner = prefix if name == "init_args" else f"{prefix}.{name}".lstrip(".")
            found |= _flat(each, inner)
        return found
    if isinstance(value, list) and any(isinstance(each, Mapping) for each in value):
        return _flat({str(place): each for place, each in enumerate(value)}, prefix)
    if isinstance(value, list):
        return {prefix: ", ".join(map(str, value))}
    return {prefix: "" if value is None else str(value)}


def _rows(columns: Sequence[Mapping[str, str]]) -> list[list[str]]:
    names = dict.fromkeys(name for column in columns for name in column)
    return [[name, *(column.get(name, "") for column in columns)] for name in names]


def before_and_after(runs: Sequence[Run]) -> str:
    """The table of ``summary.json``: held-out examples, each sampler before and after fitting."""
    results = [
        (f"{run.name}: {moment}, {sampler}" if len(runs) > 1 else f"{moment}, {sampler}", measures)
        for run in runs
        for moment in (BEFORE, AFTER)
        for sampler, measures in run.summary.get(moment, {}).items()
    ]
    if not results:
        return ""
    names = dict.fromkeys(name for _, measures in results for name in measures)
    shown_as = "{mean:.3f} ± {standard_error:.3f}"
    rows = [
        [label, *(shown_as.format(**measures[name]) if name in measures else "" for name in names)]
        for label, measures in results
    ]
    return f"<h2>Before and after</h2>{table(['held-out examples', *names], rows)}"


def guards(runs: Sequence[Run]) -> str:
    """What guards have said, where there were any events."""
    rows = [
        [*([run.name] if len(runs) > 1 else []), f"{step:.0f}", name, message]
        for run in runs
        for step, name, message in run.guards
    ]
    if not rows:
        return ""
    headings = [*(["run"] if len(runs) > 1 else []), "step", "guard", "what it saw"]
    return f"<h2>Guards</h2>{table(headings, rows)}"


def left_out(runs: Sequence[Run]) -> list[list[str]]:
    """What files hold that is not what it should be, by run, with how often it is there."""
    return [[run.name, what, str(count)] for run in runs for what, count in run.unread.items() if count]


def viewer_items(runs: Sequence[Run], count: int = COUNT) -> list[dict[str, Any]]:
    """What can be chosen in the viewer. One item shows one prompt with one completion, or with two beside each other.

    Runs share the bytes evenly. Items that would need more are left out.
    """
    items: list[dict[str, Any]] = []
    for run in runs:
        left = MOST_BYTES // len(runs)
        found = shown_completions(run, count)
        for (kind, index, prompt), group in groupby(
            found, key=lambda one: (one[0], one[1].prompt_index, one[1].prompt)
        ):
            completions = [each for _, each in group]
            rewards = " to ".join("?" if each.reward is None else f"{each.reward:.4g}" for each in completions)
            own = f"{run.name}: " if len(runs) > 1 else ""
            item = {
                "title": shown(f"{len(items) + 1}. {own}{kind}, prompt {index}, reward {rewards}", 200),
                "about": shown(f"{own}prompt {index} of its split, {kind}", 200),
                "prompt": shown(prompt),
                "panes": [_pane(each) for each in completions],
            }
            size = len(script_json(item))
            if size <= left:
                left -= size
                items.append(item)
    return items


def _pane(each: Completion) -> dict[str, Any]:
    facts = ({} if each.reward is None else {"reward": each.reward}) | dict(each.facts)
    return {
        "title": shown(f"Completion {each.moment}".strip(), 100),
        "about": shown(", ".join(f"{name} {value:.4g}" for name, value in facts.items()), 2000),
        "text": "" if each.tokens else shown(each.text),
        "tokens": [shown(token, LONGEST_TOKEN) for token in each.tokens],
        "steps": list(each.steps),
        "confidences": [rounded(value) for value in each.confidences],
    }


def escaped_html(text: Any, longest: int = 20_000) -> str:
    """The text as the content or an attribute of an element."""
    return html.escape(shown(str(text), longest))


def script_json(value: Any) -> str:
    """A value as the content of a script element, which no text within it can end.

    It is ASCII, and ``<`` is escaped, of which an end tag and a comment would be made.
    """
    plain = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return plain.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def rounded(value: float) -> float:
    """Five digits, which is more than a plot shows."""
    return float(f"{value:.5g}")


def table(headings: list[str], rows: list[list[str]]) -> str:
    """A table whose cells are text, with the first of each row as its heading."""
    head = "".join(f'<th scope="col">{escaped_html(each)}</th>' for each in headings)
    body = "".join(
        f'<tr><th scope="row">{escaped_html(row[0], 200)}</th>'
        + "".join(f"<td>{escaped_html(cell, 1000)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
