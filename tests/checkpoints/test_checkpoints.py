"""Nothing in a checkpoint file is executed; what no run can use is passed over; files are complete or absent."""

import json
import logging
import os
import pickle
import resource
import shutil
import signal
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import yaml
from dmpo_runs import loader, module, trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, OnExceptionCheckpoint
from torch.distributed.checkpoint import save

from dmpo_lightning import DMPO, MaskedSFT
from dmpo_lightning.__main__ import main
from dmpo_lightning.checkpoints.export import export_checkpoint
from dmpo_lightning.checkpoints.reading import (
    confine_paths,
    load_data,
    newest_readable,
    read_weights,
    why_damaged,
    why_unfit,
    why_unsafe,
)
from dmpo_lightning.checkpoints.writing import complete, partial_name, remove_partial, write_file
from dmpo_lightning.commands import generate
from helpers import flip

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
        # What trusting means: torch obeys the list of tensors.
        (saved / ".metadata").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
        with pytest.raises(ValueError, match="is a folder"):
            DMPO.load_from_checkpoint(saved)
        assert not (tmp_path / "exploded").exists()
        with pytest.raises(ValueError, match="damaged or no checkpoint at all"):
            DMPO.load_from_checkpoint(saved, trust_checkpoint=True)
        assert (tmp_path / "exploded").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The checkpoint of a run of one step, and the folder in which it keeps its best one."""
    root = tmp_path_factory.mktemp("finished")
    keeps = ModelCheckpoint(root / "own", every_n_train_steps=1, filename="{step}", save_last=True)
    run = trainer(root, max_steps=1, callbacks=[keeps], enable_checkpointing=True)
    run.fit(module(), loader(), loader(shuffle=False))
    return root / "own" / "last.ckpt"


def with_code(path):
    """The embedded model, whose configuration names code that makes a folder."""
    shutil.copytree(str(files("dmpo_lightning") / "assets" / "sudoku_tiny"), path)
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "other", "auto_map": {"AutoConfig": "code.Config", "AutoModelForMaskedLM": "code.Model"}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "code.py").write_text(
        f"import os\nos.mkdir({str(path.parent / 'exploded')!r})\nfrom transformers import PretrainedConfig\n"
        "class Config(PretrainedConfig):\n    model_type = 'other'\n"
    )
    return path


def fitted(path, root, *, fn="fit"):
    run = trainer(root, max_steps=2)
    data = (loader(),) if fn == "fit" else (loader(3, shuffle=False),)
    getattr(run, fn)(module(), *data, ckpt_path=path)


READERS = {
    "DMPO": lambda path, root: DMPO.load_from_checkpoint(path),
    "MaskedSFT": lambda path, root: MaskedSFT.load_from_checkpoint(path),
    "export": lambda path, root: export_checkpoint(path, root / "out"),
    "generate": lambda path, root: generated(path),
}
RUNNERS = {fn: lambda path, root, fn=fn: fitted(path, root, fn=fn) for fn in ("fit", "validate", "test", "predict")}


def generated(path):
    generate.run(["--ckpt_path", str(path), "--prompt", "1", "--completion_length", "4"])


@pytest.mark.parametrize("way", READERS)
@pytest.mark.parametrize("stated", [True, False])
def test_trust_in_code_is_the_callers_and_never_the_checkpoints(tmp_path, finished, caplog, way, stated):
    held = {"model": str(with_code(tmp_path / "foreign")), "trust_remote_code": stated}
    saved = load_data(finished)
    foreign = written(tmp_path / "a.ckpt", saved | {"backbone": saved["backbone"] | held})
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match=r"trust_remote_code|custom code"):
        READERS[way](foreign, tmp_path)
    assert ("The run trusted code" in caplog.text) == stated
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("way", [*READERS, *RUNNERS])
@pytest.mark.parametrize("harm", ["flipped", "truncated", "pickle", "text", "weights are a list", "weights are words"])
def test_every_way_that_opens_a_checkpoint_refuses_what_is_damaged_or_more_than_data(tmp_path, finished, way, harm):
    path, content = tmp_path / "a.ckpt", load_data(finished)
    name = next(iter(content["state_dict"]))
    if harm == "pickle":
        content["bomb"] = Bomb(tmp_path / "exploded")
    elif harm.startswith("weights"):
        content["state_dict"] = [1] if harm.endswith("list") else content["state_dict"] | {name: "x"}
    written(path, content)
    if harm == "flipped":
        flip(path)
    elif harm == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif harm == "text":
        path.write_text("hello")
    with pytest.raises(ValueError, match=r"a\.ckpt'.*(it holds more than data|it holds no|damaged|must be a)"):
        (READERS | RUNNERS)[way](path, tmp_path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("arguments", "sampler"), 5),
        (("arguments", "sampler", "class"), [1]),
        (("arguments", "sampler", "temperature"), None),
        (("arguments", "completion_length"), {"a": 1}),
        (("backbone", "tokenizer"), 5),
        (("backbone", "model"), [1]),
        (("backbone", "adapter"), {"a": 1}),
    ],
)
def test_what_a_checkpoint_says_of_its_run_is_understood_or_refused_in_a_sentence(tmp_path, finished, place, value):
    saved = inner = load_data(finished)
    for name in place[:-1]:
        inner = inner[name]
    inner[place[-1]] = value
    # Without the length that the helper gives.
    command = ["--ckpt_path", str(written(tmp_path / "a.ckpt", saved)), "--prompt", "1"]
    with pytest.raises(ValueError, match=r"The checkpoint describes its (run|model) in a way that is not understood"):
        generate.run(command)


@pytest.mark.parametrize("seed", [None, [1], "1"])
def test_a_seed_that_is_no_number_is_refused_in_a_sentence(tmp_path, finished, seed):
    path = written(tmp_path / "a.ckpt", load_data(finished) | {"seed": seed})
    with pytest.raises(ValueError, match=r"a\.ckpt': its 'seed' must be a whole number"):
        export_checkpoint(path, tmp_path / "out")


def test_weights_that_a_checkpoint_lists_and_does_not_hold_are_missing(tmp_path, finished):
    path = written(tmp_path / "a.ckpt", load_data(finished) | {"state_dict": {}})
    with pytest.raises(ValueError, match="got 0 tensors"):
        DMPO.load_from_checkpoint(path)


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


@pytest.mark.parametrize("entry", ["/data/0", "/data.pkl", "/version"])
def test_a_flipped_bit_is_found_wherever_it_is(tmp_path, entry):
    path = written(tmp_path / "a.ckpt")
    assert why_damaged(path) is None
    flip(path, entry=entry)
    if entry == "/data/0":  # which torch does not see
        assert not torch.equal(torch.load(path, weights_only=True)["state_dict"][WEIGHT], RUN["state_dict"][WEIGHT])
    for reason in (why_damaged(path), why_unsafe(path), why_unfit(path)):
        assert reason == f"it is damaged: in a.ckpt, a{entry} has not the checksum with which it was written"


@pytest.mark.parametrize("kind", ["FSDP", "DeepSpeed"])
@pytest.mark.parametrize("harm", ["flipped", "truncated", "empty"])
def test_a_damaged_part_of_a_folder_is_found_and_the_one_before_is_taken(tmp_path, caplog, kind, harm):
    older, newest = folder(tmp_path / "a.ckpt"), folder(tmp_path / "b.ckpt")
    os.utime(older, (1000, 1000))
    part = newest / "__0_0.distcp"
    if kind == "DeepSpeed":
        (newest / "latest").write_text("checkpoint")
        part = part.rename(newest / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert newest_readable(tmp_path) == newest
    if harm == "flipped":
        flip(part)
    else:
        part.write_bytes(part.read_bytes()[:-1] if harm == "truncated" else b"")
    with pytest.raises(ValueError, match=rf"b\.ckpt' is truncated, damaged.*{part.name}"):
        read_weights(newest, trust_checkpoint=True)
    with caplog.at_level(logging.WARNING):
        assert newest_readable(tmp_path) == older
    assert part.name in caplog.text


def test_an_archive_that_is_cut_behind_one_of_its_tensors_is_no_shorter_archive(tmp_path):
    saved = tmp_path / "a.ckpt"
    save({"state_dict": {"a": torch.ones(3), "b": torch.ones(3)}}, checkpoint_id=saved, no_dist=True)
    part = saved / "__0_0.distcp"
    assert why_damaged(saved) is None
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2 + 1])
    assert "it has no end" in why_damaged(saved)
    # Ranks look at a share each.
    assert [why_damaged(saved, part=part, parts=2) is None for part in (0, 1)] == [False, True]


# Which paths are believed ---------------------------------------------------------------------------------------------


class OwnCheckpoint(ModelCheckpoint):
    """One of a user's own."""


