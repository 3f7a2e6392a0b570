"""The report: one file of HTML that needs nothing else and asks no network. It begins with the result.

All foreign text is shown as text. Nothing of it is read as HTML or as a script.
"""

import base64
import hashlib
import html
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace as changed
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from string import Template
from typing import Any

from dmpo_lightning.reports.lines import replace
from dmpo_lightning.reports.plots import Panel, drawn_and_said, panels, rounded
from dmpo_lightning.reports.record import (
    AFTER,
    BEFORE,
    Completion,
    Run,
    differing,
    evaluated,
    flat,
    held_out,
    read_runs,
    rollouts,
)
from dmpo_lightning.terminal import shown

COUNT = 16
"""Held-out prompts in the viewer at most, and half of the training prompts of each of `KINDS`."""
KINDS = ("never", "sometimes", "always")
"""How often rollouts of a prompt were right."""
ITEM_BYTES = 1_200_000
"""Of all completions of a page."""
TIMES = ("sampling", "scoring", "training", "validation", "evaluation")
Cell = str | Sequence[tuple[str, float]]
"""Of a table: a text, or a bar with its parts."""


def write_report(folders: Sequence[Path], output: Path, *, live: bool = False) -> None:
    """Writes a report of these runs, complete or not at all.

    With ``live`` the page says that the run goes on, and whoever has it open sees it anew.

    Raises:
        ValueError: a folder is not a run's, or the file cannot be written.
    """
    runs = read_runs(folders)
    try:
        replace(output, page(runs, live=live).encode("utf-8", errors="backslashreplace"))
    except OSError as error:
        raise ValueError(f"`-o` must be a file that can be written; got {output}: {error}.") from error


def page(runs: Sequence[Run], *, live: bool = False) -> str:
    """The whole file."""
    found, said = drawn_and_said(panels(runs))
    sampled = [rollouts(run) for run in runs]
    items = viewer_items(runs, sampled)
    lines = [headline(run) for run in runs]
    recipes = dict.fromkeys(line.partition(":")[0].partition(",")[0] for line in lines)
    title = lines[0] if len(runs) == 1 else f"{', '.join(recipes)}: {len(runs)} runs compared"
    keys = "".join(
        f'<li><span class="key" style="background: var(--series-{number % 8})"></span>'
        f"<b>{escaped_html(run.name, 100)}</b>: {escaped_html(line.partition(': ')[2], 300)}</li>"
        for number, (run, line) in enumerate(zip(runs, lines, strict=True))
    )
    plots, points, areas = _plots(found)
    top = [f"<h1>{escaped_html(title, 300)}</h1>", f"<ul class='runs'>{keys}</ul>" if len(runs) > 1 else ""]
    top += [f'<p class="soft">Written at {time.strftime("%H:%M on %Y-%m-%d")}, and anew at each validation.</p>'] * live
    top += ['<div id="controls" class="controls"></div>', *areas[:1], results(runs), guards(runs)]
    rest = [prompts(own, items, prefix) for own, prefix in zip(sampled, _prefixes(runs), strict=True)]
    rest += [time_spent(runs), *_grouped(found[1:], areas[1:])]
    if said:
        rest.append(f'<h2>Without a plot</h2><p class="soft">{escaped_html("; ".join(said), 5000)}.</p>')
    # Once all has been read.
    rest.append(about(runs))
    groups = [{name: value for name, value in own.items() if name != "seed"} for own in differing(runs)]
    alike = [number for number, own in enumerate(groups) if groups.count(own) > 1]
    data: dict[str, Any] = {"runs": [shown(run.name, 60) for run in runs], "points": points, "plots": plots}
    data |= {"completions": items, "seeds": [[number for number in alike if groups[number] == own] for own in groups]}
    # For an hour, since the run may be killed.
    data["reload_until"] = 1000 * (time.time() + 3600) if live else 0
    return _document(title, "".join(top), "".join(rest), data)


def _prefixes(runs: Sequence[Run]) -> list[str]:
    """What stands before all that is said of a run, where there are several."""
    return [f"{run.name}: " * (len(runs) > 1) for run in runs]


def viewer(items: Sequence[Mapping[str, Any]]) -> str:
    """A whole document of HTML with nothing but the viewer of these `viewer_item`."""
    return _document("Denoising", "", "", {"runs": [], "plots": [], "completions": items})


def _document(title: str, top: str, rest: str, data: Mapping[str, Any]) -> str:
    assets = {each.name: each.read_text(encoding="utf-8") for each in Path(__file__).parent.glob("report.*")}
    script = assets["report.js"]
    return Template(assets["report.html"]).substitute(
        # Only the script of this package runs, and nothing is fetched from anywhere.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        title=escaped_html(title, 200),
        style=assets["report.css"],
        top=top,
        rest=rest,
        hidden="" if data["completions"] else " hidden",
        data=script_json(data),
        script=script,
    )


