"""A real run with everything that a report shows, and text that wants to be more than text."""

import shutil

from dmpo_runs import loader, module, trainer
from lightning.pytorch import Callback, LightningDataModule

from dmpo_lightning import BeforeAfterReport, ConfidenceSampler, RunRecorder
from dmpo_lightning.reports.lines import append, encoded

HOSTILE = (
    "<script>window.hit = 1</script>",
    "</script><img src=x onerror='window.hit = 1'>",
    "<!--<script>",
    "\x00 null",
    "\u202eright to left\u2066",
    "\u2028line\u2029ends",
    "half \ud800 surrogate",
    "$\\frac{1}{0}$ &amp; ]]>",
    "x" * 1_000_000,
)


class Digits(LightningDataModule):
    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader(3, shuffle=False)

    def test_dataloader(self):
        return loader(3, shuffle=False)


class Looks(Callback):
    """Keeps the page of the first validation, as somebody sees it who looks meanwhile."""

    def __init__(self, folder):
        self.folder = folder

    def on_validation_end(self, trainer, pl_module):
        if not (self.folder / "live.html").exists():
            shutil.copy(self.folder / "report.html", self.folder / "live.html")


_MADE = []


def made_run(factory):
    """One run for all tests of a process, which change none of its files."""
    if not _MADE:
        folder = factory.mktemp("runs") / "version_0"
        make_run(folder)
        _MADE.append(folder)
    return _MADE[0]


def make_run(folder):
    samplers = {"temperature_1": ConfidenceSampler(denoising_steps=4), "greedy": ConfidenceSampler(temperature=0.0)}
    callbacks = [BeforeAfterReport(samplers), RunRecorder(), Looks(folder)]
    run = trainer(folder, max_steps=8, max_epochs=-1, val_check_interval=4, callbacks=callbacks)
    run.fit(module(), datamodule=Digits())


def add_hostile(folder):
    """Rollouts of all shapes whose reward is so high, or so low, that they are shown, and a guard that saw one."""
    for number, text in enumerate(HOSTILE):
        record = {"buffer": 9, "prompt_index": 100 + number, "rollout": 0, "reward": 1000.0 - 2000 * (number % 2)}
        record |= {"prompt": text, "completion": text, "components": {text[:50]: 1.0}, "weight": float(number)}
        if number != 2:
            tokens = [text, "", text[:50]]
            record |= {"tokens": tokens, "reveal_step": [1, 0, -1], "confidence": [0.5, 1.0, 0.0]}
        append(folder / "rollouts/rank0-000009.jsonl", encoded(record))
        event = {"kind": "guard", "step": number, "name": text[:30], "message": text}
        append(folder / "metrics.jsonl", encoded(event))
    values = {f"{text[:40]}/{text[:40]}": 1.0 for text in HOSTILE}
    point = {"kind": "buffer", "buffer": 9, "step": 9, "rollouts": 9, "seconds": 9, "values": values}
    append(folder / "metrics.jsonl", encoded(point))
