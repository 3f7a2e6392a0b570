"""The time left of a run: replayed from the records of whole demos, and in cases that can be worked out by hand."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from dmpo_lightning.callbacks.clock import Clock, validations_to_come

RECORDS = json.loads((Path(__file__).parent / "golden/demo_seconds.json").read_text())
"""Of ``metrics.jsonl`` of demos: kind, step and seconds of each line, with those of sampling or validation.

The last line is the evaluation behind the last step. "busy" is without.
"""
SEEDS = ("seed 0", "seed 1", "seed 2")
STEPS = 200


def replayed(record):
    """Step, time left as the clock says, and as it was: at the end of each buffer and of each validation."""
    *record, (_, _, end, _) = record
    validations = sum(kind == "validation" for kind, *_ in record)
    # Two samplers of twenty denoising steps each, for 256 puzzles and for 1024.
    clock = Clock(STEPS, validations, validation=256 * 2 * 20, ending=1024 * 2 * 20)
    said, last, noted, since = [], 0, 0, 0
    for kind, step, now, seconds in record:
        if kind == "validation":
            clock.note_validation(seconds)
            since += seconds
        else:
            clock.note_buffer(step - last, now - noted - since, sampled=seconds, work=256 * 20)
            last, noted, since = step, now, 0
        said.append((step, clock.left(last) - (now - noted - since), end - now))
    return said


@pytest.mark.parametrize("demo", SEEDS)
def test_the_time_left_of_a_demo_is_within_a_fifth_from_a_tenth_of_it_on(demo):
    said = replayed(RECORDS[demo])
    errors = {step: left / true - 1 for step, left, true in said if step >= STEPS / 10}
    assert max(map(abs, errors.values())) < 0.2, errors
    # The first buffer, which warms up, is all that is known then.
    assert said[0][1] == pytest.approx(said[0][2], rel=0.6)


@pytest.mark.parametrize("demo", SEEDS)
def test_the_end_does_not_jump_where_a_buffer_or_a_validation_ends(demo):
    said = [each for each in replayed(RECORDS[demo]) if each[0] >= STEPS / 10]
    jumps = [(then - now) - (left - later) for (_, left, then), (_, later, now) in pairwise(said)]
    assert max(abs(jump) / true for jump, (_, _, true) in zip(jumps, said, strict=False)) < 0.12


def test_a_busy_hour_is_forgotten():
    """Another job took half of the machine from step 72 to 112."""
    errors = [left / true - 1 for step, left, true in replayed(RECORDS["busy"]) if step > 160]
    assert max(map(abs, errors)) < 0.2


def test_nothing_is_known_before_the_first_buffer():
    assert Clock(10, 2, validation=4.0).left(0) is None


def test_training_validations_and_the_ending_add_up():
    clock = Clock(steps=100, validations=3, validation=40.0, ending=80.0)
    clock.note_buffer(10, 20.0, sampled=5.0, work=10.0)
    # 90 steps of 2 s, 3 validations of 40 times half a second, and 80 times as long.
    assert clock.left(10) == 180 + 60 + 40
    # A validation that was made knows better, and the ending follows it.
    clock.note_validation(30.0)
    assert clock.left(10) == 180 + 2 * 30 + 60
    assert clock.left(100) == 2 * 30 + 60


def test_the_first_buffer_counts_until_there_is_another_and_late_ones_count_more():
    clock = Clock(steps=100)
    clock.note_buffer(10, 100.0)
    assert clock.left(90) == 100
    clock.note_buffer(10, 20.0)
    assert clock.left(90) == 20
    # A tenth of the run halves what was known: (20 / 2 + 50) / (10 / 2 + 10) for a step.
    clock.note_buffer(10, 50.0)
    assert clock.left(90) == 40


class Counts(Callback):
    """The validations that are to come at the start, and those that came."""

    def __init__(self):
        self.made = 0

    def on_train_start(self, trainer, pl_module):
        self.expected = validations_to_come(trainer, int(trainer.estimated_stepping_batches))

    def on_validation_end(self, trainer, pl_module):
        self.made += 1


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 7, "max_epochs": -1, "val_check_interval": 2, "check_val_every_n_epoch": None},
        {"max_steps": 12, "max_epochs": -1, "val_check_interval": 5, "accumulate_grad_batches": 2}
        | {"check_val_every_n_epoch": None},
        {"max_epochs": 2, "val_check_interval": 0.5},
        {"max_epochs": 5, "check_val_every_n_epoch": 2, "val_check_interval": 3},
        {"max_epochs": 2, "limit_val_batches": 0},
    ],
)
def test_as_many_validations_are_foreseen_as_are_made(tmp_path, options):
    counts, quiet = Counts(), {"num_sanity_val_steps": 0, "enable_progress_bar": False, "enable_checkpointing": False}
    flags = {"limit_train_batches": 8, "limit_val_batches": 1, "logger": False, **quiet}
    Trainer(default_root_dir=tmp_path, accelerator="cpu", callbacks=[counts], **flags | options).fit(BoringModel())
    assert counts.made == counts.expected
