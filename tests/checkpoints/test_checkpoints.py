"""Nothing in a checkpoint file is executed; what no run can use is passed over; files are complete or absent."""

import logging
import os
import resource
import signal
from contextlib import contextmanager

import pytest
import torch
import yaml
from dmpo_runs import loader, module, trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch.distributed.checkpoint import save

from dmpo_lightning.__main__ import main
from dmpo_lightning.checkpoints.reading import load_data, newest_readable, read_weights, why_unfit, why_unsafe
from dmpo_lightning.checkpoints.writing import complete, partial_name, remove_partial, write_file

WEIGHT = "policy.model.a"
RUN = {
    "state_dict": {WEIGHT: torch.arange(6.0).reshape(2, 3)},
    "loops": {},
    "lr_schedulers": [],
    "optimizer_states": [{"state": {0: {"step": torch.tensor(2.0)}}, "param_groups": [{"betas": (0.9, 0.99)}]}],
    "global_step": 2,
    "backbone": {"model": "sudoku_tiny"},
    "dmpo": {},
}


class Bomb:
    """Makes a folder where it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def written(path, content=RUN, *, age=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    os.utime(path, (10_000 - age, 10_000 - age))
    return path


def folder(path, *, lacks=()):
    """A checkpoint as FSDP2 leaves it, of one rank."""
    save({"state_dict": RUN["state_dict"]}, checkpoint_id=path, no_dist=True)
    facts = {name: value for name, value in RUN.items() if name not in ("state_dict", "optimizer_states", *lacks)}
    torch.save(facts, path / "meta.pt")
    return path


# What would be executed -----------------------------------------------------------------------------------------------


def test_a_file_that_runs_something_is_refused(tmp_path):
    saved = written(tmp_path / "a.ckpt", RUN | {"bomb": Bomb(tmp_path / "exploded")})
    assert "more than data" in why_unsafe(saved)
    with pytest.raises(ValueError, match="more than data"):
        read_weights(saved)
    assert not (tmp_path / "exploded").exists()
    # The bomb is one.
    torch.load(saved, weights_only=False)
    assert (tmp_path / "exploded").exists()
    assert why_unsafe(written(tmp_path / "b.ckpt")) is None


@pytest.mark.parametrize("kind", ["FSDP", "DeepSpeed"])
def test_a_folder_is_opened_only_where_it_is_trusted(tmp_path, kind):
    saved = folder(tmp_path / "a.ckpt")
    if kind == "DeepSpeed":
        (saved / "latest").write_text("checkpoint")
    assert "unpickled" in why_unsafe(saved)
    with pytest.raises(ValueError, match=r"is a folder, which is unpickled.*--trust_checkpoint"):
        read_weights(saved)
    if kind == "FSDP":
        found = read_weights(saved, trust_checkpoint=True)
        assert torch.equal(found["state_dict"][WEIGHT], RUN["state_dict"][WEIGHT])


# What a run can use ---------------------------------------------------------------------------------------------------


def without(*names):
    return {name: value for name, value in RUN.items() if name not in names}


UNFIT = [
    (without("optimizer_states", "lr_schedulers"), "it holds weights alone"),
    (without("dmpo"), "no 'dmpo', so it is of another kind"),
    ([1, 2], "no dictionary but list"),
]


@pytest.mark.parametrize(("content", "reason"), UNFIT)
def test_what_no_run_can_continue_from_is_said_and_the_one_before_is_taken(tmp_path, caplog, content, reason):
    older = written(tmp_path / "version_0" / "a.ckpt", age=2)
    written(tmp_path / "version_1" / "b.ckpt", content, age=1)
    with caplog.at_level(logging.WARNING):
        taken = newest_readable(tmp_path, why_unusable=lambda path: why_unfit(path, keys=["dmpo"], continues=True))
    assert taken == older
    assert reason in caplog.text


@pytest.mark.parametrize("share", [0.5, 0])
def test_a_damaged_checkpoint_is_said_and_the_one_before_is_taken(tmp_path, caplog, share):
    older, newest = written(tmp_path / "a.ckpt", age=2), written(tmp_path / "b.ckpt", age=1)
    assert newest_readable(tmp_path) == newest
    newest.write_bytes(newest.read_bytes()[: int(newest.stat().st_size * share)])
    with caplog.at_level(logging.WARNING):
        assert newest_readable(tmp_path) == older
    assert "b.ckpt cannot be used (it holds no checkpoint, or a part of one" in caplog.text
    assert newest_readable(tmp_path / "nowhere") is None


def test_weights_alone_are_enough_for_an_evaluation(tmp_path):
    saved = written(tmp_path / "a.ckpt", without("optimizer_states", "loops", "dmpo"))
    assert why_unfit(saved, keys=["dmpo"], continues=False) is None


def test_a_folder_is_judged_by_the_facts_beside_its_weights(tmp_path):
    saved = folder(tmp_path / "a.ckpt")
    assert why_unfit(saved, keys=["dmpo"], continues=True) is None
    assert why_unfit(saved, keys=["other"], continues=True) == "it has no 'other', so it is of another kind of run"
    assert "weights alone" in why_unfit(folder(tmp_path / "b.ckpt", lacks=["lr_schedulers"]), continues=True)
    (saved / "meta.pt").unlink()
    assert why_unfit(saved) == "it is no file"


def test_a_checkpoint_that_is_removed_meanwhile_is_passed_over(tmp_path):
    older, newest = written(tmp_path / "a.ckpt", age=2), written(tmp_path / "b.ckpt", age=1)

    def rotated(path):
        # Another job keeps its best only, between the list and the look.
        newest.unlink(missing_ok=True)
        return why_unfit(path)

    assert newest_readable(tmp_path, why_unusable=rotated) == older


def test_a_folder_takes_its_place_when_it_is_complete_and_replaces_the_one_before(tmp_path):
    target = tmp_path / "last.ckpt"
    for step in (1, 2):
        partial = folder(partial_name(target))
        (partial / "step").write_text(str(step))
        assert newest_readable(tmp_path) == (None if step == 1 else target)
        complete(partial, target)
        assert (target / "step").read_text() == str(step)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    # Killed while it is replaced.
    target.rename(tmp_path / "last.ckpt.old")
    folder(partial_name(target))
    assert newest_readable(tmp_path) == tmp_path / "last.ckpt.old"


# Complete or absent ---------------------------------------------------------------------------------------------------


@contextmanager
def files_of_at_most(size):
    """Writing more fails in the middle, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)


