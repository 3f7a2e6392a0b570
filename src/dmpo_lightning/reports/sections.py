"""The parts of a report that are tables: what was run, before and after, what the guards saw."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dmpo_lightning.reports.run import Run, number, of_kind
from dmpo_lightning.reports.shown import escaped_html, table

MOST_ROWS = 200


def about(runs: Sequence[Run]) -> str:
    """What was run and on what, one column per run, with the options in which runs differ."""
    columns = [_facts(run) for run in runs]
    rows = _rows(columns)
    parts = ["<h2>What was run</h2>", table(["", *(run.name for run in runs)], rows)]
    options = [_flat(of_kind(run.facts.get("configuration"), dict)) for run in runs]
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
    versions = of_kind(run.facts.get("versions"), dict)
    stated["versions"] = [f"{name} {value}" for name, value in versions.items()]
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
    return [[name, *(column.get(name, "") for column in columns)] for name in names][:MOST_ROWS]


def before_and_after(runs: Sequence[Run]) -> str:
    """The table of ``summary.json``: held-out examples, each sampler before and after fitting."""
    rows, components = [], dict.fromkeys(name for run in runs for _, _, measures in _results(run) for name in measures)
    for run in runs:
        for moment, sampler, measures in _results(run):
            label = f"{moment}, {sampler}"
            cells = [_with_error(measures.get(name)) for name in components]
            rows.append([f"{run.name}: {label}" if len(runs) > 1 else label, *cells])
    if not rows:
        return ""
    return f"<h2>Before and after</h2>{table(['held-out examples', *components], rows)}"


def _results(run: Run) -> list[tuple[str, str, Mapping[str, Any]]]:
    return [
        (moment, str(sampler), of_kind(measures, dict))
        for moment in ("before", "after")
        for sampler, measures in of_kind(run.summary.get(moment), dict).items()
    ]


def _with_error(measure: Any) -> str:
    mean, error = (number(of_kind(measure, dict).get(name)) for name in ("mean", "standard_error"))
    if mean is None:
        return ""
    return f"{mean:.3f}" if error is None else f"{mean:.3f} ± {error:.3f}"


def guards(runs: Sequence[Run]) -> str:
    """What guards have said, where there were any events."""
    rows = [
        [*([run.name] if len(runs) > 1 else []), "" if step is None else f"{step:.0f}", name, message]
        for run in runs
        for step, name, message in run.guards
    ]
    if not rows:
        return ""
    more = f"<p>{len(rows) - MOST_ROWS} more are in guards.jsonl.</p>" if len(rows) > MOST_ROWS else ""
    headings = [*(["run"] if len(runs) > 1 else []), "step", "guard", "what it saw"]
    return f"<h2>Guards</h2>{table(headings, rows[:MOST_ROWS])}{more}"
