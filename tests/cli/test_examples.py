"""The examples run, and do what they say."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch

from dmpo_lightning.__main__ import main
from dmpo_lightning.models.loading import EMBEDDED_MODELS

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_drop_in_raises_its_own_reward(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = runpy.run_path(str(EXAMPLES / "drop_in.py"))
    module = namespace["main"](max_steps=20)
    assert module.buffers_collected == 10
    assert module.trainer.global_step == 20
    assert torch.isfinite(module.trainer.callback_metrics["train/loss"])


@pytest.mark.parametrize("model", EMBEDDED_MODELS)
def test_the_tokenizer_recipe_makes_the_embedded_tokenizer(tmp_path, model):
    runpy.run_path(str(EXAMPLES / "make_tiny_tokenizer.py"))["main"](model, str(tmp_path))
    embedded = Path(__file__).parents[2] / "src" / "dmpo_lightning" / "assets" / model
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / name).read_text() == (embedded / name).read_text()


@pytest.mark.slow
def test_a_task_of_your_own_is_trained_and_tested_by_its_dotted_path(tmp_path, monkeypatch):
    for name in ("custom_task.py", "custom_task.yaml"):
        shutil.copy(EXAMPLES / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())  # the command puts the working directory there
    options = ["--config", "custom_task.yaml", "--trainer.enable_progress_bar", "false"]
    assert main(["fit", *options, "--trainer.max_steps", "64", "--trainer.val_check_interval", "32"]) == 0
    (checkpoint,) = tmp_path.glob("runs/favourite/*/checkpoints/*.ckpt")
    accuracy = {}
    for name, further in (("before", []), ("after", ["--ckpt_path", str(checkpoint)])):
        assert main(["test", *options, *further, f"--trainer.logger.init_args.version={name}"]) == 0
        written = json.loads((tmp_path / f"runs/favourite/{name}/evaluation.json").read_text())
        assert (written["task"], written["n"]) == ("Favourite", 10)
        accuracy[name] = written["results"][0]["means"]["accuracy"]["mean"]
    assert accuracy["before"] < 0.5 < accuracy["after"]


def test_the_custom_task_is_short():
    assert len((EXAMPLES / "custom_task.py").read_text().splitlines()) < 40
