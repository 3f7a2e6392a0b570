"""What an evaluation leaves: its completions, also of runs that end early, and what is stated of the data."""

import json
import signal

import pytest
from dmpo_runs import loader, module, trainer

from dmpo_lightning import (
    GSM8K,
    EvaluationReport,
    MixtureDataModule,
    PromptLoader,
    SudokuDataModule,
    Task,
    TaskDataModule,
    load_tokenizer,
)
from dmpo_lightning.callbacks.evaluation import fact_lines, table
from dmpo_lightning.callbacks.facts import task_facts
from dmpo_lightning.evaluation.metrics import EvaluationResult
from dmpo_lightning.tasks.base import FACTS


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_an_interrupted_run_leaves_readable_lines(tmp_path):
    calls = []

    def stops_at_the_fifth(example, completion):
        calls.append(example)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        return 1.0

    dmpo = module(reward=stops_at_the_fifth, validation_samplers=None)
    with pytest.raises(SystemExit):
        trainer(tmp_path, callbacks=[EvaluationReport()]).test(dmpo, loader(2, shuffle=False))
    assert [record["index"] for record in lines(tmp_path / "completions.jsonl")] == [0, 1, 2, 3]


def test_validate_test_and_predict_write_the_same_records(tmp_path):
    written = {}
    for verb in ("validate", "test", "predict"):
        run = trainer(tmp_path / verb, callbacks=[EvaluationReport()])
        getattr(run, verb)(module(), loader(4, shuffle=False))
        written[verb] = lines(tmp_path / verb / "completions.jsonl")
    assert written["validate"] == written["test"] == written["predict"]
    assert [record["index"] for record in written["test"]] == [index for index in range(6) for _ in range(2)]
    assert {record["sampler"] for record in written["test"]} == {"sampled", "greedy"}


def test_a_second_evaluation_starts_the_file_anew(tmp_path):
    run = trainer(tmp_path, callbacks=[EvaluationReport()])
    for _ in range(2):
        run.test(module(), loader(4, shuffle=False), verbose=False)
        assert len(lines(tmp_path / "completions.jsonl")) == 12


def test_validation_while_fitting_writes_nothing(tmp_path):
    run = trainer(tmp_path, max_steps=1, val_check_interval=1, callbacks=[EvaluationReport()])
    run.fit(module(), loader(), loader(3, shuffle=False))
    assert not (tmp_path / "completions.jsonl").exists()


def test_characters_that_end_lines_elsewhere_and_half_surrogates_stay_within_their_record(tmp_path):
    texts = ["a\u2028b", "\u2029", "\x85", "\x0b\x0c\x1c\x1d\x1e", "\r", "\ud800"]
    rows = [{"prompt": text, "digit": "1"} for text in texts]
    # The model gets digits only. The texts are in the examples that are written.
    data = PromptLoader(rows, load_tokenizer("sudoku_tiny"), batch_size=2, prompt=lambda _: "1 2", shuffle=False)
    trainer(tmp_path, callbacks=[EvaluationReport()]).test(module(), data)
    written = lines(tmp_path / "completions.jsonl")
    assert [record["example"]["prompt"] for record in written] == [text for text in texts for _ in range(2)]


class Own(Task):
    accuracy = "right"
    prefill = "<"

    def examples(self, split):
        return [{"word": "1"}]

    def prompt(self, example):
        return example["word"]

    def score(self, example, completion):
        return {"right": 1.0}


class Talkative(Own):
    def facts(self):
        return {"task": "Talk", "language": "Dutch"}


def test_a_task_states_its_own_facts_and_what_it_leaves_out_is_none():
    assert task_facts(TaskDataModule(Own()))["prefill"] == "<"
    facts = task_facts(TaskDataModule(Talkative()))
    assert list(facts) == [*FACTS, "language"]
    assert (facts["task"], facts["language"], facts["check"]) == ("Talk", "Dutch", None)


def test_the_facts_of_a_mixture_are_those_of_each_task():
    sudoku = SudokuDataModule(check="published", prompt_style="eval")
    facts = task_facts(MixtureDataModule({"four": sudoku, "own": TaskDataModule(Talkative())}))
    assert list(facts) == [*FACTS, "language"]
    assert facts["task"] == {"four": "Sudoku", "own": "Talk"}
    assert facts["check"] == {"four": "published", "own": None}
    assert facts["language"] == {"four": None, "own": "Dutch"}


def test_data_without_a_task_states_nothing():
    assert task_facts(None) == task_facts(object()) == dict.fromkeys(FACTS)


def test_a_template_is_stated_in_place_of_the_instruction_that_it_replaces():
    stated = task_facts(SudokuDataModule(prompt_template="{puzzle}"))
    assert (stated["prompt template"], stated["instruction"]) == ("{puzzle}", None)
    assert "prompt template" not in task_facts(SudokuDataModule())


def test_each_fact_is_one_line_that_no_terminal_obeys():
    lines = fact_lines({"instruction": "Say:\n" + 200 * "line\n", "sampler": {"\x1b[31mred": "A()"}, "n": 3})
    assert lines == [
        r"instruction  Say:\n" + 39 * r"line\n" + " ... " + 80 * r"line\n",
        r'sampler      {"\u001b[31mred": "A()"}',
        "n            3",
    ]


def test_a_row_has_the_name_of_its_task_if_there_is_one():
    result = EvaluationResult("\x1b[31mred", 8, 2, {"accuracy": (0.5, 0.1)}, 10.0)
    assert table(None, [result])[1].split()[0] == r"\x1b[31mred"
    assert table("Own", [result])[1].split()[0] == r"Own/\x1b[31mred"


def test_the_facts_of_every_report_are_those_of_a_benchmark():
    assert list(GSM8K().facts()) == list(FACTS)