def headline(run: Run) -> str:
    """What was run and what was learnt, in one line."""
    options = flat(run.facts.get("configuration"))
    name = options.get("trainer.logger.name") or options.get("trainer.logger.0.name") or run.facts.get("task")
    said = [f"{name or run.folder.resolve().name}" + (f", seed {run.facts['seed']}" if "seed" in run.facts else "")]
    said[0] += f": {measured}" if (measured := _measured(run)) else ":"
    for last in sorted((*run.buffers, *run.validations), key=lambda point: point.step)[-1:]:
        most = options.get("trainer.max_steps", "-1")
        said += [f"{last.step:.0f}{f' of {most}' if most.isdecimal() else ''} steps"]
        said += [f"{last.rollouts:.0f} rollouts"] * bool(last.rollouts) + [clock(last.seconds)]
    return ", ".join(said)


def _measured(run: Run) -> str:
    """Accuracy of the base at its best and at the end, else of an evaluation, else both ends of the first plot."""
    known = [each for each in run.results if "accuracy" in each.means]
    before, after = ([each for each in known if each.moment == moment] for moment in (BEFORE, AFTER))
    others = [each for each in known if each.moment not in (BEFORE, AFTER)]
    if before and after:
        best = max(each.means["accuracy"]["mean"] for each in before)
        count = f"{after[0].examples} " if after[0].examples else ""
        return f"{share(best)} to {share(after[0].means['accuracy']['mean'])} on {count}held-out examples"
    if others:
        said = (f"{share(each.means['accuracy']['mean'])} {each.sampler} at {each.moment}" for each in others[:4])
        return f"accuracy {', '.join(said)} on {others[0].examples} {run.facts.get('split')} prompts"
    for panel in panels([run])[:1]:
        y, split = panel.series[0].y, "validation" if panel.name.startswith("val/") else "train"
        size = flat(run.facts).get(f"prompts.{split}")
        return f"{panel.name} {share(y[0])} to {share(y[-1])}" + f" on {size} {split} prompts" * (size is not None)
    return ""


def share(value: float) -> str:
    """A number as a headline has it: .69, and 1.00."""
    return f"{value:.2f}".removeprefix("0") if 0 <= value < 1 else f"{value:.3g}" if abs(value) > 1 else f"{value:.2f}"


