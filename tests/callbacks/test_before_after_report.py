"""What the report before and after prints and writes, also where its folder cannot be written."""

import json
import warnings

import pytest
from dmpo_runs import module, trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from test_run_directory import Held

from dmpo_lightning import BeforeAfterReport, ConfidenceSampler, ProgressLine, RunRecorder, Sudoku
from dmpo_lightning.callbacks.before_after import learnt_example
from dmpo_lightning.callbacks.completion_records import drawings
from dmpo_lightning.reports.lines import encoded, read_lines, replace

PUZZLE = {"puzzle": "1234341223414100", "solution": "1234341223414123"}
SAMPLERS = {"temperature_1": ConfidenceSampler(denoising_steps=4), "greedy": ConfidenceSampler(temperature=0.0)}


def fit(folder, report, *callbacks, datamodule=None, **options):
    flags = {"max_steps": 4, "max_epochs": -1} | options
    run = trainer(folder, callbacks=[report, *callbacks], **flags)
    run.fit(module(), datamodule=datamodule or Held())
    return run


def test_the_table_is_printed_and_what_is_lost_is_said_where_no_file_can_be_written(tmp_path, capsys):
    occupied = tmp_path / "occupied"
    occupied.write_text("a file stands where the folder would be")
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        run = fit(occupied, BeforeAfterReport(SAMPLERS), ProgressLine(), enable_progress_bar=True)
    assert run.global_step == 4
    shown = capsys.readouterr()
    assert "before, temperature_1" in shown.out
    assert "after, greedy" in shown.out
    assert "Evaluating the base on 6 held-out examples with 2 samplers ..." in shown.err.splitlines()
    said = [str(each.message) for each in given if "could not be written" in str(each.message)]
    assert len(said) == 1
    assert said[0].startswith(f"summary.json and learning_curve.png could not be written to {occupied}: [Errno ")


def test_a_sampler_that_is_evaluated_again_is_among_the_samplers():
    with pytest.raises(ValueError, match="must contain 'hot'"):
        BeforeAfterReport(SAMPLERS, sampled="hot")


def test_each_metric_of_the_curve_has_the_base_of_its_own_sampler(tmp_path):
    report = BeforeAfterReport(SAMPLERS)
    fit(tmp_path, report, RunRecorder())
    before = json.loads((tmp_path / "summary.json").read_text())["before"]
    curve = {"val/greedy/accuracy": "greedy", "val/sampled/accuracy": "temperature_1"}
    assert report.bases() == {
        metric: (sampler, before[sampler]["accuracy"]["mean"]) for metric, sampler in curve.items()
    }
    assert (tmp_path / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_record_has_the_base_by_the_names_of_validations_and_what_both_evaluations_took(tmp_path):
    report = BeforeAfterReport(SAMPLERS)
    run = fit(tmp_path, report, RunRecorder(), val_check_interval=4, datamodule=Validated())
    lines = {line["kind"]: line for line in read_lines(tmp_path / "metrics.jsonl")}
    base, validation = lines["base"]["values"], lines["validation"]["values"]
    assert {*validation} - {*base} == {"time/validation", *(name for name in validation if "tokens_per" in name)}
    mean, error = report.before["greedy"]["accuracy"]
    assert (base["val/greedy/accuracy"], base["val/greedy/accuracy_stderr"]) == (mean, error)
    assert lines["base"]["examples"] == json.loads((tmp_path / "summary.json").read_text())["examples"] == 6
    assert min(lines[kind]["values"]["time/evaluation"] for kind in ("base", "after")) > 0
    assert lines["after"]["step"] == run.global_step


def test_a_picture_that_a_task_cannot_draw_of_a_completion_ends_no_run():
    class Careless(Sudoku):
        def show(self, example, completion):
            return completion and completion.split("=")[1]

    assert drawings(Careless(), {}, "1=2") == {"drawings": ["", "2"]}
    assert drawings(Careless(), {}, "1") == {}


def recorded(folder, **records):
    for moment, lines in records.items():
        replace(folder / f"{moment}.jsonl", b"".join(map(encoded, lines)))
    return learnt_example(folder).splitlines()


def test_a_learnt_puzzle_is_drawn_beside_both_answers(tmp_path):
    before, after = (
        {"drawings": [Sudoku().show(PUZZLE, each) for each in (None, f"<answer>{digits}</answer>")]}
        for digits in ("1234341223414132", "1234341223414123")
    )
    # Of three puzzles it is the one that was wrong and is right.
    others = [{"prompt_index": 0, "correct": True}, {"prompt_index": 1, "correct": False}]
    before, after = ({"prompt_index": 2, "correct": each is after} | each for each in (before, after))
    shown = recorded(tmp_path, before=[*others, before], after=[*others, after])
    assert shown == [
        "An example that was learnt:",
        "question     before       after",
        "1 2 | 3 4    1 2 | 3 4    1 2 | 3 4",
        "3 4 | 1 2    3 4 | 1 2    3 4 | 1 2",
        "----+----    ----+----    ----+----",
        "2 3 | 4 1    2 3 | 4 1    2 3 | 4 1",
        "4 1 | . .    4 1 | 3 2    4 1 | 2 3",
    ]


def test_an_answer_without_digits_is_an_empty_grid():
    assert Sudoku().show(PUZZLE, "\x1b[2J no idea").splitlines()[0] == ". . | . ."


def test_an_example_without_drawings_is_shown_in_texts_and_nothing_that_a_terminal_obeys(tmp_path):
    each = {"prompt_index": 0, "prompt": "say \x1b[2J"}
    before, after = each | {"completion": "\x07"}, each | {"completion": "a\nb<|eot_id|><|eot_id|>"}
    assert recorded(tmp_path, before=[before | {"correct": False}], after=[after | {"correct": True}]) == [
        "An example that was learnt:",
        "prompt: say \\x1b[2J",
        "before: \\x07",
        "after: a\\nb",
    ]


def test_where_nothing_was_learnt_nothing_is_shown(tmp_path):
    assert recorded(tmp_path, before=[{"prompt_index": 0, "correct": False}]) == []


class Interrupts(Callback):
    """As Ctrl-C, in the validation of the last step."""

    def on_validation_batch_end(self, *arguments):
        raise KeyboardInterrupt


class Validated(Held):
    def val_dataloader(self):
        return self.test_dataloader()


@pytest.mark.slow
def test_a_run_that_ended_behind_its_last_step_gets_its_validation_and_its_results(tmp_path):
    def run(folder, *callbacks, ckpt_path=None):
        saves = ModelCheckpoint(folder, every_n_train_steps=1, save_last=True)
        report = [BeforeAfterReport(SAMPLERS), *callbacks, RunRecorder(), saves]
        fit = trainer(folder, callbacks=report, max_steps=1, val_check_interval=1, enable_checkpointing=True)
        fit.fit(module(), datamodule=Validated(), ckpt_path=ckpt_path)

    def left(folder):
        lines = [(line["kind"], line["step"], line["values"].keys()) for line in read_lines(folder / "metrics.jsonl")]
        return json.loads((folder / "summary.json").read_text()) | {"seconds": None}, lines

    run(tmp_path / "whole")
    with pytest.raises(SystemExit):
        run(tmp_path / "cut", Interrupts())
    assert not (tmp_path / "cut" / "summary.json").exists()
    run(tmp_path / "cut", ckpt_path=tmp_path / "cut" / "last.ckpt")
    assert left(tmp_path / "cut") == left(tmp_path / "whole")
