import csv
import os
import signal

import pytest
import torch
from dmpo_runs import Recorder, loader, module, trainer, weights
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger

from dmpo_lightning import Preemption
from dmpo_lightning.checkpoints.reading import newest_readable
from tiers import slow_unless


class Killer(Callback):
    """Sends a signal to this process after a training batch."""

    def __init__(self, number: int, *, after: int) -> None:
        self.number, self.after = number, after

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.after:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("number", "accumulate", "after", "saved_at"), [("SIGTERM", 1, 2, 4), ("SIGUSR1", 2, 2, 2)])
def test_a_preempted_run_saves_at_the_next_optimizer_step_and_continues_exactly(
    tmp_path, number, accumulate, after, saved_at
):
    options = {"max_steps": 8, "accumulate_grad_batches": accumulate}
    whole, record = module(), Recorder()
    trainer(tmp_path, callbacks=[record], **options).fit(whole, loader())
    before = signal.getsignal(signal.Signals[number])
    stopped = trainer(tmp_path, callbacks=[Preemption(), Killer(signal.Signals[number], after=after)], **options)
    with pytest.raises(SystemExit) as exit_:
        stopped.fit(module(), loader())
    assert exit_.value.code == 128 + signal.Signals[number]
    assert stopped.global_step == saved_at
    assert signal.getsignal(signal.Signals[number]) == before
    checkpoint = newest_readable(tmp_path)
    assert checkpoint is not None
    assert checkpoint.name == "preempted.ckpt"
    resumed, rest = module(), Recorder()
    trainer(tmp_path, callbacks=[rest], **options).fit(resumed, loader(), ckpt_path=str(checkpoint))
    assert torch.equal(weights(resumed), weights(whole))
    assert rest.losses == record.losses[saved_at * accumulate :]


class Validations(Callback):
    """The batches and results of each validation; may send a signal after a batch of one."""

    def __init__(self, *, kill_at: int | None = None) -> None:
        self.kill_at, self.batches, self.results = kill_at, [], []

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.batches.append((trainer.global_step, batch_idx))
        if len(self.batches) == self.kill_at:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_validation_end(self, trainer, pl_module):
        self.results.append((trainer.global_step, float(trainer.callback_metrics["val/sampled/reward"])))


def logged(folder):
    """Step and values of what was logged of validations."""
    rows = csv.DictReader((folder / "metrics.csv").open())
    return [(row["step"], row["val/sampled/reward"]) for row in rows if row["val/sampled/reward"]]


@pytest.mark.parametrize("kill_at", slow_unless(lambda batch: batch == 2, [1, 2]))
@pytest.mark.parametrize(("steps", "every", "sanity"), [(6, 4, 0), (6, 4, 1), (14, 12, 0)])
def test_a_run_told_in_a_validation_leaves_it_and_makes_it_again(tmp_path, kill_at, steps, every, sanity):
    """A validation of two batches; 12 is also the end of an epoch."""
    options = {"max_steps": steps, "val_check_interval": every, "check_val_every_n_epoch": None}
    options |= {"limit_val_batches": 2, "log_every_n_steps": 1}

    def fit(name, *callbacks, **more):
        logs = {"logger": CSVLogger(tmp_path, name, version=""), "num_sanity_val_steps": 0}
        run = module()
        trainer(tmp_path, callbacks=[*callbacks], **options | logs | more).fit(
            run, loader(), loader(shuffle=False), **path
        )
        return run

    path = {}
    record, validations = Recorder(), Validations()
    whole = fit("whole", record, validations)
    first = Validations(kill_at=kill_at + sanity)
    with pytest.raises(SystemExit):
        fit("first", first, Preemption(), num_sanity_val_steps=sanity)
    assert first.batches[sanity:] == validations.batches[:kill_at]
    path = {"ckpt_path": str(newest_readable(tmp_path))}
    rest, second = Recorder(), Validations()
    resumed = fit("second", rest, second, Preemption())
    assert torch.equal(weights(resumed), weights(whole))
    assert rest.losses == record.losses[-len(rest.losses) :]
    assert second.results == validations.results
    assert logged(tmp_path / "second") == logged(tmp_path / "whole")


