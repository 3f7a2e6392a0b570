"""What a run says of its length when it starts is what then happens."""

import logging

import pytest
from dmpo_runs import loader, module, trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")
    return caplog


@pytest.mark.parametrize(
    "flags",
    [
        {"max_steps": 10},
        {"max_steps": 7, "accumulate_grad_batches": 2},
        {"max_epochs": 2, "limit_train_batches": 6},
        {"max_steps": 9, "limit_train_batches": 5, "accumulate_grad_batches": 2},
    ],
)
def test_the_steps_buffers_and_rollouts_announced_are_those_that_come(tmp_path, said, flags):
    run, fit = module(), trainer(tmp_path, **flags)
    fit.fit(run, loader())
    whole = f"{fit.global_step} optimizer steps, {run.buffers_collected} buffers, {run.rollouts_seen} rollouts."
    assert said.text.count("One buffer: prompts 2 x ranks 1 x group 4 = 8 rollouts.") == 1
    buffers = 3 if "limit_train_batches" not in flags else 2
    assert f"Prompts: 6. Buffers per epoch: {buffers}.\nWhole run: {whole}" in said.text


def test_an_accumulation_that_changes_leaves_the_end_open(tmp_path, said):
    fit = trainer(tmp_path, max_epochs=1, callbacks=[GradientAccumulationScheduler({0: 2, 1: 1})])
    fit.fit(module(), loader())
    assert "micro-batch 4 x accumulation 2 x ranks 1 = 8 rollouts.\nOptimizer steps per buffer: 2 (passes: 2)" in (
        said.text
    )
    assert "Whole run" not in said.text
