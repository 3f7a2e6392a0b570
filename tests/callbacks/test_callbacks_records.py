"""What a run records of itself: as it was, once, and whatever happens to the disk."""

import copy
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from dmpo_runs import TOKENIZER, loader, module, trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from dmpo_lightning import RunRecorder
from dmpo_lightning.modules.observers import RolloutObserver
from dmpo_lightning.reports.lines import read_lines


class Watcher(RolloutObserver):
    def __init__(self):
        self.seen = []

    def on_rollouts(self, trainer, module, buffer):
        self.seen.append(copy.copy(buffer))


def fit(folder, steps, *, callbacks=(), checkpoint=None, dmpo=None, **options):
    dmpo = module() if dmpo is None else dmpo
    flags = {"max_steps": steps, "max_epochs": -1, "val_check_interval": 4, "callbacks": list(callbacks)} | options
    run = trainer(folder, **flags)
    run.fit(dmpo, loader(), loader(3, shuffle=False), ckpt_path=checkpoint)
    return run


def rollouts(folder):
    files = sorted((folder / "rollouts").iterdir())
    return [record for path in files for record in read_lines(path)]


def metrics(folder):
    return list(read_lines(folder / "metrics.jsonl"))


def without_times(record):
    timed = {name: None for name in record["values"] if name.startswith("time/") or name.endswith("per_second")}
    values = record["values"] | timed
    return record | {"seconds": 0, "values": values}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run of four buffers that saves in the middle of the third, with what an observer saw."""
    folder, watcher = tmp_path_factory.mktemp("run"), Watcher()
    save = ModelCheckpoint(folder / "kept", every_n_train_steps=10, save_top_k=-1, filename="{step}")
    fit(folder, 16, callbacks=[watcher, RunRecorder(), save], enable_checkpointing=True)
    return folder, watcher.seen


def test_prompts_that_were_sampled_and_left_out_are_named(tmp_path):
    def differs_of_even_prompts(example, completion):
        return 0.0 if int(example["digit"]) % 2 else float(completion.count("1"))

    watcher = Watcher()
    dmpo = module(reward=differs_of_even_prompts, sampling_rounds=2, num_iterations=1, group_size=8)
    run = trainer(tmp_path, max_steps=4, max_epochs=-1, callbacks=[watcher, RunRecorder()])
    run.fit(dmpo, loader(6, shuffle=False))
    buffers = [record for record in metrics(tmp_path) if record["kind"] == "buffer"]
    assert [record["left_out"] for record in buffers] == [list(each.left_out) for each in watcher.seen]
    assert buffers[0]["left_out"] == [1, 3, 5]


def test_each_rollout_is_recorded_with_all_its_facts(recorded):
    folder, seen = recorded
    records = iter(rollouts(folder))
    for buffer in seen:
        facts = buffer.rollouts
        for row, group in enumerate(facts.completions):
            for column, completion in enumerate(group):
                record = next(records)
                assert (record["buffer"], record["rollout"]) == (buffer.number, column)
                assert record["prompt_index"] == int(facts.prompts.prompt_index[row])
                assert record["key"] == int(facts.keys[row, column])
                assert record["completion"] == completion
                assert facts.prompts.examples[row]["prompt"] in record["prompt"]
                assert record["reward"] == pytest.approx(float(facts.reward[row, column]), rel=1e-5)
                for name in ("weight", "signal", "log_rnd"):
                    assert record[name] == pytest.approx(float(buffer.targets[name][row, column]), rel=1e-5)
                assert record["reveal_step"] == facts.reveal_step[row, column].tolist()
                confidence = facts.sampled_log_prob[row, column].exp().tolist()
                assert record["confidence"] == pytest.approx(confidence, abs=5.1e-4)
                ids = facts.completion_ids[row, column].tolist()
                assert record["tokens"] == [TOKENIZER.decode([token]) for token in ids]
    assert next(records, None) is None


def test_metrics_have_a_line_per_buffer_and_validation(recorded):
    folder, seen = recorded
    lines = metrics(folder)
    assert [(line["kind"], line["step"], line["rollouts"]) for line in lines] == [
        (kind, step, 2 * step) for step in (4, 8, 12, 16) for kind in ("buffer", "validation")
    ]
    buffers = [line for line in lines if line["kind"] == "buffer"]
    for line, buffer in zip(buffers, seen, strict=True):
        assert line["values"]["reward/total"] == pytest.approx(buffer.means["reward/total"])
        assert {"weight/ess", "policy/log_rnd", "train/loss", "time/sampling"} <= set(line["values"])
        assert not any(name.startswith("val/") for name in line["values"])
        # Of this buffer, not of the one before.
        took = sum(line["values"][f"time/{part}"] for part in ("sampling", "scoring", "training"))
        assert line["values"]["rollouts/per_second"] == pytest.approx(8 / took, rel=1e-4)
    assert {"val/sampled/accuracy", "val/greedy/accuracy_stderr"} <= set(lines[1]["values"])
    seconds = [line["seconds"] for line in lines]
    assert seconds == sorted(seconds)
    facts = json.loads((folder / "run.json").read_text())
    assert (facts["model"], facts["seed"], facts["prompts"]) == ("sudoku_tiny", 0, {"train": 6, "validation": 6})
    assert facts["versions"]["torch"] == torch.__version__


def test_a_resumed_run_repeats_no_line_and_loses_none(recorded, tmp_path):
    folder, _ = recorded
    before = rollouts(folder), [without_times(line) for line in metrics(folder)]
    started = json.loads((folder / "run.json").read_text())["started"]
    (folder / "metrics.jsonl").open("a").write('{"kind":"buf')
    # In the third of four buffers, of which the files hold all.
    fit(folder, 16, callbacks=[RunRecorder()], checkpoint=folder / "kept" / "step=10.ckpt")
    assert rollouts(folder) == before[0]
    after = [without_times(line) for line in metrics(folder)]
    assert after == before[1]
    facts = json.loads((folder / "run.json").read_text())
    assert facts["started"] == started
    assert [each["step"] for each in facts["resumed"]] == [10]


@pytest.mark.slow
def test_a_new_run_in_the_same_folder_leaves_the_record_that_it_finds(tmp_path):
    """As programs with a Trainer of their own have it, whose runs have no directories."""
    fit(tmp_path, 4, callbacks=[RunRecorder()], val_check_interval=None)
    first = {name: (tmp_path / name).read_bytes() for name in ("run.json", "metrics.jsonl")}
    save = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=4)
    fit(tmp_path, 4, callbacks=[RunRecorder(), save], val_check_interval=None, enable_checkpointing=True)
    assert len(rollouts(tmp_path)) == 8
    assert len(metrics(tmp_path)) == 1
    assert len(list((tmp_path / "rollouts_part1").iterdir())) == 1
    for name, content in first.items():
        stem, suffix = name.split(".")
        assert (tmp_path / f"{stem}_part1.{suffix}").read_bytes() == content
    # A checkpoint of another run than the one whose record is found there.
    for name, content in first.items():
        (tmp_path / name).write_bytes(content)
    (checkpoint,) = (tmp_path / "kept").iterdir()
    fit(tmp_path, 8, callbacks=[RunRecorder()], val_check_interval=None, checkpoint=checkpoint)
    assert (tmp_path / "metrics_part2.jsonl").read_bytes() == first["metrics.jsonl"]
    assert [line["step"] for line in metrics(tmp_path)] == [8]


@pytest.mark.slow
def test_the_oldest_rollouts_go_where_there_are_too_many_bytes(tmp_path):
    fit(tmp_path / "all", 16, callbacks=[RunRecorder()], limit_val_batches=0)
    sizes = [path.stat().st_size for path in sorted((tmp_path / "all/rollouts").iterdir())]
    for most, left in ((sum(sizes[2:]), [2, 3]), (1, [3])):
        recorder = RunRecorder()
        recorder.max_bytes = most
        fit(tmp_path / str(most), 16, callbacks=[recorder], limit_val_batches=0)
        assert sorted({record["buffer"] for record in rollouts(tmp_path / str(most))}) == left


def test_rollouts_that_come_again_are_removed_those_of_ranks_that_are_no_more_too(recorded, tmp_path):
    shutil.copy(recorded[0] / "run.json", tmp_path)
    (tmp_path / "rollouts").mkdir()
    for name in ("rank0-000003", "rank3-000002", "rank3-000003", "before"):
        (tmp_path / f"rollouts/{name}.jsonl").write_text("")
    # In the third of four buffers.
    fit(tmp_path, 12, callbacks=[RunRecorder()], checkpoint=recorded[0] / "kept" / "step=10.ckpt", limit_val_batches=0)
    assert {path.stem for path in (tmp_path / "rollouts").iterdir()} == {"rank3-000002", "before"}


def test_fast_dev_run_writes_nothing(tmp_path):
    fit(tmp_path, -1, callbacks=[RunRecorder()], fast_dev_run=2, val_check_interval=None)
    assert list(tmp_path.iterdir()) == []


class Obstacles(Callback):
    """Also root, who may write to any folder, can write to none of these."""

    def on_train_start(self, trainer, pl_module):
        folder = Path(trainer.default_root_dir)
        (folder / "rollouts").write_text("a file")
        (folder / "metrics.jsonl").symlink_to("/dev/full")
        (folder / "run.json").mkdir()


def test_a_run_whose_record_cannot_be_written_goes_on_and_says_so_once(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = fit(tmp_path, 8, callbacks=[Obstacles(), RunRecorder()])
    assert run.global_step == 8
    said = [str(each.message) for each in caught if "The run goes on without" in str(each.message)]
    assert sorted(text.split()[5] for text in said) == ["metrics.jsonl", "rollouts", "run.json"]
    assert any("No space left on device" in text for text in said)
