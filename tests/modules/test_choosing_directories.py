"""A run lives in one directory, in which no other run writes, and goes on there."""

import csv
import re
import threading
from pathlib import Path

import pytest
import torch
from dmpo_runs import trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from dmpo_lightning.commands.fit import newest_checkpoint
from dmpo_lightning.modules.run_directory import choose_directory, run_directory

DATE = r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(_\d)?"
LOGGERS = {
    "named": (lambda: TensorBoardLogger("runs", name="mine"), f"runs/mine/{DATE}", f"runs/mine/{DATE}"),
    "a text": (lambda: TensorBoardLogger("runs", name="mine", version="a"), "runs/mine/a", "runs/mine/a_2"),
    "a number": (lambda: CSVLogger("runs", version=3), "runs/lightning_logs/version_3", "runs/.*/version_3_2"),
    "with slashes": (lambda: CSVLogger("runs", name="x/y", version="a/b"), "runs/x/y/a/b", "runs/x/y/a/b_2"),
    "a pattern": (lambda: CSVLogger("runs", name="[x]*", version="[a]"), r"runs/\[x\]\*/\[a\]", r"runs/.*/\[a\]_2"),
    "no name": (lambda: CSVLogger("out", name=None), f"out/{DATE}", f"out/{DATE}"),
    "neither": (lambda: CSVLogger("out", name="", version=""), "out", f"out/{DATE}"),
    "events deeper": (lambda: TensorBoardLogger("runs", name="m", sub_dir="e"), f"runs/m/{DATE}", f"runs/m/{DATE}"),
    "Lightning's": (lambda: True, f"home/lightning_logs/{DATE}", f"home/lightning_logs/{DATE}"),
    "none": (lambda: False, f"home/lightning_logs/{DATE}", f"home/lightning_logs/{DATE}"),
}


class Anything:
    checkpoint_keys = ()


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def begin(make, checkpoint=None, **options):
    run = trainer("home", logger=make(), **options)
    choose_directory(run, checkpoint)
    return run


def save(folder, step=4, **state):
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {}, "lr_schedulers": [], "global_step": step, **state}, folder / "last.ckpt")
    return folder / "last.ckpt"


@pytest.mark.parametrize("name", LOGGERS)
def test_no_run_writes_where_another_has_and_each_goes_on_in_its_own(name):
    make, *expected = LOGGERS[name]
    runs = [run_directory(begin(make)) for _ in expected]
    for run, pattern in zip(runs, expected, strict=True):
        assert re.fullmatch(pattern, str(run))
    assert runs[0] != runs[1]
    for run in runs:
        last = save(run / "checkpoints")
        assert newest_checkpoint(trainer("home", logger=make()), Anything(), continues=True) == str(last.absolute())
        assert run_directory(begin(make, last)) == run


def test_another_version_is_another_run():
    versions = {name: lambda name=name: CSVLogger("runs", name="mine", version=name) for name in ("a", "a_b", "a_2")}
    last = {name: save(run_directory(begin(make)) / "checkpoints") for name, make in versions.items()}
    found = {
        name: newest_checkpoint(trainer("home", logger=make()), Anything(), continues=True)
        for name, make in versions.items()
    }
    assert found["a_b"] == str(last["a_b"].absolute())
    # A run of `a` that found its directory taken is called so.
    assert found["a"] == found["a_2"] == str(last["a_2"].absolute())
    new = trainer("home", logger=CSVLogger("runs", name="mine", version="new"))
    assert newest_checkpoint(new, Anything(), continues=True) is None
    assert run_directory(begin(lambda: CSVLogger("runs", name="mine", version="new"), last["a"])).name == "new"


def test_a_directory_that_holds_no_run_is_taken_as_it_is():
    Path("runs/mine/a").mkdir(parents=True)
    Path("runs/mine/a/job.log").write_text("")
    assert run_directory(begin(lambda: CSVLogger("runs", name="mine", version="a"))).name == "a"


