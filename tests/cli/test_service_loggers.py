"""Runs under W&B (offline) and MLflow (files): their folders, and how they go on."""

import os
from pathlib import Path

import pytest
import yaml
from cli_runs import SMALL

from dmpo_lightning.__main__ import main

pytestmark = pytest.mark.slow

LOGGERS = {
    "wandb": ("WandbLogger", {"save_dir": "kept", "project": "mine", "offline": True}),
    "mlflow": ("MLFlowLogger", {"save_dir": "kept", "experiment_name": "mine"}),
}


@pytest.fixture
def service(request, tmp_path, monkeypatch):
    pytest.importorskip(request.param)
    monkeypatch.chdir(tmp_path)
    # Without it MLflow 3 refuses to write files, which need no server.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("WANDB_SILENT", "true")
    # Lightning's logger sets it.
    monkeypatch.setenv("WANDB_MODE", "offline")
    name, options = LOGGERS[request.param]
    logger = {"class_path": f"lightning.pytorch.loggers.{name}", "init_args": options}
    Path("small.yaml").write_text(yaml.safe_dump({**SMALL, "trainer": {**SMALL["trainer"], "logger": logger}}))
    return request.param


def fit(service, steps, *options):
    arguments = ["--config=sudoku_tiny.yaml", "--config=small.yaml", f"--trainer.max_steps={steps}"]
    assert main(["fit", *arguments, *options]) == 0
    if service == "wandb":
        import wandb

        # As the end of the process does.
        wandb.finish()


def run_folders():
    """The folders of runs with checkpoints, and the step of the last one of each."""
    import torch

    last = Path("kept").rglob("checkpoints/last.ckpt")
    return {str(each.parents[1]): torch.load(each, weights_only=True)["global_step"] for each in last}


def ids(service):
    if service == "wandb":
        return {each.name.rpartition("-")[2] for each in Path("kept/wandb").glob("offline-run-*")}
    from mlflow.tracking import MlflowClient

    client = MlflowClient("file:kept")
    return {run.info.run_id for each in client.search_experiments() for run in client.search_runs([each.experiment_id])}


@pytest.mark.parametrize("service", ["mlflow"], indirect=True)
def test_mlflow_has_another_run_that_continues_the_first(service):
    fit(service, 2)
    fit(service, 4, "--ckpt_path=last")
    assert sorted(run_folders().values()) == [2, 4]
    assert ids(service) == {os.path.basename(each) for each in run_folders()}


@pytest.mark.parametrize("service", ["wandb"], indirect=True)
def test_a_run_goes_on_in_its_folder_under_its_id_and_another_has_others(service):
    fit(service, 2)
    ((first, step),) = run_folders().items()
    assert step == 2
    assert ids(service) == {os.path.basename(first)}
    fit(service, 4, "--ckpt_path=last")
    assert run_folders() == {first: 4}
    fit(service, 6, f"--ckpt_path={first}/checkpoints/last.ckpt", "--model.optimizer.lr=0.002")
    assert run_folders() == {first: 6}
    assert ids(service) == {os.path.basename(first)}
    fit(service, 2)
    (second,) = run_folders().keys() - {first}
    assert run_folders() == {first: 6, second: 2}
    assert ids(service) == {os.path.basename(first), os.path.basename(second)}
    for each in (first, second):
        assert (Path(each) / "config.yaml").is_file()
