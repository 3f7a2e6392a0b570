"""On a resume this run's options of optimizer and scheduler win over the stored ones, with a warning."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dmpo_runs import Recorder, loader, module, trainer, weights
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import SGD, AdamW, lr_scheduler

from dmpo_lightning.modules.options import configured_options, differences, take_over
from tiers import slow_unless

STOP, STEPS = 3, 8


def adamw(**options):
    return lambda parameters: AdamW(parameters, **({"lr": 1e-3} | options))


def linear(total_iters=10, start=0.5):
    return lambda optimizer: lr_scheduler.LinearLR(optimizer, start_factor=start, total_iters=total_iters)


def warm_up_and_cosine(length=9):
    def schedule(optimizer):
        parts = [linear(2)(optimizer), lr_scheduler.CosineAnnealingLR(optimizer, length, eta_min=1e-4)]
        return lr_scheduler.SequentialLR(optimizer, parts, milestones=[2])

    return schedule


def one_cycle(peak=1e-2):
    return lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=peak, total_steps=20)


def whole(folder, **options):
    """Learning rates and weights of an uninterrupted run, which leaves a checkpoint after ``STOP`` steps."""
    run, record = module(**options), Recorder()
    save = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=STOP, save_top_k=-1)
    trainer(folder, max_steps=STEPS, callbacks=[record, save], enable_checkpointing=True).fit(run, loader())
    return record, run, folder / f"step={STOP}.ckpt"


def resumed(folder, checkpoint, **options):
    """The same of a run that continues from a checkpoint; and its Trainer."""
    run, record = module(**options), Recorder()
    fit = trainer(folder, max_steps=STEPS, callbacks=[record])
    fit.fit(run, loader(), ckpt_path=checkpoint, weights_only=True)
    return record, run, fit


SCHEDULES = {
    "another learning rate": ((adamw(), linear()), (adamw(lr=2e-3), linear()), "optimizer.0.lr: 0.001 -> 0.002"),
    "another length": ((adamw(), linear()), (adamw(), linear(20)), "lr_scheduler.total_iters: 10 -> 20"),
    "no schedule": ((adamw(), linear()), (adamw(), None), "lr_scheduler: .* -> None"),
    "a new schedule": ((adamw(), None), (adamw(), linear()), "lr_scheduler: None -> "),
    "a constant one": ((adamw(), None), (adamw(lr=2e-3), None), "optimizer.0.lr: 0.001 -> 0.002"),
    "nested": (
        (adamw(), warm_up_and_cosine()),
        (adamw(), warm_up_and_cosine(5)),
        "lr_scheduler._schedulers.1.T_max: 9 -> 5",
    ),
    "one that moves betas too": (
        (adamw(), one_cycle()),
        (adamw(), one_cycle(2e-2)),
        "optimizer.0.max_lr: 0.01 -> 0.02",
    ),
}


@pytest.mark.parametrize("name", slow_unless(lambda name: name in ("nested", "one that moves betas too"), SCHEDULES))
def test_the_learning_rate_goes_on_as_if_this_runs_schedule_had_been_there_from_the_start(tmp_path, name):
    (optimizer, scheduler), (other, other_scheduler), named = SCHEDULES[name]
    _, _, checkpoint = whole(tmp_path / "stored", optimizer=optimizer, lr_scheduler=scheduler)
    expected, _, _ = whole(tmp_path / "wanted", optimizer=other, lr_scheduler=other_scheduler)
    with pytest.warns(UserWarning, match=named):
        record, _, fit = resumed(tmp_path, checkpoint, optimizer=other, lr_scheduler=other_scheduler)
    assert record.learning_rates == expected.learning_rates[STOP:]
    fit.save_checkpoint(tmp_path / "end.ckpt")
    end = torch.load(tmp_path / "end.ckpt", weights_only=True)
    uninterrupted = torch.load(tmp_path / "wanted" / "step=6.ckpt", weights_only=True)
    assert end["options"] == uninterrupted["options"]  # the next resume compares with these


def test_resumed_with_learning_rate_zero_the_weights_stay(tmp_path):
    _, _, checkpoint = whole(tmp_path, optimizer=adamw(), lr_scheduler=linear())
    _, run, _ = resumed(tmp_path, checkpoint, optimizer=adamw(lr=0.0), lr_scheduler=linear())
    stored = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(value, stored[name]) for name, value in run.state_dict().items())


def test_other_options_are_set_and_the_schedule_stays(tmp_path):
    first = {"optimizer": adamw(betas=(0.9, 0.99), weight_decay=0.1), "lr_scheduler": linear()}
    expected, _, checkpoint = whole(tmp_path, **first)
    second = first | {"optimizer": adamw(betas=(0.8, 0.95), weight_decay=0.0)}
    with pytest.warns(UserWarning, match=r"betas: \(0.9, 0.99\) -> \(0.8, 0.95\)\n.*weight_decay: 0.1 -> 0.0"):
        record, _, fit = resumed(tmp_path, checkpoint, **second)
    (group,) = fit.optimizers[0].param_groups
    assert (group["betas"], group["weight_decay"]) == ((0.8, 0.95), 0.0)
    assert record.learning_rates == expected.learning_rates[STOP:]


@pytest.mark.parametrize("scheduler", [None, linear(), warm_up_and_cosine(), one_cycle()])
def test_unchanged_options_change_nothing_and_are_not_mentioned(tmp_path, scheduler):
    options = {"optimizer": adamw(weight_decay=0.1), "lr_scheduler": scheduler}
    _, expected, checkpoint = whole(tmp_path, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*other options.*")
        record, run, _ = resumed(tmp_path, checkpoint, **options)
    assert len(record.losses) == STEPS - STOP
    assert torch.equal(weights(run), weights(expected))


def test_a_checkpoint_without_options_keeps_what_it_brings(tmp_path):
    expected, _, checkpoint = whole(tmp_path, optimizer=adamw(), lr_scheduler=linear())
    state = torch.load(checkpoint, weights_only=True)
    del state["options"]
    torch.save(state, tmp_path / "old.ckpt")
    record, _, _ = resumed(tmp_path, tmp_path / "old.ckpt", optimizer=adamw(lr=2e-3), lr_scheduler=linear())
    assert record.learning_rates == expected.learning_rates[STOP:]


def test_options_of_an_evaluated_checkpoint_are_not_those_of_a_resume(tmp_path):
    _, _, checkpoint = whole(tmp_path)
    run, fit = module(optimizer=adamw(lr=2e-3)), trainer(tmp_path, max_steps=1)
    fit.validate(run, loader(shuffle=False), ckpt_path=checkpoint, weights_only=True, verbose=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*other options.*")
        fit.fit(run, loader())


def groups_of(*rates):
    return [{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in rates]


def test_an_optimizer_is_only_asked_for_its_param_groups():
    stored, now = (configured_options(SGD(groups_of(*rates)), None) for rates in ((0.1, 0.2), (0.1, 0.4)))
    wrapper = SimpleNamespace(param_groups=groups_of(0.1, 0.2))
    with pytest.warns(UserWarning, match="optimizer.1.lr: 0.2 -> 0.4"):
        take_over(wrapper, None, stored=stored, now=now, scheduler_factory=None, steps=5)
    assert [group["lr"] for group in wrapper.param_groups] == [0.1, 0.4]


def test_a_learning_rate_in_a_tensor_stays_in_that_tensor():
    stored, now = (configured_options(SGD(groups_of(torch.tensor(rate))), None) for rate in (0.5, 0.25))
    rate = torch.tensor(0.5)
    optimizer = SimpleNamespace(param_groups=[{"lr": rate}])
    take_over(optimizer, None, stored=stored, now=now, scheduler_factory=None, steps=5)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate == 0.25


def test_options_are_those_before_the_first_step_in_plain_types():
    optimizer = SGD(groups_of(np.float64(0.5)), momentum=np.float32(0.25))
    options = configured_options(optimizer, linear(4, start=0.5)(optimizer))
    assert optimizer.param_groups[0]["lr"] == 0.25
    (group,) = options["optimizer"]
    assert {name: group[name] for name in ("lr", "momentum", "nesterov")} == {
        "lr": 0.5,
        "momentum": 0.25,
        "nesterov": False,
    }
    assert {type(value) for value in group.values()} <= {float, bool, int, type(None)}
    assert options["lr_scheduler"] == {"start_factor": 0.5, "end_factor": 1.0, "total_iters": 4}


def test_differences_are_named_by_dotted_keys():
    stored = {"a": {"b": 1, "c": [1, 2]}, "groups": [{"lr": 1}, {"lr": 2}], "gone": 3, "none": None}
    now = {"a": {"b": 1, "c": [1, 3]}, "groups": [{"lr": 1}, {"lr": 4}], "new": {"x": 5}}
    assert differences(stored, now) == {
        "a.c": ([1, 2], [1, 3]),
        "groups.1.lr": (2, 4),
        "gone": (3, None),
        "new": (None, {"x": 5}),
    }
    assert differences(stored, stored) == {}
