"""A benchmark of your own: data, prompt and score. YAML names it by its dotted path; nothing needs registering.

Run it from this folder: `dmpo-lightning fit --config custom_task.yaml` (or validate, test, predict).
"""

from dmpo_lightning import Task

SPLITS = {"train": range(52), "validation": range(52, 62), "test": range(62, 72)}


class Favourite(Task):
    """Write the digit that the prompt repeats, and little else."""

    accuracy = "correct"
    reward_weights = {"share": 1.0}

    def examples(self, split):
        pairs = [{"digit": str(place % 4 + 1), "times": place // 4 + 1} for place in range(72)]
        return [pairs[place * 7 % 72] for place in SPLITS[split]]

    def prompt(self, example):
        return example["digit"] * example["times"]

    def score(self, example, completion):
        share = completion.count(example["digit"]) / max(len(completion), 1)
        return {"share": share, "correct": float(share > 0.5)}
