"""Masked-diffusion supervised fine-tuning."""

import pytest
import torch
from dmpo_runs import trainer
from lightning.pytorch.callbacks import BatchSizeFinder

from dmpo_lightning import (
    Backbone,
    DemonstrationsDataModule,
    LatinSquareDemonstrations,
    MaskedSFT,
    SavePretrained,
    load_model,
)


def run(tmp_path, max_steps, **options):
    task = LatinSquareDemonstrations(size=64, corruption=0.0)
    data = DemonstrationsDataModule(task, tokenizer="sudoku_tiny", completion_length=20, batch_size=16)
    sft = MaskedSFT(
        Backbone("sudoku_tiny", random_weights=True),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
        **options,
    )
    fitted = trainer(
        tmp_path, max_steps=max_steps, callbacks=[SavePretrained(str(tmp_path / "model"))], limit_val_batches=2
    )
    fitted.fit(sft, data)
    return sft, float(fitted.validate(sft, data, verbose=False)[0]["val/loss"])


def test_the_validation_loss_falls_and_the_saved_folder_is_the_trained_model(tmp_path):
    _, before = run(tmp_path, 1)
    sft, after = run(tmp_path, 60)
    assert after < before - 1
    for name, value in load_model(str(tmp_path / "model")).state_dict().items():
        assert torch.equal(value, sft.policy.model.state_dict()[name])


def test_odd_antithetic_replicates_are_an_error():
    with pytest.raises(ValueError, match="even when `antithetic`"):
        MaskedSFT("sudoku_tiny", replicates=3)


def test_a_completion_that_does_not_fit_is_named(tmp_path):
    data = DemonstrationsDataModule(
        LatinSquareDemonstrations(size=4), tokenizer="sudoku_tiny", completion_length=18, batch_size=2
    )
    with pytest.raises(ValueError, match=r"completion of row 0.* has 19 tokens"):
        data.setup("fit")


def small_data(batch_size):
    task = LatinSquareDemonstrations(size=16, corruption=0.0)
    return DemonstrationsDataModule(task, tokenizer="sudoku_tiny", completion_length=20, batch_size=batch_size)


def test_the_batch_size_finder_enlarges_the_batches_of_the_datamodule(tmp_path):
    sft, data = MaskedSFT(Backbone("sudoku_tiny", random_weights=True)), small_data(2)
    run = trainer(tmp_path, max_steps=2, callbacks=[BatchSizeFinder(steps_per_trial=1, max_trials=2)])
    run.fit(sft, data)
    assert (data.batch_size, run.global_step) == (4, 2)
