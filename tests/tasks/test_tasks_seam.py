"""What a task of one's own must bring and what it may: in the score command, in training and in evaluations."""

import json

import pytest
import torch

from dmpo_lightning import GSM8K, JsonlPairs, LatinSquareDemonstrations, Math500, Sudoku, Task
from dmpo_lightning.commands.score import score_file
from dmpo_lightning.rewards.reward import Reward
from dmpo_lightning.tasks.base import Share, Verdict


class Parity(Task):
    """Only the four members that a task needs."""

    accuracy = "right"

    def examples(self, split):
        return [{"number": number} for number in range(4)]

    def prompt(self, example):
        return f"Is {example['number']} even or odd?"

    def score(self, example, completion):
        return {"right": float(completion == ("even", "odd")[example["number"] % 2]), "length": float(len(completion))}


class Letters(Parity):
    """Words to be spelled, right letter by letter."""

    accuracy = "right_letters"
    check_name = "strict"

    def examples(self, split):
        return [{"word": "abcd"}]

    def score(self, example, completion):
        return {"length": float(len(completion))}

    def check(self, example, completion):
        right = sum(a == b for a, b in zip(example["word"], completion, strict=False))
        return Verdict(
            completion, completion == example["word"], Share(right, len(example["word"]), "right_letters", "letters")
        )


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_task_of_four_members_is_scored_by_its_accuracy(tmp_path):
    rows = [{"example": {"number": 1}, "completion": text} for text in ("odd", "even", "")]
    assert score_file(Parity(), write(tmp_path / "a.jsonl", *rows)) == {"n": 3, "correct": 1, "accuracy": 1 / 3}


def test_a_task_of_four_members_states_the_rest_by_default():
    task = Parity()
    assert not task.has_check
    assert task.check({"number": 1}, "odd") == Verdict(None, True)
    assert task.facts() == {
        "task": "Parity",
        "prompt style": None,
        "system prompt": None,
        "instruction": None,
        "few-shot examples": 0,
        "prefill": None,
        "rewards": None,
        "check": None,
    }


def test_the_reward_of_such_a_task_checks_nothing_in_an_evaluation():
    scores = Reward.of_task(Parity())([{"number": 1}], [["odd", "no"]], raw=[["odd<|eot|>", "no<|eot|>"]])
    assert scores.verdicts is None
    assert scores.components["right"].tolist() == [[1, 0]]


def test_a_record_without_an_example_is_refused_by_the_name_of_the_task(tmp_path):
    file = write(tmp_path / "a.jsonl", {"question": "?", "ground_truth": "1", "completion": "1"})
    with pytest.raises(ValueError, match="row 1: Parity makes no example of `question` and `ground_truth`"):
        score_file(Parity(), file)


def test_the_share_of_a_task_of_ones_own_has_the_names_that_it_gives(tmp_path):
    rows = [{"example": {"word": "abcd"}, "completion": text} for text in ("abcd", "abxx", "")]
    assert score_file(Letters(), write(tmp_path / "a.jsonl", *rows)) == {
        "n": 3,
        "correct": 1,
        "accuracy": 6 / 12,
        "right_letters": 6,
        "letters": 12,
    }


def test_an_evaluation_reports_the_share_of_the_raw_text_under_that_name():
    reward = Reward.of_task(Letters(), {"length": 1.0})
    scores = reward([{"word": "abcd"}], [["abcd", "ab"]], raw=[["ab", "abcx"]])
    assert scores.total.tolist() == [[4, 2]]
    assert scores.components["right_letters"].tolist() == [[0.5, 0.75]]
    assert scores.components["correct"].tolist() == [[0, 0]]
    assert scores.accuracy == "right_letters"


def test_a_share_of_no_parts_is_that_of_the_whole():
    assert Verdict("", True, Share(0, 0)).components == {"share": 1.0, "correct": 1.0}
    assert Verdict("", False, Share(0, 0)).components == {"share": 0.0, "correct": 0.0}


def test_a_benchmark_with_a_score_of_its_own_keeps_its_check():
    class Polite(GSM8K):
        def score(self, example, completion):
            return super().score(example, completion) | {"please": 1.0}

    scores = Reward.of_task(Polite(), {"please": 2.0})([{"question": "?", "answer": "1"}], [["1"]], raw=[["1"]])
    assert scores.total.tolist() == [[2]]
    assert scores.components["correct"].tolist() == [[1]]


def test_facts_are_those_of_a_benchmarks_options():
    facts = Math500(rewards="published", prompt_style="eval", system_prompt="Think.", instruction="").facts()
    assert facts["task"] == "Math500"
    assert (facts["rewards"], facts["check"], facts["prompt style"]) == ("published", "verified", "eval")
    assert (facts["system prompt"], facts["instruction"], facts["prefill"]) == ("Think.", "", "<reasoning>")
    assert Sudoku(check=None).facts()["check"] is None


def test_a_misspelt_split_is_refused(tmp_path):
    pairs = JsonlPairs(str(write(tmp_path / "a.jsonl", {"prompt": "1", "completion": "2"})))
    for task in (pairs, Sudoku(), LatinSquareDemonstrations(size=2)):
        with pytest.raises(ValueError, match="`split` must be one of train, validation, test, got 'tran'"):
            task.examples("tran")


def test_an_empty_check_is_refused():
    with pytest.raises(ValueError, match="`check` must be one of published, verified, got ''"):
        Sudoku(check="")


def test_a_reward_that_counts_the_check_counts_what_is_reported():
    """Total and component come of one verdict, which has read the special tokens where they are given."""
    reward = Reward.of_task(Letters(), {"correct": 3.0})
    scores = reward([{"word": "ab"}], [["ab", "a"]], raw=[["a", "ab"]])
    assert torch.equal(scores.total, torch.tensor([[0.0, 3.0]]))
    assert scores.components["correct"].tolist() == [[0, 1]]