def believed(path, callback, **state):
    """What a callback believes of a state in a checkpoint at a path."""
    states = {callback.state_key: callback.state_dict() | state, "EarlyStopping": {"wait_count": 1}}
    confine_paths({"callbacks": states}, [callback], path)
    assert states["EarlyStopping"] == {"wait_count": 1}
    return states[callback.state_key]


@pytest.mark.parametrize("kind", [ModelCheckpoint, OwnCheckpoint])
def test_of_a_foreign_checkpoint_no_path_is_believed(tmp_path, kind):
    own, other = tmp_path / "own", tmp_path / "other"
    kept = written(own / "kept.ckpt")
    state = {"dirpath": str(own), "best_model_path": str(kept), "best_k_models": {str(kept): torch.tensor(1.0)}}
    assert believed(written(other / "foreign.ckpt"), kind(own), **state) == {}
    # A link in the run's folder is no file of it.
    (own / "link.ckpt").symlink_to(other / "foreign.ckpt")
    assert believed(own / "link.ckpt", kind(own), **state) == {}


@pytest.mark.parametrize(
    "path",
    [
        "local://{victim}",
        "file://{victim}",
        "memory://{victim}",
        "{victim}",
        "{own}/../victim.ckpt",
        "{own}/link.ckpt",
        "{own}/archive",
        "{own}",
        "{own}/gone.ckpt",
        "victim.ckpt",
        "",
    ],
)
def test_of_an_own_checkpoint_only_checkpoints_in_its_folder_are_believed(tmp_path, path):
    own, victim = tmp_path / "own", tmp_path / "victim.ckpt"
    checkpoint = written(own / "last.ckpt")
    victim.mkdir()
    (own / "archive").mkdir()
    (own / "link.ckpt").symlink_to(victim)
    named = path.format(own=own, victim=victim)
    for was in (str(own), str(tmp_path), "local:///", "/", named):
        paths = dict.fromkeys(["best_model_path", "kth_best_model_path", "last_model_path"], named)
        models = {named: torch.tensor(1.0)}
        found = believed(checkpoint, ModelCheckpoint(own), **paths, best_k_models=models, dirpath=was)
        assert [found[name] for name in paths] == ["", "", ""]
        assert (found["best_k_models"], found["dirpath"]) == ({}, str(own))


