"""Which optimizers and schedulers a run takes, and what is said of the others."""

import pytest
from dmpo_runs import Recorder, loader, module, trainer
from lightning.pytorch.callbacks import BackboneFinetuning, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau
from torch.optim import LBFGS, SGD, lr_scheduler


class LineSearch(SGD):
    """Asks for the loss twice, which its signature does not tell."""

    def step(self, closure=None):
        closure()
        return super().step(closure)


class OwnLBFGS(LBFGS):
    pass


def fit(tmp_path, *, ckpt_path=None, validation=True, callbacks=(), epochs=None, steps=-1, flags=None, **options):
    run, record = module(**options), Recorder()
    fitted = trainer(
        tmp_path,
        max_steps=steps,
        max_epochs=epochs,
        callbacks=[record, *callbacks],
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks),
        **flags or {},
    )
    fitted.fit(run, loader(), loader(3, shuffle=False) if validation else None, ckpt_path=ckpt_path, weights_only=True)
    return run, record, fitted


@pytest.mark.parametrize("optimizer", [LBFGS, OwnLBFGS, LineSearch])
def test_an_optimizer_that_computes_the_loss_several_times_per_step_is_refused(tmp_path, optimizer):
    with pytest.raises(ValueError, match=f"`optimizer` {optimizer.__name__} computes the loss several times per step"):
        fit(tmp_path, steps=2, optimizer=lambda parameters: optimizer(parameters, lr=1e-3))


def ending(name, length=4):
    """A scheduler of each kind that raises an error behind so many steps."""
    rates = [1.0] * (length + 1)
    return {
        "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=length),
        "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: rates[step]),
    }[name]


@pytest.mark.parametrize(
    ("name", "length", "steps"),
    [("OneCycleLR", {"steps": 8}, 8), ("LambdaLR", {"epochs": 1}, 12)],  # 3 buffers x 4 uses
)
def test_a_schedule_that_ends_before_the_run_is_refused_before_the_first_step(tmp_path, name, length, steps):
    with pytest.raises(ValueError, match=f"`lr_scheduler` {name} ends after 4 optimizer steps.* has {steps} "):
        fit(tmp_path, **length, lr_scheduler=ending(name))
    assert fit(tmp_path, steps=4, lr_scheduler=ending(name))[2].global_step == 4


@pytest.mark.slow
def test_a_schedule_is_measured_anew_where_a_resumed_run_is_longer(tmp_path):
    save = ModelCheckpoint(tmp_path, filename="end", every_n_train_steps=4)
    fit(tmp_path, steps=4, lr_scheduler=ending("OneCycleLR"), callbacks=[save])
    end = tmp_path / "end.ckpt"
    with pytest.raises(ValueError, match="ends after 4 optimizer steps, but the run has 6"):
        fit(tmp_path, steps=6, lr_scheduler=ending("OneCycleLR"), ckpt_path=end)
    with pytest.warns(UserWarning, match="total_steps: 4 -> 6"):
        _, record, _ = fit(tmp_path, steps=6, lr_scheduler=ending("OneCycleLR", 6), ckpt_path=end)
    assert len(record.learning_rates) == 2


def plateau(monitor="val/sampled/reward", **options):
    return lambda optimizer: ReduceLROnPlateau(
        optimizer, monitor, **{"patience": 0, "mode": "max", "factor": 0.1} | options
    )


@pytest.mark.slow
def test_a_plateau_lowers_the_rate_behind_validations_that_are_no_better(tmp_path):
    _, record, _ = fit(tmp_path, steps=6, lr_scheduler=plateau(), flags={"val_check_interval": 2})
    # The first validation, behind step 2, sets the mark.
    assert record.learning_rates == pytest.approx([1e-3, 1e-3, 1e-3, 1e-3, 1e-4, 1e-4])


@pytest.mark.slow
def test_a_plateau_goes_on_where_it_was(tmp_path):
    options = {"lr_scheduler": plateau(), "flags": {"val_check_interval": 2}}
    _, whole, _ = fit(tmp_path, steps=8, **options)
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    fit(tmp_path, steps=3, **options, callbacks=[save])
    _, rest, fitted = fit(tmp_path, steps=8, **options, ckpt_path=tmp_path / "step=3.ckpt")
    assert rest.learning_rates == whole.learning_rates[3:]
    fitted.save_checkpoint(tmp_path / "later.ckpt")
    with pytest.warns(UserWarning, match="lr_scheduler.factor: 0.1 -> 0.5"):
        _, rest, _ = fit(
            tmp_path,
            steps=12,
            lr_scheduler=plateau(factor=0.5),
            flags={"val_check_interval": 2},
            ckpt_path=tmp_path / "later.ckpt",
        )
    assert rest.learning_rates == pytest.approx([1e-6, 1e-6, 5e-7, 5e-7])


@pytest.mark.parametrize(
    ("scheduler", "validation", "message"),
    [
        (lr_scheduler.ReduceLROnPlateau, True, "take that of lightning.pytorch.cli with `monitor`"),
        (
            plateau("val/sampled/accurracy"),
            True,
            "looks at 'val/sampled/accurracy', which is not logged; .*val/sampled/reward",
        ),
        (plateau(), False, "looks at a value after each validation: .* in a run that validates"),
    ],
)
def test_a_plateau_without_a_value_is_refused(tmp_path, scheduler, validation, message):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, steps=2, lr_scheduler=scheduler, validation=validation, flags={"val_check_interval": 1})


@pytest.mark.parametrize("kind", [BackboneFinetuning, LearningRateFinder])
def test_a_callback_that_needs_what_a_policy_has_not_is_refused(tmp_path, kind):
    with pytest.raises(ValueError, match=f"{kind.__name__} .*or leave it out"):
        fit(tmp_path, steps=1, callbacks=[kind()])
