"""The report: one file of HTML that needs nothing else and asks no network. It begins with the result.

All foreign text is shown as text. Nothing of it is read as HTML or as a script.
"""

import base64
import hashlib
import html
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace as changed
from itertools import groupby
from pathlib import Path
from string import Template
from typing import Any

from dmpo_lightning.reports.lines import replace
from dmpo_lightning.reports.plots import Panel, drawn_and_said, panels
from dmpo_lightning.reports.record import (
    AFTER,
    BEFORE,
    MOST_BYTES,
    SOLVED,
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
"""Prompts of each kind in the viewer, and of rollouts for each of them, at most."""
ITEM_BYTES = 1_200_000
"""Of all completions of a page."""
LIVE_BYTES = 2**20
"""Of rollouts that are read for a page of a run that goes on, which is written again and again."""
LONGEST_TOKEN = 100
TIMES = ("sampling", "scoring", "training", "validation")


def write_report(
    folders: Sequence[Path], output: Path, axis: str = "step", *, live: bool = False
) -> tuple[list[Panel], list[list[str]]]:
    """Writes a report of these runs, complete or not at all, and returns what it plots and what it leaves out.

    With ``live`` the page says that the run goes on, and whoever has it open sees it anew.

    Raises:
        ValueError: a folder is not a run's, or the file cannot be written.
    """
    runs = read_runs(folders)
    found, said = drawn_and_said(panels(runs))
    try:
        replace(output, page(runs, found, said, axis, live=live).encode("utf-8", errors="backslashreplace"))
    except OSError as error:
        raise ValueError(f"`-o` must be a file that can be written; got {output}: {error}.") from error
    return found, left_out(runs)


def page(
    runs: Sequence[Run], found: Sequence[Panel], said: Sequence[str] = (), axis: str = "step", *, live: bool = False
) -> str:
    """The whole file, with a plot of each of these panels and a line of text on the others."""
    sampled = [rollouts(run, LIVE_BYTES if live else MOST_BYTES) for run in runs]
    items = viewer_items(runs, sampled)
    lines = [headline(run, live=live) for run in runs]
    recipes = dict.fromkeys(line.partition(":")[0].partition(",")[0] for line in lines)
    title = lines[0] if len(runs) == 1 else f"{', '.join(recipes)}: {len(runs)} runs compared"
    keys = "".join(
        f'<li><span class="key" style="background: var(--series-{number % 8})"></span>'
        f"<b>{escaped_html(run.name, 100)}</b>: {escaped_html(line.partition(': ')[2], 300)}</li>"
        for number, (run, line) in enumerate(zip(runs, lines, strict=True))
    )
    first = [panel for panel in found[:1] if panel.group == "Learning curves"]
    plots, times, areas = _plots(found)
    top = [f"<h1>{escaped_html(title, 300)}</h1>", f"<ul class='runs'>{keys}</ul>" if len(runs) > 1 else ""]
    top += ['<div id="controls" class="controls"></div>', *areas[: len(first)], results(runs), guards(runs)]
    rest = [prompts(run, own, items, several=len(runs) > 1) for run, own in zip(runs, sampled, strict=True)]
    rest += [time_spent(runs), *_grouped(found[len(first) :], areas[len(first) :])]
    if said:
        rest.append(f'<h2>Without a plot</h2><p class="soft">{escaped_html("; ".join(said), 5000)}.</p>')
    # Once all has been read.
    rest.append(about(runs))
    groups = [{name: value for name, value in own.items() if name != "seed"} for own in differing(runs)]
    alike = [number for number, own in enumerate(groups) if groups.count(own) > 1]
    data = {"axis": axis, "live": live, "runs": [shown(run.name, 60) for run in runs]}
    data["seeds"] = [[number for number in alike if groups[number] == own] for own in groups]
    return _document(title, "".join(top), "".join(rest), data | {"times": times, "plots": plots, "completions": items})


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


def headline(run: Run, *, live: bool = False) -> str:
    """What was run and what was learnt, in one line."""
    options = flat(run.facts["configuration"])
    name = options.get("trainer.logger.name") or options.get("trainer.logger.0.name") or run.facts.get("task")
    seed = run.facts.get("seed")
    what = f"{name or run.folder.resolve().name}{'' if seed is None else f', seed {seed}'}"
    points = sorted((*run.buffers, *run.validations), key=lambda point: point.step)
    if not points:
        return f"{what}: {_measured(run)}".removesuffix(": ")
    steps, most = f"{points[-1].step:.0f}", options.get("trainer.max_steps", "-1")
    steps = f"step {steps} of {most}" if live and most.isdecimal() else f"{steps} steps"
    spent = [steps, f"{points[-1].rollouts:.0f} rollouts" if points[-1].rollouts else "", clock(points[-1].seconds)]
    return f"{what}: {', '.join(filter(None, [_measured(run), *spent]))}"


def _measured(run: Run) -> str:
    """Accuracy of the base at its best and at the end, else the first and the last of what was validated."""
    before, after = (
        [own["accuracy"]["mean"] for own in run.summary[moment].values() if "accuracy" in own]
        for moment in (BEFORE, AFTER)
    )
    if before and after:
        return f"{share(max(before))} to {share(after[0])} on held-out examples"
    if run.results:
        own = [each for each in run.results if "accuracy" in each["means"]]
        one_length = len({each["length"] for each in own}) == 1
        said = ", ".join(
            f"{share(each['means']['accuracy']['mean'])} {each['sampler']}"
            + ("" if one_length else f" at length {each['length']:g}")
            for each in own[:4]
        )
        return f"accuracy {said} on {run.results[0]['n']:g} {run.facts.get('split')} prompts"
    for points in (run.validations, run.buffers):
        for ending in ("/accuracy", "val/loss", "reward/total"):
            for name in dict.fromkeys(name for point in points for name in point.values if name.endswith(ending)):
                values = [point.values[name] for point in points if name in point.values]
                first = (run.base(name) or {"mean": values[0]})["mean"]
                return f"{name} {share(first)} to {share(values[-1])}"
    return ""


def share(value: float) -> str:
    """A number as a headline has it: .69, and 1.00."""
    return f"{value:.2f}".removeprefix("0") if 0 <= value < 1 else f"{value:.3g}" if abs(value) > 1 else f"{value:.2f}"


def clock(seconds: float) -> str:
    """Minutes and seconds, or hours in front of them."""
    hours, minutes = divmod(int(seconds) // 60, 60)
    return f"{hours}:{minutes:02}:{int(seconds) % 60:02}" if hours else f"{minutes}:{int(seconds) % 60:02}"


def _plots(found: Sequence[Panel]) -> tuple[list[dict[str, Any]], list[list[list[float]]], list[str]]:
    """What the script draws, the axes that plots share, and the places where it draws them, with a word on each."""
    plots: list[dict[str, Any]] = []
    times: dict[Any, int] = {}
    areas = []
    for number, panel in enumerate(found):
        series = []
        for each in panel.series:
            x = tuple(tuple(rounded(value) for value in own) for own in each.x.values())
            y, errors = ([rounded(value) for value in own] for own in (each.y, each.errors))
            base = None if each.base is None else rounded(each.base)
            own = {"run": each.run, "label": shown(each.label, 60), "times": times.setdefault(x, len(times))}
            series.append(own | {"y": y, "e": errors, "base": base})
        plots.append({"name": shown(panel.name, 100), "series": series})
        meaning, unit, healthy = panel.about
        words = [meaning[:1].upper() + meaning[1:], f"Healthy: {healthy}" if healthy else ""]
        said = " ".join(f"{each}." for each in words if each)
        areas.append(
            f'<figure data-plot="{number}"><figcaption><b>{escaped_html(panel.name, 100)}</b> '
            f'<small>{escaped_html(unit)}</small></figcaption><div class="plot"></div><output></output>'
            f'<p class="soft">{escaped_html(said)}</p></figure>'
        )
    return plots, [list(map(list, each)) for each in times], areas


def _grouped(found: Sequence[Panel], areas: Sequence[str]) -> list[str]:
    return [
        f'<h2>{escaped_html(group)}</h2><div class="plots">{"".join(area for _, area in own)}</div>'
        for group, own in groupby(zip(found, areas, strict=True), key=lambda each: each[0].group)
    ]


def results(runs: Sequence[Run]) -> str:
    """Held-out examples before and after fitting, by sampler, and what an evaluation has measured."""
    accuracy, others, measured = [], [], []
    for run in runs:
        own = f"{run.name}, " if len(runs) > 1 else ""
        before, after = run.summary[BEFORE], run.summary[AFTER]
        for sampler in {**before, **after}:
            moments = [before.get(sampler, {}), after.get(sampler, {})]
            solved_by = [each.get("accuracy") for each in moments]
            for measure in {**moments[0], **moments[1]}:
                both = [each.get(measure) for each in moments]
                row = [f"{own}{sampler}", *map(_with_error, both)]
                if measure == "accuracy":
                    accuracy.append(row)
                # A reward may be the accuracy.
                elif both != solved_by:
                    others.append([f"{measure}, {row[0]}", *row[1:]])
        for each in run.results:
            stated = {"sampler": own + each["sampler"], "length": f"{each['length']:g}"}
            for fact in ("steps", "temperature"):
                of_all = run.facts.get(fact)
                stated[fact] = flat(of_all).get(each["sampler"], "") if isinstance(of_all, dict) else ""
            measured.append(stated | {name: _with_error(value) for name, value in each["means"].items()})
    names = dict.fromkeys([*("sampler", "length", "accuracy"), *(name for row in measured for name in row)])
    known = [
        name for name in names if name == "accuracy" or any(row.get(name) != row.get("accuracy") for row in measured)
    ]
    text = table(["accuracy, held-out examples", BEFORE, AFTER], accuracy) if accuracy else ""
    if others:
        text += f"<details><summary>Other measures</summary>{table(['', BEFORE, AFTER], others)}</details>"
    return text + (table(known, [[row.get(name, "") for name in known] for row in measured]) if measured else "")


def _with_error(value: Mapping[str, float] | None) -> str:
    return "" if value is None else "{mean:.3f} ± {standard_error:.3f}".format(**value)


def guards(runs: Sequence[Run]) -> str:
    """What guards have said."""
    rows = [[name, f"{step:.0f}", run.name, message] for run in runs for step, name, message in run.guards]
    if not rows:
        return '<p class="soft">No guard fired.</p>' if any(run.buffers for run in runs) else ""
    return table(["guard", "step", "run", "what it saw"], rows)


def prompts(run: Run, found: Sequence[Completion], items: Sequence[Mapping[str, Any]], *, several: bool) -> str:
    """How many prompts were never, sometimes and always solved, over time and by difficulty, and which never were."""
    if not found:
        return ""
    highest = max(each.reward or 0.0 for each in found)
    counts = {name: list(solved(own, highest).values()) for name, own in _slices(found).items()}
    kinds = ("never", "sometimes", "always")
    rows = [
        f'<tr><th scope="row">{escaped_html(name)}</th><td>{bar([(kind, own.count(kind)) for kind in kinds])}</td>'
        + "".join(f"<td>{own.count(kind)}</td>" for kind in kinds)
        + "</tr>"
        for name, own in counts.items()
    ]
    links = "".join(
        f'<li><button type="button" data-item="{number}">prompt {item["index"]}</button></li>'
        for number, item in enumerate(items)
        if item["kind"] == (f"{run.name}: never solved" if several else "never solved")
    )
    heading = escaped_html(f"Prompts of {run.name}" if several else "Prompts")
    known = {name for each in found[:100] for name in each.facts if name.rpartition("/")[2] in SOLVED}
    rule = f"Right means {' and '.join(sorted(known))} = 1." if known else f"Right means a reward of {highest:.4g}."
    head = "".join(f'<th scope="col">{name}</th>' for name in ("prompts", "", *kinds))
    return (
        f'<h2>{heading}</h2><p class="soft">Of how many prompts no, some or all rollouts were right. {rule}</p>'
        f'<div class="wide counts"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        + f"<details class='never'><summary>Never solved, the latest first</summary><ul>{links}</ul></details>"
        * bool(links)
    )


def _slices(found: Sequence[Completion]) -> dict[str, list[Completion]]:
    """Rollouts by the tenth of the run in which they were sampled, and by the difficulty of their prompts."""
    numbers = sorted({each.buffer for each in found})
    size = -(-len(numbers) // 10)
    whole = "all" if numbers[0] <= 0 else f"the last {len(numbers)} buffers"
    slices = {whole: list(found)}
    for start in range(0, len(numbers), size) if len(numbers) > 1 else ():
        tenth = numbers[start : start + size]
        name = f"buffers {tenth[0] + 1} to {tenth[-1] + 1}" if len(tenth) > 1 else f"buffer {tenth[0] + 1}"
        slices[name] = [each for each in found if each.buffer in tenth]
    for difficulty in sorted({each.difficulty for each in found} - {""}, key=lambda text: (len(text), text)):
        slices[f"difficulty {difficulty}"] = [each for each in found if each.difficulty == difficulty]
    return slices


def solved(found: Iterable[Completion], highest: float) -> dict[int, str]:
    """Of each prompt whether its rollouts were never, sometimes or always right."""
    right: dict[int, list[bool]] = {}
    for each in found:
        verdict = [value for name, value in each.facts.items() if name.rpartition("/")[2] in SOLVED]
        right.setdefault(each.prompt_index, []).append(min(verdict) == 1 if verdict else each.reward == highest)
    return {index: "always" if all(own) else "sometimes" if any(own) else "never" for index, own in right.items()}


def time_spent(runs: Sequence[Run]) -> str:
    """Where the time went: a bar for each run."""
    rows = []
    for run in runs:
        points = (*run.buffers, *run.validations)
        parts = {what: sum(point.values.get(f"time/{what}", 0.0) for point in points) for what in TIMES}
        total = max((point.seconds for point in points), default=0.0)
        # An older record has no time of validations.
        parts["other" if parts["validation"] else "validation and other"] = max(total - sum(parts.values()), 0.0)
        stated = [(what, seconds) for what, seconds in parts.items() if seconds]
        words = ", ".join(
            f'<span class="key {what.split()[0]}"></span>{what} {seconds:.0f} s' for what, seconds in stated
        )
        label = f"<b>{escaped_html(run.name)}</b>: " * (len(runs) > 1)
        rows += [f"<p>{label}{words}, in all {clock(total)}</p>{bar(stated)}"] if len(stated) > 1 else []
    return f"<h2>Where the time went</h2>{''.join(rows)}" if rows else ""


def bar(parts: Sequence[tuple[str, float]]) -> str:
    """One bar, whose parts lie behind each other."""
    total = sum(amount for _, amount in parts) or 1.0
    spans = (
        f'<span class="{name.split()[0]}" style="width: {100 * amount / total:.2f}%" title="{name}"></span>'
        for name, amount in parts
    )
    return f'<div class="stack" aria-hidden="true">{"".join(spans)}</div>'


def about(runs: Sequence[Run]) -> str:
    """What was run and on what, one column per run, with the options in which runs differ, folded."""
    columns = [_facts(run) for run in runs]
    names, headings = dict.fromkeys(name for own in columns for name in own), ["", *(run.name for run in runs)]
    parts = [table(headings, [[name, *(own.get(name, "") for own in columns)] for name in names])]
    others = differing(runs)
    if others[0]:
        rows = [[name, *(own[name] for own in others)] for name in others[0]]
        parts.append(f"<h3>Options that differ</h3>{table(headings, rows)}")
    for run in runs:
        if run.facts["configuration"]:
            content = json.dumps(run.facts["configuration"], indent=2, ensure_ascii=False)
            summary = f"Configuration of {escaped_html(run.name)}"
            parts.append(f"<details><summary>{summary}</summary><pre>{escaped_html(content, 100_000)}</pre></details>")
    unread = table(["run", "what is not what it should be", "how often"], left_out(runs))
    more = f"<h2>Left out</h2>{unread}" if left_out(runs) else ""
    return f"<h2>About</h2><details><summary>What was run, and its options</summary>{''.join(parts)}</details>{more}"


def _facts(run: Run) -> dict[str, str]:
    stated = {
        name: own for name, own in run.facts.items() if name not in ("configuration", "format", "versions", "results")
    }
    stated["versions"] = [f"{name} {value}" for name, value in run.facts["versions"].items()]
    return {name: value for name, value in (flat(stated) | {"directory": run.folder.resolve().name}).items() if value}


def left_out(runs: Sequence[Run]) -> list[list[str]]:
    """What files hold that is not what it should be, by run, with how often it is there."""
    return [[run.name, what, str(count)] for run in runs for what, count in run.unread.items() if count]


def viewer_items(
    runs: Sequence[Run], sampled: Sequence[Sequence[Completion]], count: int = COUNT
) -> list[dict[str, Any]]:
    """What can be chosen in the viewer: a held-out prompt with its completions of all runs, then of each run what an
    evaluation made of its prompts, and rollouts of prompts that were never solved, and the best and the worst.

    Runs share the bytes evenly. Items that would need more are left out.
    """
    several = len(runs) > 1
    kept: list[dict[str, Any]] = []
    together = _in_all_runs(runs)[:count]
    kind = "most changed" if any(len(own) > 1 for own in together) else "held out"
    chosen = [[(kind, own) for own in together]]
    for run, found in zip(runs, sampled, strict=True):
        chosen.append([("evaluated", own) for own in evaluated(run)[: 4 * count]] + list(_told(found, count)))
    for number, own in enumerate(chosen):
        left = ITEM_BYTES // len(chosen)
        for kind, completions in own:
            item = viewer_item(kind, completions, runs[number - 1].name if several and number else "")
            left -= (size := len(script_json(item)))
            kept += [item] if left >= 0 else []
            left += size * (left < 0)
    return kept


def _in_all_runs(runs: Sequence[Run]) -> list[tuple[Completion, ...]]:
    """Held-out prompts, each with the first run's completion of before and with the last one of each run."""
    own = [{(each[0].prompt_index, each[0].prompt): each for each in held_out(run)} for run in runs]
    if len(runs) == 1:
        return list(own[0].values())
    found = []
    for key in dict.fromkeys(key for each in own for key in each):
        have = [(run, each[key]) for run, each in zip(runs, own, strict=True) if key in each]
        last = [changed(each[-1], moment=f"{each[-1].moment}, {run.name}") for run, each in have]
        found.append((*have[0][1][:-1], *last))
    return found


def _told(found: Sequence[Completion], count: int) -> Iterator[tuple[str, tuple[Completion, ...]]]:
    """Rollouts with their heading: of prompts that were never solved, the latest first, and the best and the worst of
    different prompts.
    """
    groups: dict[int, list[Completion]] = {}
    for each in found:
        groups.setdefault(each.prompt_index, []).append(each)
    verdicts = solved(found, max((each.reward or 0.0 for each in found), default=0.0))
    never = [own for index, own in groups.items() if verdicts[index] == "never"]
    for own in sorted(never, key=lambda own: -own[-1].buffer)[: 3 * count]:
        times = Counter(each.text for each in own)
        different = {each.text: each for each in own}.values()
        named = [changed(each, moment=f"{each.moment}, {times[each.text]} of {len(own)}") for each in different]
        yield "never solved", tuple(named[-4:])
    for kind, sign in (("best", -1), ("worst", 1)):
        ends = [min(own, key=lambda each: (sign * (each.reward or 0.0), -each.buffer)) for own in groups.values()]
        for each in sorted(ends, key=lambda each: (sign * (each.reward or 0.0), -each.buffer))[: count // 2]:
            yield kind, (each,)


def viewer_item(kind: str, completions: Sequence[Completion], run: str = "") -> dict[str, Any]:
    """One prompt with completions beside each other. The words of the kind are a heading in the list of items."""
    first, several = completions[0], len(completions) > 2
    rewards = ["?" if each.reward is None else f"{each.reward:.4g}" for each in completions]
    verdicts = [each.verdict.partition(",")[0] for each in completions]
    said = ", ".join(verdicts) if any(verdicts) else f"reward {(', ' if several else ' to ').join(rewards)}"
    title = f"{run + ': ' if run else ''}{kind}, prompt {first.prompt_index}, {said}"
    return {
        "kind": f"{run}: {kind}" if run else kind,
        "title": shown(title, 200),
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
        + "".join(f"<td{' class=short' * (len(cell) < 20)}>{escaped_html(cell, 1000)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