@pytest.mark.parametrize("was", ["own", "moved"])
def test_a_run_that_goes_on_keeps_its_best_and_forgets_those_that_have_gone(tmp_path, was):
    folder = tmp_path / "own"
    scores = {"a": 3.0, "b": 5.0, "gone": 4.0, "c": 2.0}
    for name in ("a", "b", "c", "last"):
        written(folder / f"{name}.ckpt")
    models = {str(tmp_path / was / f"{name}.ckpt"): torch.tensor(score) for name, score in scores.items()}
    callback = ModelCheckpoint(folder, monitor="reward", mode="max", save_top_k=4)
    names = {"best_model_path": "b", "kth_best_model_path": "c", "last_model_path": "last"}
    paths = {name: str(tmp_path / was / f"{each}.ckpt") for name, each in names.items()}
    found = believed(folder / "last.ckpt", callback, **paths, best_k_models=models, dirpath=str(tmp_path / was))
    callback.load_state_dict(found)
    assert {Path(path).stem: float(score) for path, score in callback.best_k_models.items()} == {
        name: score for name, score in scores.items() if name != "gone"
    }
    assert [callback.best_model_path, callback.kth_best_model_path, callback.last_model_path] == [
        str(folder / f"{name}.ckpt") for name in ("b", "c", "last")
    ]


