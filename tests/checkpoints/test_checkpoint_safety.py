"""Nothing in a checkpoint is executed, and what is no checkpoint of a run is passed over with its reason."""

import logging
import os
import pickle
import resource
import signal
from contextlib import contextmanager

import pytest
import torch
from dmpo_runs import loader, module, trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from torch.distributed.checkpoint import save
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from dmpo_lightning.checkpoints.contents import why_unfit
from dmpo_lightning.checkpoints.folders import newest_readable, remove_partial, why_unreadable, write_file
from dmpo_lightning.checkpoints.safe_reading import SafeReader, load_data, why_unsafe
from dmpo_lightning.checkpoints.weights import read_weights

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
    """Writes a file where it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def folder(path, *, rate=0.1, state=True):
    """A checkpoint as FSDP2 leaves it, of one rank."""
    optimizer = {"param_groups": [{"lr": rate, "betas": (0.9, 0.99), "params": ["a"]}]}
    if state:
        optimizer["state"] = {"a": {"step": torch.tensor(2.0)}}
    save({"state_dict": RUN["state_dict"], "optimizer_0": optimizer}, checkpoint_id=path, no_dist=True)
    torch.save({name: RUN[name] for name in RUN if name not in ("state_dict", "optimizer_states")}, path / "meta.pt")
    return path


# What would be executed -----------------------------------------------------------------------------------------------


def test_a_folder_of_tensors_and_numbers_is_safe_and_read_as_torch_reads_it(tmp_path):
    saved = folder(tmp_path / "a.ckpt")
    assert why_unsafe(saved) is None
    assert torch.equal(read_weights(saved)["state_dict"][WEIGHT], RUN["state_dict"][WEIGHT])
    stored = torch.distributed.checkpoint.FileSystemReader(saved).read_metadata()
    assert SafeReader(saved).read_metadata().state_dict_metadata == stored.state_dict_metadata


def test_a_metadata_that_runs_something_is_refused_and_runs_nothing(tmp_path):
    saved = folder(tmp_path / "a.ckpt")
    (saved / ".metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    assert "names posix.mkdir" in why_unsafe(saved)
    with pytest.raises(ValueError, match=r"names posix\.mkdir"):
        read_weights(saved)
    assert not (tmp_path / "exploded").exists()
    # The bomb is one.
    pickle.loads((saved / ".metadata").read_bytes())
    assert (tmp_path / "exploded").exists()


def test_a_metadata_may_not_reach_functions_through_what_it_may_name(tmp_path):
    saved = folder(tmp_path / "a.ckpt")
    # getattr(BytesStorageMetadata, "__init__"), as protocol 0 writes it.
    asked = b"cbuiltins\ngetattr\n(ctorch.distributed.checkpoint.metadata\nBytesStorageMetadata\nV__init__\ntR."
    assert pickle.loads(asked) is BytesStorageMetadata.__init__
    (saved / ".metadata").write_bytes(asked)
    assert "asks for __init__" in why_unsafe(saved)


def test_a_value_of_a_folder_that_runs_something_is_refused(tmp_path):
    """Of a rate, torch reads the value with an unpickler that runs whatever it is told."""
    saved = folder(tmp_path / "a.ckpt", rate=Bomb(tmp_path / "exploded"))
    assert "param_groups" in why_unsafe(saved)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["a.ckpt", "a.ckpt/meta.pt"])
def test_a_file_that_runs_something_is_refused(tmp_path, name):
    saved = folder(tmp_path / "a.ckpt") if "/" in name else tmp_path / name
    torch.save(RUN | {"bomb": Bomb(tmp_path / "exploded")}, tmp_path / name)
    assert "more than data" in why_unsafe(saved)
    with pytest.raises(ValueError, match="more than data"):
        read_weights(saved)
    assert not (tmp_path / "exploded").exists()


def test_a_file_called_latest_chooses_no_reader_that_unpickles(tmp_path):
    saved = folder(tmp_path / "a.ckpt")
    (saved / "latest").write_text("checkpoint")
    (saved / "checkpoint").mkdir()
    torch.save(Bomb(tmp_path / "exploded"), saved / "checkpoint" / "mp_rank_00_model_states.pt")
    assert "DeepSpeed" in why_unsafe(saved)
    with pytest.raises(ValueError, match=r"folder of DeepSpeed.*--trust_checkpoint"):
        read_weights(saved)
    assert why_unfit(saved, keys=["dmpo"], continues=True) == "it has no 'dmpo'"
    assert not (tmp_path / "exploded").exists()


# What a run can use ---------------------------------------------------------------------------------------------------


def without(*names):
    return {name: value for name, value in RUN.items() if name not in names}


UNFIT = [
    (without("optimizer_states", "lr_schedulers"), "it holds weights alone"),
    (RUN | {"optimizer_states": []}, "it holds weights alone"),
    (without("dmpo"), "no 'dmpo', so it is of another kind"),
    (RUN | {"optimizer_states": [{"state": {}, "param_groups": [{"betas": (0.9, 0.99)}]}]}, "no state after 2 steps"),
    ({"weights": torch.zeros(2)}, "no weights of a policy"),
    (RUN | {"state_dict": {"layer.weight": torch.zeros(2)}}, "no weights of a policy"),
    ([1, 2], "no dictionary but list"),
]


@pytest.mark.parametrize(("content", "reason"), UNFIT)
def test_what_no_run_can_continue_from_is_said_and_the_one_before_is_taken(tmp_path, caplog, content, reason):
    older, newest = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    torch.save(RUN, older)
    torch.save(content, newest)
    os.utime(older, (1000, 1000))
    with caplog.at_level(logging.WARNING):
        taken = newest_readable(tmp_path, why_unusable=lambda path: why_unfit(path, keys=["dmpo"], continues=True))
    assert taken == older
    assert reason in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        RUN | {"global_step": 0, "optimizer_states": [{"state": {}, "param_groups": [{"betas": (0.9, 0.99)}]}]},
        RUN | {"optimizer_states": [{"state": {}, "param_groups": [{"lr": 0.1, "momentum": 0}]}]},
    ],
    ids=["no step yet", "gradient descent"],
)
def test_an_optimizer_that_remembers_nothing_is_continued(tmp_path, content):
    torch.save(content, tmp_path / "a.ckpt")
    assert why_unfit(tmp_path / "a.ckpt", keys=["dmpo"], continues=True) is None


def test_weights_alone_are_enough_for_an_evaluation(tmp_path):
    torch.save(without("optimizer_states", "loops", "dmpo"), tmp_path / "a.ckpt")
    assert why_unfit(tmp_path / "a.ckpt", keys=["dmpo"], continues=False) is None


def test_a_folder_is_judged_by_what_it_holds(tmp_path):
    saved = folder(tmp_path / "a.ckpt")
    assert why_unfit(saved, keys=["dmpo"], continues=True) is None
    assert why_unfit(saved, keys=["other"], continues=True) == "it has no 'other', so it is of another kind of run"
    torch.save({name: value for name, value in load_data(saved / "meta.pt").items() if name != "loops"}, saved / "m")
    (saved / "m").replace(saved / "meta.pt")
    assert "weights alone" in why_unfit(saved, keys=["dmpo"], continues=True)


def test_a_folder_whose_optimizer_has_no_state_is_not_continued(tmp_path):
    saved = folder(tmp_path / "a.ckpt", state=False)
    assert why_unfit(saved, keys=["dmpo"], continues=True) == "its optimizer has no state after 2 steps"
    assert why_unfit(saved, keys=["dmpo"], continues=False) is None


def deepspeed(path, state):
    """The parts of a folder of DeepSpeed's that are looked into."""
    (path / "checkpoint").mkdir(parents=True)
    (path / "latest").write_text("checkpoint")
    torch.save(without("optimizer_states", "state_dict"), path / "checkpoint" / "mp_rank_00_model_states.pt")
    for rank, each in enumerate(state):
        base = {"state": each, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]}
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": {"base_optimizer_state": base}}, path / "checkpoint" / name)
    return path


