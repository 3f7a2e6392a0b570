import logging
import os

import pytest
import torch
import yaml

from dmpo_lightning.__main__ import main
from dmpo_lightning.checkpoints.folders import complete_folder, newest_readable, partial_name, why_unreadable


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


def folder(path, *, size=100):
    """A checkpoint of two ranks, as a strategy leaves it before it is completed."""
    path.mkdir(parents=True)
    for rank in (0, 1):
        (path / f"__{rank}_0.distcp").write_bytes(bytes(size))
    (path / ".metadata").write_bytes(b"where what is")
    torch.save({"global_step": 1}, path / "meta.pt")
    return path


def test_a_folder_takes_its_place_when_it_is_complete_and_replaces_the_one_before(tmp_path):
    target = tmp_path / "last.ckpt"
    for size in (100, 200):
        partial = folder(partial_name(target), size=size)
        assert newest_readable(tmp_path) == (None if size == 100 else target)
        complete_folder(partial, target)
        assert why_unreadable(target) is None
        assert (target / "__1_0.distcp").stat().st_size == size
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_job_killed_while_a_folder_is_replaced_finds_the_one_before(tmp_path):
    target = tmp_path / "last.ckpt"
    complete_folder(folder(partial_name(target)), target)
    target.rename(tmp_path / "last.ckpt.old")
    folder(partial_name(target))
    assert newest_readable(tmp_path) == tmp_path / "last.ckpt.old"


@pytest.mark.parametrize("name", ["__1_0.distcp", ".metadata", "meta.pt"])
@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_what_a_folder_lacks_is_named(tmp_path, name, damage):
    older, target = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    for each in (older, target):
        complete_folder(folder(partial_name(each)), each)
    file = target / name
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:5])
    else:
        file.unlink()
    assert why_unreadable(target) == f"{name} is truncated or missing"
    assert newest_readable(tmp_path) == older


def test_folders_of_lightnings_own_strategies_are_judged_by_what_is_written_last(tmp_path):
    saved = folder(tmp_path / "a.ckpt")
    assert why_unreadable(saved) is None
    content = (saved / "meta.pt").read_bytes()
    (saved / "meta.pt").write_bytes(content[:50])
    assert why_unreadable(saved) == "File is not a zip file"
    (saved / ".metadata").unlink()
    assert why_unreadable(saved) == "the folder has no .metadata"


def test_a_requeued_job_continues_from_the_newest_checkpoint_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = {"sizes": {"train": 64, "validation": 8, "test": 8}, "prompts_per_buffer": 4}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({"data": {"init_args": small}}))
    options = ["--config", "sudoku_tiny.yaml", "--config", "small.yaml", "--model.init_args.micro_batch_size=16"]
    options += ["--model.init_args.num_iterations=1", "--trainer.val_check_interval=2", "--ckpt_path=last"]
    options += ["--trainer.enable_progress_bar=false"]
    seen = []
    for steps in (2, 4):
        assert main(["fit", *options, f"--trainer.max_steps={steps}"]) == 0
        checkpoint = newest_readable(tmp_path / "runs")
        assert checkpoint is not None
        seen.append(torch.load(checkpoint, weights_only=False))
    assert [state["global_step"] for state in seen] == [2, 4]
    assert [state["dmpo"]["buffers_collected"] for state in seen] == [2, 4]
