import csv
import json
import os
import signal
import traceback
from functools import cache

import pytest
import torch
from dmpo_runs import Recorder, loader, module, trainer, weights
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from dmpo_lightning import BeforeAfterReport, ConfidenceSampler, Preemption, RunRecorder
from dmpo_lightning.checkpoints.reading import newest_readable
from dmpo_lightning.reports.lines import read_lines
from tiers import slow_unless


class Killer(Callback):
    """Sends a signal to this process after a training batch."""

    def __init__(self, number: int, *, after: int) -> None:
        self.number, self.after = number, after

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.after:
            signal.raise_signal(self.number)


@pytest.mark.parametrize(("number", "accumulate", "after", "saved_at"), [("SIGTERM", 1, 2, 3), ("SIGUSR1", 2, 2, 2)])
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


@pytest.mark.parametrize(("presses", "after", "saved"), [(1, 2, 3), (2, 2, None), (1, 0, None)])
def test_ctrl_c_saves_what_was_trained_and_a_second_one_ends_at_once(tmp_path, presses, after, saved):
    pressed = [Killer(signal.SIGINT, after=after) for _ in range(presses)]
    leaves = Preemption()
    stopped = trainer(tmp_path, callbacks=[leaves, *pressed], max_steps=8)
    with pytest.raises(SystemExit) as exit_:
        stopped.fit(module(), loader())
    # As Lightning leaves after Ctrl-C.
    assert isinstance(exit_.value.__context__, KeyboardInterrupt)
    assert stopped.global_step == after + 1
    found = newest_readable(tmp_path)
    assert (None if found is None else torch.load(found, weights_only=True)["global_step"]) == saved
    assert leaves.saved == found
    # Lightning leaves it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)


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


# Runs that are ended at any moment, in processes of their own ---------------------------------------------------------


class ReportSampler(ConfidenceSampler):
    """Sends a signal to this process at one of its calls, of four before training and four after it."""

    sends: tuple[int, int] | None = None
    calls = 0

    def sample(self, *arguments, **options):
        ReportSampler.calls += 1
        if ReportSampler.sends is not None and ReportSampler.calls == ReportSampler.sends[1]:
            signal.raise_signal(ReportSampler.sends[0])
        return super().sample(*arguments, **options)


class Sends(Callback):
    """Sends a signal to this process at a call of a hook."""

    def __init__(self, number: int, hook: str, call: int) -> None:
        self.number, self.call = number, call
        setattr(self, hook, self.count)

    def count(self, *arguments, **options):
        self.call -= 1
        if self.call == 0:
            signal.raise_signal(self.number)


class Held(LightningDataModule):
    def train_dataloader(self):
        return loader()

    def test_dataloader(self):
        return loader(3, shuffle=False)

    val_dataloader = test_dataloader


SAVES = {
    "every second step": lambda: [ModelCheckpoint(every_n_train_steps=2, save_last=True)],
    "after validations": lambda: [ModelCheckpoint(save_last=True)],
    "after epochs": lambda: [ModelCheckpoint(save_last=True, save_on_train_epoch_end=True)],
    "as published": lambda: [
        ModelCheckpoint(monitor="val/greedy/accuracy", mode="max"),
        ModelCheckpoint(every_n_train_steps=5, filename="latest-{step}", save_last="link"),
    ],
}


def live(
    folder, *, number=signal.SIGKILL, hook=None, call=0, saves="every second step", preemption=True, **flags
) -> int:
    """One life of a run of two epochs of twelve steps, from its newest checkpoint: the exit status of its process."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        samplers = {"temperature_1": ReportSampler(denoising_steps=4), "greedy": ReportSampler(temperature=0.0)}
        callbacks = [
            BeforeAfterReport(samplers),
            *([Preemption()] if preemption else []),
            RunRecorder(),
            *SAVES[saves](),
        ]
        if hook == "report":
            ReportSampler.sends, ReportSampler.calls = (number, call), 0
        elif hook is not None:
            callbacks.insert(0, Sends(number, hook, call))
        logger = CSVLogger(folder, name="", version="")
        options = {"max_steps": 10, "max_epochs": -1, "val_check_interval": 5, "check_val_every_n_epoch": None}
        options |= {"enable_checkpointing": True, "logger": logger, "log_every_n_steps": 1}
        made, found = module(), newest_readable(folder)
        run = trainer(folder, callbacks=callbacks, **options | flags)
        run.fit(made, datamodule=Held(), ckpt_path=found and str(found))
        torch.save((run.global_step, weights(made)), folder / "weights.pt")
        status = 0
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else 128 + signal.SIGTERM
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def left(folder):
    """All that a run leaves but times."""

    def plain(record):
        timed = {name: None for name in record["values"] if name.startswith("time/") or name.endswith("per_second")}
        return record | {"seconds": None, "values": record["values"] | timed}

    steps, reached = torch.load(folder / "weights.pt")
    return {
        "metrics": [plain(record) for record in read_lines(folder / "metrics.jsonl")],
        "rollouts": {path.name: path.read_bytes() for path in (folder / "rollouts").iterdir()},
        "summary": json.loads((folder / "summary.json").read_text()) | {"seconds": None},
        "steps": steps,
        "weights": reached.tolist(),
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What runs of some flags leave that nobody ends."""

    @cache
    def run(*flags):
        folder = tmp_path_factory.mktemp("whole")
        assert live(folder, **dict(flags)) == 0
        return left(folder)

    return run