def test_a_store_of_objects_keeps_its_best():
    callback, bucket = ModelCheckpoint("s3-like"), "s3://bucket/run"
    callback.dirpath = bucket
    state = {"dirpath": bucket, "best_model_path": f"{bucket}/a.ckpt", "last_model_path": "s3://bucket/other/b.ckpt"}
    found = believed(f"{bucket}/last.ckpt", callback, **state)
    assert (found["best_model_path"], found["last_model_path"]) == (f"{bucket}/a.ckpt", "")
    assert believed("s3://bucket/run/../other/last.ckpt", callback, **state) == {}


def test_no_other_callback_of_lightning_keeps_a_path():
    """This names the behaviour relied upon: of all states it is those of one class that name files."""
    kinds = [each for each in vars(lightning_callbacks).values() if isinstance(each, type)]
    keep = {each.__name__ for each in kinds if "load_state_dict" in vars(each) and each.__name__ != "Callback"}
    assert keep == {
        *("BackboneFinetuning", "BaseFinetuning", "EarlyStopping", "ModelCheckpoint", "StochasticWeightAveraging"),
        *("Timer", "WeightAveraging"),
    }
    assert issubclass(OnExceptionCheckpoint, Checkpoint)
    assert OnExceptionCheckpoint("somewhere").state_dict() == {}


@pytest.mark.parametrize("field", ["best_model_path", "last_model_path"])
def test_a_run_continues_a_foreign_checkpoint_and_removes_nothing_that_it_names(tmp_path, finished, field):
    victim = tmp_path / "home" / "documents"
    victim.mkdir(parents=True)
    saved = load_data(finished)
    (key,) = [key for key in saved["callbacks"] if key.startswith("ModelCheckpoint")]
    saved["callbacks"][key][field] = f"local://{victim}"
    foreign = written(tmp_path / "downloads" / "foreign.ckpt", saved)
    keeps = ModelCheckpoint(tmp_path / "own", every_n_train_steps=1, filename="{step}", save_last=True)
    run = trainer(tmp_path, max_steps=2, callbacks=[keeps], enable_checkpointing=True)
    run.fit(module(), loader(), ckpt_path=foreign)
    assert run.global_step == 2
    assert victim.is_dir()
    assert sorted(os.listdir(tmp_path / "own")) == ["last.ckpt", "step=2.ckpt"]


def test_a_run_whose_folder_was_moved_keeps_as_many_checkpoints_as_before(tmp_path, finished):
    shutil.copytree(finished.parent, tmp_path / "moved")
    assert sorted(os.listdir(tmp_path / "moved")) == ["last.ckpt", "step=1.ckpt"]
    keeps = ModelCheckpoint(tmp_path / "moved", every_n_train_steps=1, filename="{step}", save_last=True)
    run = trainer(tmp_path, max_steps=2, callbacks=[keeps], enable_checkpointing=True)
    run.fit(module(), loader(), ckpt_path=tmp_path / "moved" / "last.ckpt")
    assert sorted(os.listdir(tmp_path / "moved")) == ["last.ckpt", "step=2.ckpt"]
    assert (finished.parent / "step=1.ckpt").is_file()


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


@pytest.mark.slow
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
