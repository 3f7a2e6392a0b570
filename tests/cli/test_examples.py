"""The examples run, and do what they say."""

import runpy
from pathlib import Path

import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_drop_in_raises_its_own_reward(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = runpy.run_path(str(EXAMPLES / "drop_in.py"))
    module = namespace["main"](max_steps=20)
    assert module.buffers_collected == 10
    assert module.trainer.global_step == 20
    assert torch.isfinite(module.trainer.callback_metrics["train/loss"])


def test_the_tokenizer_recipe_makes_the_embedded_tokenizer(tmp_path):
    runpy.run_path(str(EXAMPLES / "make_sudoku_tokenizer.py"))["main"](str(tmp_path))
    embedded = Path(__file__).parents[2] / "src" / "dmpo_lightning" / "assets" / "sudoku_tiny"
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / name).read_text() == (embedded / name).read_text()