def test_a_folder_of_deepspeed_whose_optimizer_has_no_state_is_said_and_the_one_before_is_taken(tmp_path, caplog):
    averages = {0: {"step": torch.tensor(2.0), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}}
    older = deepspeed(tmp_path / "a.ckpt", [averages, averages])
    deepspeed(tmp_path / "b.ckpt", [averages, {}])
    deepspeed(tmp_path / "c.ckpt", [])
    os.utime(older, (1000, 1000))
    with caplog.at_level(logging.WARNING):
        taken = newest_readable(tmp_path, why_unusable=lambda path: why_unfit(path, keys=["dmpo"], continues=True))
    assert taken == older
    assert "no state in zero_pp_rank_1_mp_rank_00_optim_states.pt" in caplog.text
    assert "c.ckpt cannot be used (it holds weights alone" in caplog.text


def test_a_pipe_is_no_checkpoint_and_nobody_waits_for_it(tmp_path):
    os.mkfifo(tmp_path / "a.ckpt")
    assert why_unreadable(tmp_path / "a.ckpt") == "it is neither a file nor a folder"
    assert newest_readable(tmp_path) is None
    with pytest.raises(ValueError, match="it is no file"):
        read_weights(tmp_path / "a.ckpt")
    assert why_unsafe(tmp_path / "a.ckpt") == "it is no file"


def test_a_checkpoint_that_is_removed_meanwhile_is_passed_over(tmp_path):
    older, newest = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    for path in (older, newest):
        torch.save(RUN, path)
    os.utime(older, (1000, 1000))

    def rotated(path):
        # Another job keeps its best only, between the list and the look.
        newest.unlink(missing_ok=True)
        return why_unfit(path, keys=[], continues=True)

    assert newest_readable(tmp_path, why_unusable=rotated) == older


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
