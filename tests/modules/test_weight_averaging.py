"""Lightning's averages of weights: they resume, and leave alone what is not trained."""

from itertools import product

import pytest
import torch
from dmpo_runs import loader, module, trainer, weights
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)

from dmpo_lightning import LoRA
from dmpo_lightning.checkpoints.export import export_checkpoint
from tiers import slow_unless

CALLBACKS = {
    "ema": EMAWeightAveraging,
    "swa": lambda: StochasticWeightAveraging(swa_lrs=1e-4, swa_epoch_start=1),
}
MODULES = {
    "whole": {},
    "adapted": {"adapter": LoRA(r=4)},
    "refreshed": {"adapter": LoRA(r=4), "reference_refresh_interval": 1},
    "whole, refreshed": {"reference_refresh_interval": 1},
}


@pytest.mark.parametrize(
    ("callback", "kind"),
    slow_unless(lambda *case: case == ("ema", "adapted"), product(CALLBACKS, MODULES)),
)
def test_an_averaged_run_resumes_as_if_it_had_not_ended(tmp_path, callback, kind):
    whole, again = module(**MODULES[kind]), module(**MODULES[kind])
    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    flags = {"max_epochs": 3, "enable_checkpointing": True}
    trainer(tmp_path, callbacks=[CALLBACKS[callback](), save], **flags).fit(whole, loader())
    rest = trainer(tmp_path, max_epochs=3, callbacks=[CALLBACKS[callback]()])
    rest.fit(again, loader(), ckpt_path=tmp_path / "epoch=1.ckpt", weights_only=True)
    assert torch.equal(weights(again), weights(whole))


@pytest.mark.parametrize("kind", ["adapted", "refreshed", "whole"])
def test_checkpoints_of_averages_hold_no_frozen_weights_and_are_exported(tmp_path, kind):
    made = module(**MODULES[kind])
    run = trainer(tmp_path, max_steps=6, callbacks=[EMAWeightAveraging()])
    run.fit(made, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert set(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]) == set(made.state_dict())
    trained = sum(weight.requires_grad for weight in made.parameters())
    assert export_checkpoint(tmp_path / "a.ckpt", tmp_path / "out", merge=kind != "whole") == trained


@pytest.mark.parametrize("callback", [pytest.param(WeightAveraging, marks=pytest.mark.slow), EMAWeightAveraging])
def test_averages_leave_frozen_weights_and_tables_as_they_are(tmp_path, callback):
    """A moving average of an unchanged weight drifts by rounding, and minus infinity less itself is NaN."""
    made = module(adapter=LoRA(r=4), random_weights=True)
    frozen = {name: weight.clone() for name, weight in made.named_parameters() if not weight.requires_grad}
    tables = {name: table.clone() for name, table in made.named_buffers()}
    assert any(table.isinf().any() for table in tables.values())
    trainer(tmp_path, max_steps=40, callbacks=[callback()]).fit(made, loader())
    assert all(torch.equal(made.get_parameter(name), weight) for name, weight in frozen.items())
    assert all(torch.equal(made.get_buffer(name), table) for name, table in tables.items())
