"""The completions of a report as its viewer gets them, within a bound of bytes."""

from collections.abc import Sequence
from typing import Any

from dmpo_lightning.reports.rollouts import Kind, chosen
from dmpo_lightning.reports.run import Completion, Run
from dmpo_lightning.reports.shown import rounded, script_json, shown

COUNT = 12
"""Completions of each kind and run, at most."""
MOST_BYTES = 2_000_000
"""Of all completions of a page."""
MOST_TOKENS, LONGEST_TOKEN = 4096, 100


def viewer_items(runs: Sequence[Run], count: int = COUNT) -> list[dict[str, Any]]:
    """What can be chosen in the viewer. One item shows one prompt with one completion, or with two beside each other.

    Runs share the bytes evenly. Items that would need more are left out.
    """
    items: list[dict[str, Any]] = []
    for run in runs:
        left = MOST_BYTES // len(runs)
        for kind, pair in _pairs(chosen(run, count)):
            item = _item(run.name if len(runs) > 1 else "", kind, pair)
            size = len(script_json(item))
            if size <= left:
                left -= size
                items.append(item)
    for number, item in enumerate(items):
        item["title"] = f"{number + 1}. {item['title']}"
    return items


def _pairs(found: list[tuple[Kind, Completion]]) -> list[tuple[Kind, list[Completion]]]:
    """Puts neighbours of one kind and prompt together."""
    pairs: list[tuple[Kind, list[Completion]]] = []
    for kind, each in found:
        last = pairs[-1] if pairs else None
        if last is not None and last[0] == kind and len(last[1]) == 1 and _prompt(last[1][0]) == _prompt(each):
            last[1].append(each)
        else:
            pairs.append((kind, [each]))
    return pairs


def _prompt(each: Completion) -> tuple[int, str]:
    return each.prompt_index, each.prompt


def _item(run: str, kind: Kind, pair: list[Completion]) -> dict[str, Any]:
    rewards = " to ".join("?" if each.reward is None else f"{each.reward:.4g}" for each in pair)
    title = f"{kind}, prompt {pair[0].prompt_index}, reward {rewards}"
    return {
        "title": shown(f"{run}: {title}" if run else title, 200),
        "about": shown(f"{run + ', ' if run else ''}prompt {pair[0].prompt_index} of its split, {kind}", 200),
        "prompt": shown(pair[0].prompt),
        "panes": [_pane(each) for each in pair],
    }


def _pane(each: Completion) -> dict[str, Any]:
    moment = each.moment or ("" if each.iteration is None else f"in buffer {each.iteration}")
    stated = {} if each.reward is None else {"reward": each.reward}
    facts = {**stated, **each.components, **each.facts}
    cut = len(each.tokens) - MOST_TOKENS
    return {
        "title": shown(f"Completion {moment}".strip(), 100),
        "about": shown(
            ", ".join(f"{name} {value:.4g}" for name, value in facts.items())
            + (f"; {cut} more tokens" if cut > 0 else ""),
            2000,
        ),
        "text": "" if each.tokens else shown(each.text),
        "tokens": [shown(token, LONGEST_TOKEN) for token in each.tokens[:MOST_TOKENS]],
        "steps": list(each.steps[:MOST_TOKENS]),
        "confidences": [rounded(value) for value in each.confidences[:MOST_TOKENS]],
    }
