"""What an evaluation's report states of the data."""

from dmpo_lightning import GSM8K, MixtureDataModule, SudokuDataModule, Task, TaskDataModule
from dmpo_lightning.callbacks.evaluation_report import fact_lines, table, task_facts
from dmpo_lightning.evaluation.metrics import EvaluationResult
from dmpo_lightning.tasks.base import FACTS


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
    assert (facts["task"], facts["language"], facts["verifier"]) == ("Talk", "Dutch", None)


def test_the_facts_of_a_mixture_are_those_of_each_task():
    sudoku = SudokuDataModule(verifier="published", prompt_style="eval")
    facts = task_facts(MixtureDataModule({"four": sudoku, "own": TaskDataModule(Talkative())}))
    assert list(facts) == [*FACTS, "language"]
    assert facts["task"] == {"four": "Sudoku", "own": "Talk"}
    assert facts["verifier"] == {"four": "published", "own": None}
    assert facts["language"] == {"four": None, "own": "Dutch"}


def test_data_without_a_task_states_nothing():
    assert task_facts(None) == task_facts(object()) == dict.fromkeys(FACTS)


def test_a_template_is_stated_in_place_of_the_instruction_that_it_replaces():
    stated = task_facts(SudokuDataModule(prompt_template="{puzzle}"))
    assert (stated["prompt template"], stated["instruction"]) == ("{puzzle}", None)
    assert "prompt template" not in task_facts(SudokuDataModule())


def test_each_fact_is_one_line_that_no_terminal_obeys():
    lines = fact_lines({"instruction": "Say:\n" + 20 * "line\n", "sampler": {"\x1b[31mred": "A()"}, "n": 3})
    assert lines == [
        r"instruction  Say:\n" + 15 * r"line\n" + "... (105 characters)",
        r"sampler      \x1b[31mred: A()",
        "n            3",
    ]


def test_a_row_has_the_name_of_its_task_if_there_is_one():
    result = EvaluationResult("\x1b[31mred", 8, 2, {"accuracy": (0.5, 0.1)}, 10.0)
    assert table(None, [result])[1].split()[0] == r"\x1b[31mred"
    assert table("Own", [result])[1].split()[0] == r"Own/\x1b[31mred"


def test_the_facts_of_every_report_are_those_of_a_benchmark():
    assert list(GSM8K().facts()) == list(FACTS)
