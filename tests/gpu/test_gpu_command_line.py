"""The commands on the device: a short demo, what it leaves, and the model that it exports."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dmpo_lightning.__main__ import main
from dmpo_lightning.models.backbone import Backbone
from dmpo_lightning.policy import evaluating
from gpu.runs import ACCELERATORS, assert_finite, assert_same
from helpers import prompt_batch, tiny_policy

pytestmark = pytest.mark.gpu
STEPS = 20
SMALL = ["--data.prompts_per_buffer=4", "--data.sizes={train: 128, validation: 8, test: 16}"]
SHORT = [f"--trainer.max_steps={STEPS}", "--trainer.val_check_interval=20", "--model.micro_batch_size=16"]
PYTHONPATH = os.pathsep.join(map(os.path.abspath, filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))))
"""Relative paths on it would be lost in another folder."""
RUN = Path("runs", "sudoku_tiny", "latest")
CHECKPOINT = RUN / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def accelerator(device) -> str:
    return f"--trainer.accelerator={ACCELERATORS[device.type]}"


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, accelerator) -> Path:
    """The folder in which the demo ran, in a process of its own."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "dmpo_lightning", "fit", "--config", "sudoku_tiny.yaml", accelerator]
    command += ["--trainer.devices=1", *SHORT, *SMALL]
    environment = os.environ | {"PYTHONPATH": PYTHONPATH, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return folder


def run(folder: Path, monkeypatch, *arguments: str) -> None:
    monkeypatch.chdir(folder)
    status = main(list(arguments))
    assert status == 0, f"{arguments[0]} ended with status {status}"


def numbers(value) -> list[float]:
    if isinstance(value, dict):
        return [number for each in value.values() for number in numbers(each)]
    if isinstance(value, list):
        return [number for each in value for number in numbers(each)]
    return [float(value)] if isinstance(value, int | float) else []


def test_the_demo_leaves_a_summary_of_finite_numbers(fitted):
    summary = json.loads((fitted / RUN / "summary.json").read_text())
    assert_finite(numbers(summary), f"numbers of {summary}")
    assert 0 <= summary["solve_rate_after"] <= 1
    assert 0 <= summary["greedy_after"] <= 1
    assert (fitted / CHECKPOINT).is_file(), f"there is {sorted(str(path) for path in fitted.rglob('*.ckpt'))}"


def test_the_checkpoint_is_of_finite_weights_after_all_steps(fitted):
    saved = torch.load(fitted / CHECKPOINT, map_location="cpu", weights_only=True)
    assert saved["global_step"] == STEPS
    odd = [name for name, value in saved["state_dict"].items() if not value.isfinite().all()]
    assert saved["state_dict"]
    assert not odd, f"not finite: {odd}"


@pytest.mark.parametrize("command", ["validate", "test"])
def test_a_checkpoint_is_evaluated(fitted, accelerator, monkeypatch, tmp_path, command):
    checkpoint = f"--ckpt_path={fitted / CHECKPOINT}"
    run(tmp_path, monkeypatch, command, "--config", "sudoku_tiny.yaml", accelerator, checkpoint, *SMALL)
    written = json.loads(next(tmp_path.rglob("evaluation.json")).read_text())
    count = {"validate": 8, "test": 16}[command]
    assert written["n"] == count
    means = [mean["mean"] for result in written["results"] for mean in result["means"].values()]
    assert all(isinstance(mean, float) and not math.isinf(mean) for mean in means), means
    lines = next(tmp_path.rglob("completions.jsonl")).read_text().splitlines()
    assert len(lines) == 2 * count, f"{len(lines)} completions of {count} prompts by two samplers"


def test_completions_are_predicted(fitted, accelerator, monkeypatch, tmp_path):
    checkpoint = f"--ckpt_path={fitted / CHECKPOINT}"
    run(tmp_path, monkeypatch, "predict", "--config", "sudoku_tiny.yaml", accelerator, checkpoint, *SMALL)
    lines = next(tmp_path.rglob("completions.jsonl")).read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 2 * 16
    assert sorted({record["index"] for record in records}) == list(range(16))


def test_the_exported_model_has_the_logits_of_the_trained_one(fitted, device, monkeypatch, tmp_path):
    run(tmp_path, monkeypatch, "export", "--ckpt_path", str(fitted / CHECKPOINT), "--output", "model")
    saved = torch.load(fitted / CHECKPOINT, map_location="cpu", weights_only=True)["state_dict"]
    trained, base = Backbone("sudoku_tiny").build(), Backbone("sudoku_tiny").build()
    own = "policy.model."
    weights = {name.removeprefix(own): value for name, value in saved.items() if name.startswith(own)}
    trained.load_state_dict(weights)
    found = []
    for model in (Backbone(str(tmp_path / "model")).build(), trained, base):
        policy = tiny_policy(model=model, with_reference=False).to(device)
        batch = prompt_batch(policy, ["12..3...4.......", "1"]).to(device)
        ids = torch.nn.functional.pad(batch.prompt_ids, (0, 8), value=policy.facts.mask_token_id)
        mask = torch.nn.functional.pad(batch.prompt_mask, (0, 8), value=True)
        with evaluating(policy):
            found.append(policy.logits(ids, mask, torch.arange(ids.numel(), device=device).view(ids.shape)))
    assert_same(found[0], found[1], "logits of the exported model")
    assert not torch.equal(found[1], found[2]), "the run trained nothing"