def clock(seconds: float) -> str:
    """Minutes and seconds, or hours in front of them."""
    hours, minutes = divmod(int(seconds) // 60, 60)
    return f"{hours}:{minutes:02}:{int(seconds) % 60:02}" if hours else f"{minutes}:{int(seconds) % 60:02}"


def _plots(found: Sequence[Panel]) -> tuple[list[dict[str, Any]], list[Any], list[str]]:
    """What the script draws, the points that plots share, and the places where it draws them, with a word on each."""
    plots: list[dict[str, Any]] = []
    points: dict[Any, int] = {}
    areas = []
    for number, panel in enumerate(found):
        series = [vars(each) | {"x": points.setdefault(each.x, len(points))} for each in panel.series]
        plots.append({"name": shown(panel.name, 100), "series": series})
        meaning, unit, healthy = panel.about
        words = [meaning[:1].upper() + meaning[1:], f"Healthy: {healthy}" if healthy else ""]
        said = " ".join(f"{each}." for each in words if each)
        areas.append(
            f'<figure data-plot="{number}"><figcaption><b>{escaped_html(panel.name, 100)}</b> '
            f'<small>{escaped_html(unit)}</small></figcaption><div class="plot"></div><output></output>'
            f'<p class="soft">{escaped_html(said)}</p></figure>'
        )
    return plots, list(points), areas


def _grouped(found: Sequence[Panel], areas: Sequence[str]) -> list[str]:
    return [
        f'<h2>{escaped_html(group)}</h2><div class="plots">{"".join(area for _, area in own)}</div>'
        for group, own in groupby(zip(found, areas, strict=True), key=lambda each: each[0].group)
    ]


def results(runs: Sequence[Run]) -> str:
    """What each sampler has reached, with a column for before and after a fit, and for each length of an evaluation."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for run, prefix in zip(runs, _prefixes(runs), strict=True):
        for each in run.results:
            for measure, value in each.means.items():
                text = "{mean:.3f} ± {standard_error:.3f}".format(**value)
                cells.setdefault((measure, prefix + each.sampler), {})[each.moment] = text
    moments = list(dict.fromkeys(moment for own in cells.values() for moment in own))
    accuracy, others = (
        [
            [sampler if is_accuracy else f"{measure}, {sampler}", *(own.get(moment, "") for moment in moments)]
            for (measure, sampler), own in cells.items()
            if (measure == "accuracy") == is_accuracy
        ]
        for is_accuracy in (True, False)
    )
    text = table(["accuracy", *moments], accuracy) if accuracy else ""
    folded = f"<details><summary>Other measures</summary>{table(['', *moments], others)}</details>"
    return text + folded * bool(others)


def guards(runs: Sequence[Run]) -> str:
    """What guards have said."""
    rows = [[name, f"{step:.0f}", run.name, message] for run in runs for step, name, message in run.guards]
    if not rows:
        return '<p class="soft">No guard fired.</p>' if any(run.buffers for run in runs) else ""
    return table(["guard", "step", "run", "what it saw"], rows)


def prompts(found: Sequence[Completion], items: Sequence[Mapping[str, Any]], prefix: str) -> str:
    """How many prompts were never, sometimes and always solved, over time and by difficulty, and which they were."""
    if not found:
        return ""
    rows = list[list[Cell]]()
    for name, own in _slices(found).items():
        verdicts = list(solved(own).values())
        counts = [(kind, verdicts.count(kind)) for kind in KINDS]
        rows.append([name, counts, *(str(count) for _, count in counts)])
    chosen = [item["kind"] for item in items]
    links = "".join(
        f'<button type="button" data-item="{chosen.index(f"{prefix}{kind} solved")}">{kind} solved</button> '
        for kind in KINDS
        if f"{prefix}{kind} solved" in chosen
    )
    words = "Of how many prompts no, some or all rollouts were right: correct or solved, or else of the highest reward."
    return (
        f'<h2>{escaped_html(prefix)}Prompts</h2><p class="soft">{words}</p>'
        f"{table(['prompts', '', *KINDS], rows)}<p>Rollouts of prompts: {links}</p>"
    )


def _slices(found: Sequence[Completion]) -> dict[str, list[Completion]]:
    """Rollouts by the eighth of the run in which they were sampled, and by the difficulty of their prompts."""
    numbers = sorted({each.buffer for each in found})
    slices = {"all" if numbers[0] <= 0 else f"the last {len(numbers)} buffers": list(found)}
    bounds = sorted({len(numbers) * part // 8 for part in range(9)})
    for start, end in pairwise(bounds) if len(numbers) > 1 else ():
        first, last = numbers[start], numbers[end - 1]
        name = f"buffers {first} to {last}" if first < last else f"buffer {first}"
        slices[name] = [each for each in found if first <= each.buffer <= last]
    for difficulty in sorted({each.difficulty for each in found} - {""}, key=lambda text: (len(text), text)):
        slices[f"difficulty {difficulty}"] = [each for each in found if each.difficulty == difficulty]
    return slices


def solved(found: Iterable[Completion]) -> dict[int, str]:
    """Of each prompt whether its rollouts were never, sometimes or always right."""
    right: dict[int, list[bool]] = {}
    for each in found:
        right.setdefault(each.prompt_index, []).append(each.verdict == "right")
    return {index: "always" if all(own) else "sometimes" if any(own) else "never" for index, own in right.items()}


def time_spent(runs: Sequence[Run]) -> str:
    """Where the time went: a bar for each run."""
    rows = []
    for run, prefix in zip(runs, _prefixes(runs), strict=True):
        points = (*run.base, *run.buffers, *run.validations, *run.after)
        parts = {what: sum(point.values.get(f"time/{what}", 0.0) for point in points) for what in TIMES}
        parts["other"] = max(run.seconds - sum(parts.values()), 0.0)
        stated = [(what, seconds) for what, seconds in parts.items() if seconds >= 0.5]
        words = ", ".join(
            f'<span class="short"><span class="key {what}"></span>{what} {seconds:.0f} s</span>'
            for what, seconds in stated
        )
        rows += [f"<p>{escaped_html(prefix)}{words}, in all {clock(run.seconds)}</p>{bar(stated)}"] * (len(stated) > 1)
    return f"<h2>Where the time went</h2>{''.join(rows)}" if rows else ""


def bar(parts: Sequence[tuple[str, float]]) -> str:
    """One bar, whose parts lie behind each other."""
    total = sum(amount for _, amount in parts) or 1.0
    spans = (
        f'<span class="{name}" style="width: {100 * amount / total:.2f}%" title="{name}"></span>'
        for name, amount in parts
    )
    return f'<div class="stack" aria-hidden="true">{"".join(spans)}</div>'


def about(runs: Sequence[Run]) -> str:
    """What was run and on what, and with which options, one column per run, folded. What differs comes first."""
    columns = [flat({**run.facts, "directory": run.folder.resolve().name}) for run in runs]
    names = dict.fromkeys(name for own in columns for name, text in own.items() if text)
    rows = [[name.removeprefix("configuration."), *(own.get(name, "") for own in columns)] for name in names]
    text = table(["", *(run.name for run in runs)], sorted(rows, key=lambda row: len({*row[1:]}) == 1))
    return f"<h2>About</h2><details><summary>What was run, and its options</summary>{text}</details>"


def viewer_items(runs: Sequence[Run], sampled: Sequence[Sequence[Completion]]) -> list[dict[str, Any]]:
    """What can be chosen in the viewer: held-out prompts with the completions of all runs, then of each run what an
    evaluation made of its prompts, and rollouts. Runs share the bytes evenly.
    """
    together = _in_all_runs(runs)[:COUNT]
    kind = "most changed" if any(len(own) > 1 for own in together) else "held out"
    chosen = [[(kind, own) for own in together]]
    for run, found, prefix in zip(runs, sampled, _prefixes(runs), strict=True):
        own = [("evaluated", each) for each in evaluated(run)[: 4 * COUNT]] + list(_told(found))
        chosen.append([(prefix + kind, each) for kind, each in own])
    kept = []
    for own in chosen:
        items = [viewer_item(kind, completions) for kind, completions in own]
        sizes = accumulate(len(script_json(item)) for item in items)
        kept += [item for item, size in zip(items, sizes, strict=True) if size < ITEM_BYTES / len(chosen)]
    return kept


def _in_all_runs(runs: Sequence[Run]) -> list[tuple[Completion, ...]]:
    """Held-out prompts, each with the first run's completion of before and with the last one of each run."""
    own = [{(each[0].prompt_index, each[0].prompt): each for each in held_out(run)} for run in runs]
    found = []
    for key in dict.fromkeys(key for each in own for key in each):
        have = [(prefix, each[key]) for prefix, each in zip(_prefixes(runs), own, strict=True) if key in each]
        last = [changed(each[-1], moment=prefix + each[-1].moment) for prefix, each in have]
        found.append((*have[0][1][:-1], *last))
    return found


def _told(found: Sequence[Completion]) -> Iterator[tuple[str, tuple[Completion, ...]]]:
    """Different rollouts, the best and the worst, of prompts that were never, sometimes and always solved, with these
    words. Those that were sampled last come first.
    """
    groups: dict[int, list[Completion]] = {}
    for each in reversed(found):
        groups.setdefault(each.prompt_index, []).insert(0, each)
    verdicts = solved(found)
    for kind in KINDS:
        for own in [own for index, own in groups.items() if verdicts[index] == kind][: 2 * COUNT]:
            times = Counter(each.text for each in own)
            different = sorted({each.text: each for each in own}.values(), key=lambda each: -(each.reward or 0.0))
            named = [changed(each, moment=f"{each.moment}, {times[each.text]} of {len(own)}") for each in different]
            yield f"{kind} solved", (*named[:1], *named[1:][-3:])


def viewer_item(kind: str, completions: Sequence[Completion]) -> dict[str, Any]:
    """One prompt with completions beside each other. The words of the kind are a heading in the list of items."""
    first = completions[0]
    rewards = ["?" if each.reward is None else f"{each.reward:.4g}" for each in completions]
    verdicts = [each.verdict.partition(",")[0] for each in completions]
    said = ", ".join(verdicts) if any(verdicts) else f"reward {(', ' if len(rewards) > 2 else ' to ').join(rewards)}"
    return {
        "kind": kind,
        "title": shown(f"{kind}, prompt {first.prompt_index}, {said}", 200),
        "index": first.prompt_index,
        "prompt": shown(first.prompt),
        "drawing": shown(first.drawings[0], 2000),
        "panes": [_pane(each) for each in completions],
    }


def _pane(each: Completion) -> dict[str, Any]:
    facts = ({} if each.reward is None else {"reward": each.reward}) | dict(each.facts)
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in facts.items())
    return {
        "title": shown(each.moment, 100),
        "about": shown(f"{each.verdict}{'; ' if each.verdict and numbers else ''}{numbers}", 2000),
        "text": "" if each.tokens else shown(each.text),
        "drawing": shown(each.drawings[1], 2000),
        "tokens": [(shown(text, 100), step, rounded(sure)) for text, step, sure in each.tokens],
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


def table(headings: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A table of texts and bars, with the first of each row as its heading."""
    head = "".join(f'<th scope="col">{escaped_html(each)}</th>' for each in headings)
    body = "".join(
        f'<tr><th scope="row">{escaped_html(row[0], 200)}</th>{"".join(map(_cell, row[1:]))}</tr>' for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(cell: Cell) -> str:
    if not isinstance(cell, str):
        return f"<td>{bar(cell)}</td>"
    return f"<td{' class=short' * (len(cell) < 20)}>{escaped_html(cell, 1000)}</td>"
