"""Completions of held-out examples before and after a fit, token by token, for the viewer of a report."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dmpo_lightning.callbacks.rollout_records import TokenTexts, token_facts
from dmpo_lightning.evaluation.batch import EvaluatedBatch
from dmpo_lightning.reports.lines import encoded, finite, read_lines, replace
from dmpo_lightning.rollout import PromptBatch
from dmpo_lightning.terminal import escaped


def example_records(
    evaluated: EvaluatedBatch, batch: PromptBatch, texts: TokenTexts, moment: str
) -> list[dict[str, Any]]:
    """One record for the first completion of each example of a batch, which is that of the evaluation."""
    prompts = batch.to("cpu")[~batch.is_filler.cpu()]
    kept = [row[mask].tolist() for row, mask in zip(prompts.prompt_ids, prompts.prompt_mask, strict=True)]
    shown = texts.tokenizer.batch_decode(kept, skip_special_tokens=True)
    samples, several = evaluated.samples, len(evaluated.completions[0]) if evaluated.completions else 1
    facts = token_facts(
        texts, samples.completion_ids[::several], samples.reveal_step[::several], samples.log_prob[::several]
    )
    scores = evaluated.values.scores
    return [
        {
            "moment": moment,
            "prompt_index": index,
            "reward": float(scores["reward"][row, 0]),
            "components": {
                name: float(value[row, 0])
                for name, value in scores.items()
                if name != "reward" and not value[row, 0].isnan()
            },
            "prompt": shown[row],
            "completion": evaluated.completions[row][0],
            **facts.of(row),
        }
        for row, index in enumerate(evaluated.prompt_index)
    ]


def write_examples(path: Path, moment: str, records: Sequence[dict[str, Any]]) -> None:
    """Puts the records of one moment into the file. Those of before a fit begin it anew, others are added to them.

    A file that cannot be written ends no run.
    """
    earlier = [] if moment == "before" else [each for each in read_lines(path) if each.get("moment") == "before"]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, b"".join(encoded(finite(each)) for each in (*earlier, *records)))
    except OSError as error:
        warnings.warn(escaped(f"The run goes on without the examples of {path}: {error}."), stacklevel=2)
