import logging
import os

import pytest
import torch
import yaml

from dmpo_lightning.__main__ import main
from dmpo_lightning.checkpoints import newest_readable, why_unreadable


def saved(path, *, age):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"weights": torch.arange(1000)}, path)
    os.utime(path, (10_000 - age, 10_000 - age))
    return path


def test_the_newest_below_a_folder_is_found(tmp_path):
    saved(tmp_path / "version_0" / "a.ckpt", age=2)
    newest = saved(tmp_path / "version_1" / "b.ckpt", age=1)
    assert newest_readable(tmp_path) == newest
    assert newest_readable(tmp_path / "other") is None


@pytest.mark.parametrize("damage", ["cut", "empty", "changed"])
def test_a_damaged_checkpoint_is_said_and_the_one_before_is_taken(tmp_path, caplog, damage):
    older, newest = saved(tmp_path / "a.ckpt", age=2), saved(tmp_path / "b.ckpt", age=1)
    content = newest.read_bytes()
    middle = len(content) // 2
    damaged = {
        "cut": content[:middle],
        "empty": b"",
        "changed": content[:middle] + b"\xff" * 64 + content[middle + 64 :],
    }
    newest.write_bytes(damaged[damage])
    with caplog.at_level(logging.WARNING):
        assert newest_readable(tmp_path) == older
    assert "b.ckpt cannot be read" in caplog.text


def test_a_sharded_checkpoint_is_a_folder_with_metadata(tmp_path):
    folder = tmp_path / "a.ckpt"
    folder.mkdir()
    assert why_unreadable(folder) == "the folder has no .metadata"
    (folder / ".metadata").touch()
    assert why_unreadable(folder) is None


def test_a_requeued_job_continues_from_the_newest_checkpoint_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = {"sizes": {"train": 64, "validation": 8, "test": 8}, "prompts_per_buffer": 4}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({"data": {"init_args": small}}))
    options = ["--config", "sudoku_tiny.yaml", "--config", "small.yaml", "--model.init_args.micro_batch_size=16"]
    options += ["--trainer.enable_progress_bar=false", "--trainer.val_check_interval=2", "--ckpt_path=last"]
    seen = []
    for steps in (2, 4):
        assert main(["fit", *options, f"--trainer.max_steps={steps}"]) == 0
        checkpoint = newest_readable(tmp_path / "runs")
        assert checkpoint is not None
        seen.append(torch.load(checkpoint, weights_only=False))
    assert [state["global_step"] for state in seen] == [2, 4]
    assert [state["dmpo"]["buffers_collected"] for state in seen] == [2, 4]
