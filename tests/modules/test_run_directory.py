"""Hyper-parameters reach any logger, and runs write into directories of their own."""

import json
import os
import signal
from itertools import count

import pytest
import torch
import yaml
from dmpo_runs import loader, module, trainer
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger

from dmpo_lightning import BeforeAfterReport, ConfidenceSampler, Preemption
from dmpo_lightning.commands.fit import newest_checkpoint
from dmpo_lightning.modules.run_directory import choose_directory, run_directory
from tiers import slow_unless


class ServiceLogger(Logger):
    """As those of W&B and MLflow: one folder for all runs, and an id that a service gives."""

    ids = count()

    def __init__(self, folder):
        super().__init__()
        self.folder, self.id, self.params = str(folder), f"run{next(self.ids)}", {}

    name = property(lambda self: "project")
    version = property(lambda self: self.id)
    save_dir = property(lambda self: self.folder)

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params, *rest, **more):
        self.params = dict(params)


class Held(LightningDataModule):
    def train_dataloader(self):
        return loader()

    def test_dataloader(self):
        return loader(3, shuffle=False)


@pytest.mark.parametrize("make", [TensorBoardLogger, CSVLogger])
def test_loggers_of_files_hold_the_hyper_parameters(tmp_path, make):
    logger = make(tmp_path)
    trainer(tmp_path, max_steps=1, logger=logger).fit(module(seed=3), loader())
    with open(f"{logger.log_dir}/hparams.yaml", encoding="utf-8") as file:
        said = yaml.safe_load(file)
    assert said["backbone"]["model"] == "sudoku_tiny"
    assert (said["objective"]["class"], said["objective"]["reward_temperature"]) == ("WDCE", 0.1)
    assert (said["sampler"]["denoising_steps"], said["seed"]) == (4, 3)
    assert said["reward"] == {"class": "dmpo_runs.digit_share"}
    assert said["optimizer_options"]["optimizer"][0]["lr"] == 1e-3


def test_checkpoints_do_not_hold_them_as_arguments(tmp_path):
    run = trainer(tmp_path, max_steps=1)
    run.fit(module(), loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert "hyper_parameters" not in torch.load(tmp_path / "a.ckpt", weights_only=True)


def test_runs_of_a_service_do_not_overwrite_each_other(tmp_path):
    samplers = {"temperature_1": ConfidenceSampler(denoising_steps=4), "greedy": ConfidenceSampler(temperature=0.0)}
    loggers = [ServiceLogger(tmp_path), ServiceLogger(tmp_path)]
    for seed, logger in enumerate(loggers):
        report = BeforeAfterReport(samplers)
        save = ModelCheckpoint(save_last=True)
        run = trainer(tmp_path, max_steps=4, logger=logger, callbacks=[report, save], enable_checkpointing=True)
        run.fit(module(seed=seed), datamodule=Held())
        assert (run_directory(run) / "checkpoints/last.ckpt").is_file()
        assert logger.params["seed"] == seed
    for seed, logger in enumerate(loggers):
        assert json.loads((tmp_path / "project" / logger.id / "summary.json").read_text())["seed"] == seed


@pytest.mark.parametrize("make", [TensorBoardLogger, CSVLogger])
def test_a_resumed_run_continues_in_its_directory(tmp_path, make):
    def run(steps, checkpoint=None):
        save = ModelCheckpoint(save_last=True, every_n_train_steps=2)
        flags = {"max_steps": steps, "callbacks": [save], "enable_checkpointing": True, "log_every_n_steps": 1}
        fit = trainer(tmp_path, logger=make(tmp_path, name="mine"), **flags)
        choose_directory(fit, checkpoint)
        fit.fit(module(), loader(), ckpt_path=checkpoint)
        return run_directory(fit)

    first = run(4)
    assert run(8, first / "checkpoints/last.ckpt") == first
    assert [each.name for each in (tmp_path / "mine").glob("2*")] == [first.name]
    if make is CSVLogger:
        rows = [(first / name).read_text().splitlines()[1:] for name in ("metrics_part1.csv", "metrics.csv")]
        assert [len(each) for each in rows] == [4, 4]


class Told(Callback):
    def on_train_batch_end(self, trainer, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    "make",
    [ServiceLogger, lambda folder: TensorBoardLogger(folder, sub_dir="events"), lambda folder: False],
    ids=["service", "files of a logger deeper", "no logger"],
)
def test_what_preemption_saves_without_a_model_checkpoint_is_found_as_the_last(tmp_path, make):
    run = trainer(tmp_path, max_steps=4, logger=make(tmp_path), callbacks=[Told(), Preemption()])
    with pytest.raises(SystemExit):
        run.fit(module(), loader())
    (saved,) = tmp_path.rglob("preempted.ckpt")
    again = trainer(tmp_path, max_steps=4, logger=make(tmp_path))
    assert newest_checkpoint(again, module(), continues=True) == str(saved)


class Prompts(Callback):
    def __init__(self):
        self.seen = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.setdefault(trainer.current_epoch, []).append(batch.prompt_index.tolist())


@pytest.mark.parametrize(("batches", "used"), [(4, [[0, 1]] * 4), (8, [[0, 1]] * 4 + [[2, 3]] * 4)])
def test_overfitting_takes_the_same_prompts_in_each_epoch(tmp_path, batches, used):
    prompts = Prompts()
    trainer(tmp_path, overfit_batches=batches, max_epochs=3, callbacks=[prompts]).fit(module(), loader())
    assert prompts.seen == dict.fromkeys(range(3), used)


class Counting(Held):
    calls = 0

    def train_dataloader(self):
        self.calls += 1
        return loader()


@pytest.mark.parametrize(("every", "calls"), slow_unless(lambda every, _: every == 2, [(0, 1), (1, 3), (2, 2)]))
def test_loaders_are_made_anew_as_the_trainer_says_and_orders_go_on(tmp_path, every, calls):
    data, prompts, plain = Counting(), Prompts(), Prompts()
    flags = {"max_epochs": 3}
    trainer(tmp_path, callbacks=[plain], **flags).fit(module(), datamodule=Held())
    run = trainer(tmp_path, callbacks=[prompts], reload_dataloaders_every_n_epochs=every, **flags)
    run.fit(module(), datamodule=data)
    assert data.calls == calls
    assert prompts.seen == plain.seen


def test_a_trainer_fits_twice_with_a_datamodule(tmp_path):
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module(), datamodule=Held())
    run.fit_loop.max_epochs = 2
    run.fit(module(), datamodule=Held())
    assert run.global_step == 24


def test_a_checkpoint_of_the_end_of_an_epoch_continues_with_the_next_one(tmp_path):
    """As `ModelCheckpoint` saves by default. Lightning gives a loader its state back within an epoch only."""
    prompts, rest = Prompts(), Prompts()
    save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(tmp_path, max_epochs=3, callbacks=[prompts, save], enable_checkpointing=True).fit(module(), loader())
    trainer(tmp_path, max_epochs=3, callbacks=[rest]).fit(module(), loader(), ckpt_path=tmp_path / "epoch=1.ckpt")
    assert rest.seen == {2: prompts.seen[2]}