KILL, TERM, INT, USR1 = signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
MOMENTS = [
    *((number, "report", call) for call in (2, 6) for number in (KILL, TERM, INT, USR1)),
    *((number, "on_validation_batch_end", call) for call in (1, 2, 3, 4) for number in (KILL, TERM, INT)),
    *((number, "on_train_batch_end", call) for call in (3, 4, 5, 6, 10) for number in (KILL, TERM)),
    *((KILL, hook, 1) for hook in ("on_train_end", "on_fit_end", "teardown")),
]
STATUSES = {KILL: -KILL, TERM: 128 + TERM, INT: 1, USR1: 128 + USR1}


@pytest.mark.parametrize(("number", "hook", "call"), MOMENTS)
def test_a_run_that_is_ended_at_any_moment_and_continued_leaves_what_one_leaves_that_nobody_ends(
    tmp_path, uninterrupted, number, hook, call
):
    assert live(tmp_path, number=number, hook=hook, call=call) == STATUSES[number]
    assert live(tmp_path) == 0
    assert left(tmp_path) == uninterrupted()


def test_what_is_saved_in_a_validation_that_is_made_again_continues_too(tmp_path, uninterrupted):
    """The second life ends at its first batch, behind that validation."""
    for hook in ("on_validation_batch_end", "on_train_batch_end"):
        assert live(tmp_path, hook=hook, call=1, saves="as published") == -KILL
    assert "step=5" in str(newest_readable(tmp_path))
    assert live(tmp_path, saves="as published") == 0
    assert left(tmp_path) == uninterrupted()


@pytest.mark.parametrize("call", [2, 6])
def test_without_preemption_sigterm_ends_the_evaluations_of_a_report_too(tmp_path, uninterrupted, call):
    assert live(tmp_path, number=TERM, hook="report", call=call, preemption=False) == 128 + TERM
    assert live(tmp_path, preemption=False) == 0
    assert left(tmp_path) == uninterrupted()


@pytest.mark.parametrize("saves", SAVES)
@pytest.mark.parametrize("every", [5, 12])
@pytest.mark.parametrize("first", [5, 12, 13])
def test_a_finished_run_goes_on_to_more_steps_as_if_it_had_been_told_before(
    tmp_path, uninterrupted, first, every, saves
):
    """The first part ends within an epoch, at its end, and behind it. It may be finished as often as one likes."""
    flags = {"saves": saves, "val_check_interval": every}
    assert live(tmp_path, **flags, max_steps=first) == 0
    finished = left(tmp_path)
    if saves == "after validations":
        assert live(tmp_path, **flags, max_steps=first) == 0
        assert left(tmp_path) == finished
    newest = newest_readable(tmp_path)
    assert torch.load(newest, weights_only=True)["global_step"] == first
    assert live(tmp_path, **flags, max_steps=16) == 0
    assert left(tmp_path) == uninterrupted(("saves", saves), ("val_check_interval", every), ("max_steps", 16))


@pytest.mark.parametrize(("hook", "call"), [("report", 6), ("on_validation_batch_end", 4), ("on_fit_end", 1)])
def test_a_run_of_epochs_is_finished_as_one_of_steps(tmp_path, uninterrupted, hook, call):
    flags = {"max_steps": -1, "max_epochs": 2, "val_check_interval": 1.0, "check_val_every_n_epoch": 1}
    flags |= {"limit_train_batches": 4, "saves": "after validations"}
    assert live(tmp_path, hook=hook, call=call, **flags) == -KILL
    assert live(tmp_path, **flags) == 0
    assert left(tmp_path) == uninterrupted(*flags.items())
