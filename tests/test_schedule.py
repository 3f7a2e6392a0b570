"""Rollouts, optimizer steps and buffers of a run, counted by hand."""

from dataclasses import replace

import pytest

from dmpo_lightning.schedule import RunLength, Schedule

ONE = Schedule(group_size=8, prompts_per_buffer=3, micro_batch_size=4, num_iterations=5, accumulation=2, ranks=2)
"""24 rollouts are 6 micro-batches, 30 training steps and 15 optimizer steps per buffer."""
RUN = RunLength(ONE, prompts=20, batches_per_epoch=4 * 30, max_steps=150)
"""6 prompts at a time, of 20: 4 buffers and 60 optimizer steps per epoch."""


def test_several_ranks_share_buffers_and_optimizer_steps():
    assert (RUN.schedule.buffer_rollouts, RUN.schedule.step_rollouts) == (3 * 8, 4 * 2 * 2)
    assert (RUN.buffers_per_epoch, RUN.optimizer_steps, RUN.buffers) == (4, 150, 10)
    assert RUN.to_text().splitlines() == [
        "One buffer: prompts 3 x ranks 2 x group 8 = 48 rollouts.",
        "One optimizer step: micro-batch 4 x accumulation 2 x ranks 2 = 16 rollouts.",
        "Optimizer steps per buffer: 15 (passes: 5).",
        "Prompts: 20. Buffers per epoch: 4.",
        "Whole run: 150 optimizer steps, 10 buffers, 480 rollouts.",
    ]


@pytest.mark.parametrize(
    ("limits", "steps", "buffers"),
    [
        ({"max_steps": 151}, 151, 11),  # the last buffer is used once
        ({"max_steps": None, "max_epochs": 3}, 180, 12),
        ({"max_steps": 100, "max_epochs": 3}, 100, 7),
        ({"max_steps": 1000, "max_epochs": 1}, 60, 4),
        ({"max_steps": 0}, 0, 0),
        # a limit cuts each epoch in its second buffer, and the last optimizer step after 1 of 2 micro-batches
        ({"batches_per_epoch": 45, "max_steps": 46}, 46, 4),
        ({"batches_per_epoch": 45, "max_steps": 47}, 47, 5),
    ],
)
def test_a_run_ends_at_its_first_limit_and_each_epoch_starts_with_a_new_buffer(limits, steps, buffers):
    run = replace(RUN, **limits)
    assert (run.optimizer_steps, run.buffers) == (steps, buffers)


def test_a_run_without_limit_has_no_totals():
    run = replace(RUN, max_steps=None)
    assert (run.optimizer_steps, run.buffers) == (None, None)
    assert run.to_text().splitlines()[-1] == "Prompts: 20. Buffers per epoch: 4."
