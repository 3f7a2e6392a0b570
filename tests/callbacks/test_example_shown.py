"""An example that was learnt, as the demo prints it."""

from types import SimpleNamespace

import torch

from dmpo_lightning import Sudoku
from dmpo_lightning.callbacks.example_shown import KEPT, LearntExample
from dmpo_lightning.tasks.base import Task

PUZZLE = {"puzzle": "1234341223414100", "solution": "1234341223414123"}


class Echo(Task):
    accuracy = "correct"

    def examples(self, split):
        return [{"text": "say \x1b[2J"}]

    def prompt(self, example):
        return example["text"]

    def score(self, example, completion):
        return {"correct": 0.0}


def batch(correct, texts, example=PUZZLE, index=7):
    """The parts of an `EvaluatedBatch` that are looked at."""
    return SimpleNamespace(
        prompt_index=[index],
        examples=[example],
        completions=[texts],
        values=SimpleNamespace(correct=torch.tensor([correct])),
    )


def test_a_learnt_puzzle_is_drawn_beside_both_answers():
    shown = LearntExample()
    shown.note_before(batch([False], ["<answer>1234341223414132</answer>"]))
    shown.note_after(batch([True], ["<answer>1234341223414123</answer>"]))
    assert shown.to_text(Sudoku()).splitlines() == [
        "An example that was learnt:",
        "question     before       after",
        "1 2 | 3 4    1 2 | 3 4    1 2 | 3 4",
        "3 4 | 1 2    3 4 | 1 2    3 4 | 1 2",
        "----+----    ----+----    ----+----",
        "2 3 | 4 1    2 3 | 4 1    2 3 | 4 1",
        "4 1 | . .    4 1 | 3 2    4 1 | 2 3",
    ]


def test_an_answer_without_digits_is_an_empty_grid():
    assert Sudoku().drawn(PUZZLE, "\x1b[2J no idea").splitlines()[0] == ". . | . ."


def test_what_was_right_before_was_not_learnt():
    shown = LearntExample()
    shown.note_before(batch([True], ["x"]))
    shown.note_after(batch([True], ["x"]))
    assert shown.to_text(Sudoku()) == ""


def test_a_task_without_drawings_shows_its_texts_and_nothing_that_a_terminal_obeys():
    shown, example = LearntExample(), {"text": "say \x1b[2J"}
    shown.note_before(batch([False], ["\x07"], example))
    shown.note_after(batch([True], ["a\nb<|eot_id|><|eot_id|>"], example))
    assert shown.to_text(Echo()).splitlines() == [
        "An example that was learnt:",
        "prompt: say \\x1b[2J",
        "before: \\x07",
        "after: a\\nb",
    ]


def test_few_wrong_examples_are_remembered():
    shown = LearntExample()
    for index in range(2 * KEPT):
        shown.note_before(batch([False], ["x"], index=index))
    assert len(shown.wrong) == KEPT