@pytest.mark.parametrize("version", [None, "a"])
def test_runs_that_start_at_once_have_a_directory_each(version):
    runs = [trainer("home", logger=CSVLogger("runs", version=version)) for _ in range(8)]
    threads = [threading.Thread(target=choose_directory, args=[run]) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({run_directory(run) for run in runs}) == 8


def test_loggers_of_one_run_share_its_directory_and_its_continuation():
    def loggers():
        return [
            TensorBoardLogger("runs", name="run", version="a"),
            CSVLogger("runs", name="run", version="a"),
            CSVLogger("else"),
        ]

    for name in ("a", "a_2"):
        run = begin(loggers)
        assert [each.version for each in run.loggers[:2]] == [name, name]
    last = save(run_directory(run) / "checkpoints")
    assert [each.version for each in begin(loggers, last).loggers] == ["a_2", "a_2", "a_2"]


def test_a_run_is_known_by_its_record_where_its_checkpoints_lie_elsewhere():
    make = lambda: CSVLogger("runs", name="mine")  # noqa: E731
    first, second = (run_directory(begin(make)) for _ in range(2))
    for run in (first, second):
        (run / "run.json").write_text(f'{{"run":"{run.name}"}}')
        last = save(Path("kept") / run.name, callbacks={"RunRecorder": {"run": run.name}})
        assert run_directory(begin(make, last)) == run
    for hostile in ({}, [], {"RunRecorder": []}, {"RunRecorder": {"run": "../.."}}, {"RunRecorder": {"run": None}}):
        last = save(Path("kept"), callbacks=hostile)
        assert run_directory(begin(make, last)) not in (first, second)


def test_what_comes_again_is_not_logged_twice():
    def loggers():
        # As the command line makes them, which gives every option.
        board = TensorBoardLogger("runs", name="m", version="a", purge_step=None)
        return [board, CSVLogger("runs", name="m", version="a")]

    def log(run, steps):
        for logger in run.loggers:
            logger.log_hyperparams({"seed": 1})
            for step in steps:
                logger.log_metrics({"loss": float(step), f"from_{steps[0]}": 1.0}, step)
                logger.save()
            logger.finalize("success")
        # TensorBoard reads files by their names, in which those of one second and process are not in order.
        for path in run_directory(run).glob("events.out.tfevents.1*"):
            path.rename(path.with_name(f"events.out.tfevents.0{len(list(path.parent.glob('events*.0?')))}"))

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = begin(loggers)
    log(run, range(7))
    with Path("runs/m/a/metrics.csv").open("a") as file:
        file.write("5.0")
    for step, end in ((4, 12), (8, 9), (2, 4)):
        # A validation is logged with the step before, and made again where the checkpoint came before it.
        (run_directory(run) / "metrics.jsonl").write_text(f'{{"kind": "validation", "step": {step}}}\n')
        log(begin(loggers, save(run_directory(run) / "checkpoints", step)), range(step - 1, end))
        events = EventAccumulator(str(run_directory(run)))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            steps = [event.step for event in events.Scalars(tag)]
            assert sorted(set(steps)) == steps, tag
        assert [event.step for event in events.Scalars("loss")] == list(range(end))
        rows = [row for path in run_directory(run).glob("metrics*.csv") for row in csv.DictReader(path.open())]
        assert sorted(int(row["step"]) for row in rows) == list(range(end))


def test_latest_leads_to_the_run_that_trained_last_and_takes_nothings_place(tmp_path):
    make = lambda: TensorBoardLogger("runs", name="mine")  # noqa: E731
    link = Path("runs/mine/latest")
    for _ in range(2):
        run = run_directory(begin(make))
        assert (link.is_symlink(), str(link.readlink())) == (True, run.name)
    test = trainer("home", logger=make())
    choose_directory(test, kind="_test")
    assert run_directory(test).name == Path("runs/mine/latest_test").readlink().name
    assert re.fullmatch(rf"{DATE}_test", run_directory(test).name.removesuffix("_2"))
    assert str(link.readlink()) == run.name
    link.unlink()
    link.mkdir()
    begin(make)
    assert not link.is_symlink()
    assert not list(tmp_path.rglob(".latest*"))


def leave_traces(folder):
    """What a run has written when its first step fails."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("{}")
    (folder / "run.json").write_text("{}")
    (folder / "rollouts").mkdir()
    (folder / "rollouts/before.jsonl").write_text("")
    (folder / "metrics.jsonl").write_text('{"kind":"base"}\n')


@pytest.mark.parametrize("name", LOGGERS)
def test_a_start_of_which_nothing_comes_leaves_nothing(tmp_path, name):
    run = trainer("home", logger=LOGGERS[name][0]())
    start = choose_directory(run)
    for logger in run.loggers:
        logger.log_hyperparams({"seed": 1})
        logger.save()
    leave_traces(run_directory(run))
    assert start.undo()
    assert list(tmp_path.iterdir()) == []
    # A version that was given is free again.
    again = run_directory(begin(LOGGERS[name][0]))
    assert re.fullmatch(LOGGERS[name][1], str(again))


def test_a_start_removes_nothing_that_others_wrote(tmp_path):
    make = lambda: CSVLogger("runs", name="mine", version="a")  # noqa: E731
    Path("runs/mine/a").mkdir(parents=True)
    Path("runs/mine/a/job.log").write_text("")
    first = trainer("home", logger=CSVLogger("runs", name="mine"))
    choose_directory(first)
    for _ in range(2):
        run = trainer("home", logger=make())
        start = choose_directory(run)
        assert run_directory(run).name == Path("runs/mine/latest").readlink().name == "a"
        leave_traces(run_directory(run))
        assert start.undo()
        assert [each.name for each in Path("runs/mine/a").iterdir()] == ["job.log"]
        assert Path("runs/mine/latest").readlink().name == run_directory(first).name


@pytest.mark.parametrize("kept", ["checkpoints/last.ckpt", "rollouts/rank0-000000.jsonl", "metrics.jsonl"])
def test_what_has_become_of_a_start_stays(kept):
    run = trainer("home", logger=CSVLogger("runs", name="mine"))
    start = choose_directory(run)
    leave_traces(run_directory(run))
    (run_directory(run) / kept).parent.mkdir(exist_ok=True)
    (run_directory(run) / kept).write_text('{"kind":"guard"}\n')
    assert not start.undo()
    assert (run_directory(run) / "config.yaml").is_file()


def test_a_checkpoint_from_elsewhere_begins_a_directory():
    last = save(Path("runs/other/version_3/checkpoints"))
    run = begin(lambda: TensorBoardLogger("runs", name="mine"), last)
    assert re.fullmatch(f"runs/mine/{DATE}", str(run_directory(run)))
    # Without a logger all of these lie below the Trainer's own folder.
    save(Path("home/runs/mine/checkpoints"))
    assert run_directory(begin(lambda: False, "home/runs/mine/checkpoints/last.ckpt")).parent.name == "lightning_logs"


def test_a_trial_takes_no_directory(tmp_path):
    begin(lambda: TensorBoardLogger("runs"), fast_dev_run=1)
    begin(lambda: False, fast_dev_run=1)
    assert list(tmp_path.iterdir()) == []


def test_folders_of_checkpoints_of_ones_own_are_searched_too():
    run = trainer("home", callbacks=[ModelCheckpoint("kept")], enable_checkpointing=True)
    assert newest_checkpoint(run, Anything(), continues=True) is None
    last = save(Path("kept"))
    assert newest_checkpoint(run, Anything(), continues=True) == str(last.absolute())