@pytest.mark.parametrize(("steps", "every"), [(6, 4), (14, 12)])
def test_a_run_told_at_a_step_with_a_validation_makes_it_when_it_continues(tmp_path, steps, every):
    options = {"max_steps": steps, "val_check_interval": every, "check_val_every_n_epoch": None}
    whole = Validations()
    trainer(tmp_path, callbacks=[whole], **options).fit(module(), loader(), loader(shuffle=False))
    first, second = Validations(), Validations()
    told = [first, Killer(signal.SIGTERM, after=every - 1), Preemption()]
    with pytest.raises(SystemExit):
        trainer(tmp_path, callbacks=told, **options).fit(module(), loader(), loader(shuffle=False))
    assert first.batches == []
    checkpoint = str(newest_readable(tmp_path))
    run = trainer(tmp_path, callbacks=[second, Preemption()], **options)
    run.fit(module(), loader(), loader(shuffle=False), ckpt_path=checkpoint)
    assert second.results == whole.results


def test_a_validation_between_two_micro_batches_is_not_left(tmp_path):
    """No checkpoint holds its gradients: the run leaves at the next step, after four batches."""
    options = {"max_steps": 5, "accumulate_grad_batches": 2, "val_check_interval": 3, "check_val_every_n_epoch": None}
    whole, record, validations = module(), Recorder(), Validations()
    run = trainer(tmp_path, callbacks=[record, validations], **options)
    run.fit(whole, loader(), loader(shuffle=False))
    stopped = trainer(tmp_path, callbacks=[Validations(kill_at=1), Preemption()], **options)
    with pytest.raises(SystemExit):
        stopped.fit(module(), loader(), loader(shuffle=False))
    assert stopped.global_step == 2
    checkpoint = str(newest_readable(tmp_path))
    resumed, rest, second = module(), Recorder(), Validations()
    run = trainer(tmp_path, callbacks=[rest, second, Preemption()], **options)
    run.fit(resumed, loader(), loader(shuffle=False), ckpt_path=checkpoint)
    assert torch.equal(weights(resumed), weights(whole))
    assert rest.losses == record.losses[4:]
    assert second.results == validations.results[1:]


@pytest.mark.parametrize(("steps", "every"), [(6, 4), (14, 12)])
def test_a_run_told_again_in_the_validation_that_it_makes_again_leaves_its_checkpoint_as_it_is(tmp_path, steps, every):
    options = {"max_steps": steps, "val_check_interval": every, "check_val_every_n_epoch": None}
    whole, validations = module(), Validations()
    trainer(tmp_path, callbacks=[validations], **options).fit(whole, loader(), loader(shuffle=False))
    path = {}
    for _ in range(2):
        stopped = trainer(tmp_path, callbacks=[Validations(kill_at=1), Preemption()], **options)
        with pytest.raises(SystemExit):
            stopped.fit(module(), loader(), loader(shuffle=False), **path)
        path = {"ckpt_path": str(newest_readable(tmp_path))}
    resumed, last = module(), Validations()
    run = trainer(tmp_path, callbacks=[last, Preemption()], **options)
    run.fit(resumed, loader(), loader(shuffle=False), **path)
    assert torch.equal(weights(resumed), weights(whole))
    assert last.results == validations.results
    assert torch.load(path["ckpt_path"], weights_only=False)["epoch"] == 0


def test_without_a_validation_loader_an_open_validation_is_forgotten(tmp_path):
    options = {"max_steps": 6, "val_check_interval": 4, "check_val_every_n_epoch": None}
    stopped = trainer(tmp_path, callbacks=[Validations(kill_at=1), Preemption()], **options)
    with pytest.raises(SystemExit):
        stopped.fit(module(), loader(), loader(shuffle=False))
    run, before = trainer(tmp_path, callbacks=[Preemption()], max_steps=6), signal.getsignal(signal.SIGTERM)
    run.fit(module(), loader(), ckpt_path=str(newest_readable(tmp_path)))
    assert run.global_step == 6
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_run_told_before_its_first_step_leaves_without_a_checkpoint(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    stopped = trainer(tmp_path, callbacks=[Validations(kill_at=1), Preemption()], num_sanity_val_steps=2, max_steps=2)
    with pytest.raises(SystemExit) as exit_:
        stopped.fit(module(), loader(), loader(shuffle=False))
    assert exit_.value.code == 128 + signal.SIGTERM
    assert newest_readable(tmp_path) is None
    assert signal.getsignal(signal.SIGTERM) == before