@pytest.mark.parametrize("size", [10, 1_000_000])
def test_a_disk_that_is_full_leaves_the_checkpoint_before(tmp_path, size):
    target = tmp_path / "last.ckpt"
    write_file(RUN, target)
    before = target.read_bytes()
    many = [torch.zeros(size) for _ in range(2_000_000 // size if size > 10 else 2_000)]
    with files_of_at_most(100_000), pytest.raises(OSError, match=r"last\.ckpt' could not be written .*as it was"):
        write_file(RUN | {"more": many}, target)
    assert target.read_bytes() == before
    assert os.listdir(tmp_path) == ["last.ckpt"]


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_under_every_strategy_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(tmp_path, strategy):
    run = trainer(tmp_path, max_steps=1, strategy=strategy)
    try:
        run.fit(module(), loader())
        run.save_checkpoint(tmp_path / "last.ckpt")
        before = (tmp_path / "last.ckpt").read_bytes()
        assert before
        with files_of_at_most(len(before) // 2), pytest.raises(OSError, match="could not be written"):
            run.save_checkpoint(tmp_path / "last.ckpt")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert (tmp_path / "last.ckpt").read_bytes() == before
    assert [name for name in os.listdir(tmp_path) if "ckpt" in name] == ["last.ckpt"]


def test_a_plugin_of_ones_own_writes_the_checkpoints(tmp_path):
    class Own(TorchCheckpointIO):
        def save_checkpoint(self, checkpoint, path, storage_options=None):
            (tmp_path / "own").write_text(str(path))

    run = trainer(tmp_path, max_steps=1, plugins=[Own()])
    run.fit(module(), loader())
    run.save_checkpoint(tmp_path / "last.ckpt")
    assert (tmp_path / "own").read_text() == str(tmp_path / "last.ckpt")


def test_a_file_replaces_a_link_and_not_what_it_leads_to(tmp_path):
    (tmp_path / "other").mkdir()
    write_file({"a": 1}, tmp_path / "other" / "step.ckpt")
    (tmp_path / "last.ckpt").symlink_to(tmp_path / "other" / "step.ckpt")
    write_file({"a": 2}, tmp_path / "last.ckpt")
    assert [load_data(tmp_path / name)["a"] for name in ("other/step.ckpt", "last.ckpt")] == [1, 2]
    assert not (tmp_path / "last.ckpt").is_symlink()


def test_what_killed_jobs_left_half_written_is_removed_and_nothing_else(tmp_path):
    (tmp_path / "a.ckpt.partial").mkdir()
    (tmp_path / "a.ckpt.partial" / "__0_0.distcp").write_bytes(b"1")
    for name in ("b.ckpt.partial", "c.ckpt.partial.partial", "c.ckpt", "c.ckpt.old", "notes.partial"):
        (tmp_path / name).write_bytes(b"1")
    remove_partial(tmp_path, tmp_path / "nowhere")
    assert sorted(os.listdir(tmp_path)) == ["c.ckpt", "c.ckpt.old", "notes.partial"]


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
