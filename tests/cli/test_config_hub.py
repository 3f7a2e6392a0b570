"""Every shipped configuration and overlay parses, plans, and trains where its model and data are at hand."""

import json
from typing import Any

import pytest
import torch
import yaml

from dmpo_lightning import load_tokenizer
from dmpo_lightning.__main__ import main
from dmpo_lightning.commands.arguments import config_directory, shipped_configs
from dmpo_lightning.models.llada import LLaDAConfig, LLaDAForMaskedDiffusion

TASKS = ["gsm8k", "math500", "countdown", "sudoku"]
OVERLAYS = [name for name in shipped_configs() if "/" in name]


def printed_config(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments, "--print_config"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    return yaml.safe_load(printed[printed.index("seed_everything:") :])  # deepspeed has its say before


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_overlay_parses_over_a_task(overlay, capsys):
    merged = printed_config(capsys, "--config", "gsm8k", "--config", overlay)
    assert differing(yaml.safe_load((config_directory() / overlay).read_text()), merged) == []


def differing(part: Any, whole: Any, name: str = "") -> list[str]:
    """Where a configuration does not have what a part of it states."""
    if isinstance(part, dict) and isinstance(whole, dict):
        return [each for key, value in part.items() for each in differing(value, whole.get(key), f"{name}.{key}")]
    return [] if part == whole else [name]


@pytest.mark.parametrize("name", TASKS)
def test_the_published_recipe_plans_for_40_gb(name, capsys):
    assert main(["plan", "--config", name, "--trainer.devices=8", "--gpu_memory_gb=40", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert "335544320" in json.dumps(plan)  # LoRA r 128 on the seven linear layers of 32 blocks
    assert not plan.get("warnings")


def test_gsm8k_trains_validates_checkpoints_and_resumes_on_a_small_model(test_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = LLaDAConfig(
        d_model=32, n_layers=2, n_heads=2, mlp_hidden_size=32, vocab_size=32, mask_token_id=5, eos_token_id=0
    )
    LLaDAForMaskedDiffusion(config).save_pretrained("small")
    load_tokenizer("sudoku_tiny").save_pretrained("small")
    small = [
        "--model.model=small",
        "--model.model.dtype=float32",
        "--trainer.precision=32-true",
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        "--trainer.logger.save_dir=runs",
        "--trainer.val_check_interval=4",
        "--trainer.limit_val_batches=1",
        "--trainer.num_sanity_val_steps=0",
        "--trainer.enable_progress_bar=false",
        "--model.completion_length=32",
        "--model.group_size=2",
        "--model.micro_batch_size=1",
        "--model.num_iterations=2",
        "--model.sampler.denoising_steps=4",
        "--model.model.adapter.r=2",
        "--data.evaluation_batch_size=2",
        f"--data.path={test_data / 'gsm8k'}",
        "--data.sizes={train: 200, validation: 100, test: 100}",
    ]
    assert main(["fit", "--config", "gsm8k", *small, "--trainer.max_steps=3"]) == 0
    checkpoint = next(tmp_path.rglob("last.ckpt"))
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 3  # the end, not the last validation
    assert main(["fit", "--config", "gsm8k", *small, "--trainer.max_steps=5", f"--ckpt_path={checkpoint}"]) == 0
    assert len(list(tmp_path.rglob("events*"))) == 2


@pytest.mark.parametrize("name", TASKS)
def test_without_the_weights_one_error_says_what_to_download(name, capsys, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert main(["fit", "--config", name, "--trainer.accelerator=cpu", "--trainer.devices=1"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "hf download GSAI-ML/LLaDA-8B-Instruct" in error
    assert "sudoku_tiny.yaml" in error
