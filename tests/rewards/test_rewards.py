import asyncio
import copy
import functools
import logging
import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction

import jaxtyping
import numpy
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

import worker_functions
from dmpo_lightning import GSM8K, CombinedScore, LatinSquareDemonstrations, Sudoku
from dmpo_lightning.evaluation.values import batch_values
from dmpo_lightning.rewards.reward import Reward
from dmpo_lightning.tasks.base import Share, Task, Verdict

EXAMPLES = [{"word": "a"}, {"word": "b"}]
TEXTS = [["a", "aa", "xx"], ["b", "a", ""]]


def components(example, completion):
    return {"count": float(completion.count(example["word"])), "length": float(len(completion))}


def failing_on(*bad: str):
    def score(example, completion):
        if completion in bad:
            raise KeyError(completion)
        return components(example, completion)

    return score


# Components and weights -----------------------------------------------------------------------------------------------


def test_without_weights_the_components_are_summed():
    scores = Reward(components)(EXAMPLES, TEXTS)
    assert scores.components["count"].tolist() == [[1, 2, 0], [1, 0, 0]]
    assert scores.components["length"].tolist() == [[1, 2, 2], [1, 1, 0]]
    assert scores.total.tolist() == [[2, 4, 2], [2, 1, 0]]
    assert scores.failures == 0


def test_weights_scale_the_components_and_leave_the_others_to_the_log():
    scores = Reward(components, weights={"count": 2.0})(EXAMPLES, TEXTS)
    assert scores.total.tolist() == [[2, 4, 0], [2, 0, 0]]
    assert set(scores.components) == {"count", "length"}
    scores = Reward(components, weights={"count": 2.0, "length": -0.5})(EXAMPLES, TEXTS)
    assert scores.total.tolist() == [[1.5, 3, -1], [1.5, -0.5, 0]]


@pytest.mark.parametrize("number", [float, int, bool, numpy.bool_, numpy.float32, torch.tensor, Fraction])
def test_a_function_that_returns_a_number_is_one_component(number):
    scores = Reward(lambda example, completion: number(example["word"] in completion))(EXAMPLES, TEXTS)
    assert set(scores.components) == {"reward"}
    assert scores.total.tolist() == [[1, 1, 0], [1, 0, 0]]
    assert scores.total.is_floating_point()


@pytest.mark.parametrize("number", [int, bool])
def test_components_may_be_whole_numbers_or_truth_values(monkeypatch, number):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it: annotations are not checked
    scores = Reward(lambda example, completion: {"right": number(example["word"] in completion)})(EXAMPLES, TEXTS)
    assert scores.total.tolist() == [[1, 1, 0], [1, 0, 0]]
    assert scores.total.is_floating_point()


def one_or_the_other(example, completion):
    return {"a": 1.0} if completion == "a" else {"b": 2.0}


def test_a_component_that_some_completions_lack_is_not_a_number_there_and_not_in_the_sum():
    scores = Reward(one_or_the_other)(EXAMPLES, TEXTS)
    assert scores.components["a"].nan_to_num(-1).tolist() == [[1, -1, -1], [-1, 1, -1]]
    assert scores.components["b"].nan_to_num(-1).tolist() == [[-1, 2, 2], [2, -1, 2]]
    assert scores.total.tolist() == [[1, 2, 2], [2, 1, 2]]
    assert scores.failures == 0


def test_a_later_call_may_lack_a_weighted_component():
    reward = Reward(one_or_the_other, weights={"a": 1.0, "b": 3.0})
    assert reward(EXAMPLES, TEXTS).total.tolist() == [[1, 6, 6], [6, 1, 6]]
    assert reward(EXAMPLES, [["a"], ["a"]]).total.tolist() == [[1], [1]]


def test_weights_of_a_component_that_is_not_returned_are_an_error_that_lists_what_is():
    with pytest.raises(ValueError, match=r"\['correct'\]; it returns \['count', 'length'\]"):
        Reward(components, weights={"correct": 1.0})(EXAMPLES, TEXTS)


def test_accuracy_is_the_reward_itself_unless_named():
    assert Reward(components).accuracy == "reward"
    assert Reward(components, accuracy="count").accuracy == "count"


def test_the_reward_of_a_task_is_its_score():
    task = Sudoku(sizes={"train": 2}, check="verified")
    reward = Reward.of_task(task, {"solved": 1.0})
    examples = task.examples("train")
    scores = reward(examples, [[example["solution"], ""] for example in examples])
    assert scores.total.tolist() == [[1, 0], [1, 0]]
    assert reward.accuracy == "correct"
    assert reward.check is not None
    assert reward.check(examples[0], examples[0]["solution"]).correct


def test_a_task_without_an_answer_check_gives_none():
    assert Reward.of_task(LatinSquareDemonstrations()).check is None


def test_the_settings_of_a_task_reward_are_those_of_its_call():
    reward = Reward.of_task(Sudoku(), failure_score=-1.0, max_failure_share=1.0, workers=1, time_limit=30.0)
    scores = reward([{"puzzle": "0" * 16, "solution": "1" * 16}, {"puzzle": "0" * 16}], [["1" * 16], ["1" * 16]])
    assert scores.total.tolist() == [[1], [-1]]
    reward.close()


def test_examples_and_completions_must_be_equally_many():
    with pytest.raises(ValueError, match=r"argument 2 is (shorter|longer)"):
        Reward(components)(EXAMPLES, TEXTS[:1])


# Several functions ---------------------------------------------------------------------------------------------------


def test_combined_functions_are_components_by_name():
    score = CombinedScore({"long": worker_functions.Longer(1), "half": worker_functions.half, "words": components})
    scores = Reward(score, weights={"long": 1.0, "half": 2.0, "words/count": -1.0})(EXAMPLES, TEXTS)
    assert list(scores.components) == ["long", "half", "words/count", "words/length"]
    assert scores.total.tolist() == [[0, 0, 2], [0, 1, 1]]


def test_combining_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one score function"):
        CombinedScore({})


def from_yaml(text: str) -> Reward:
    parser = ArgumentParser()
    parser.add_argument("--reward", type=Reward)
    return parser.instantiate(parser.parse_object({"reward": yaml.safe_load(text)})).reward


@pytest.mark.parametrize(
    "score",
    [
        "worker_functions.half",
        "{class_path: worker_functions.Longer, init_args: {than: 1}}",
        "{class_path: dmpo_lightning.CombinedScore, init_args: {functions: {short: worker_functions.half, long: "
        "{class_path: worker_functions.Longer, init_args: {than: 1}}}}}",
    ],
    ids=["function", "class", "several"],
)
def test_score_functions_are_named_in_yaml(score):
    reward = from_yaml(f"class_path: dmpo_lightning.Reward\ninit_args:\n  score: {score}")
    long = [[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]]
    expected = {"half": [[0.5] * 3] * 2, "Longer": long, "CombinedScore": [[x + 0.5 for x in row] for row in long]}
    name = getattr(reward.score, "__name__", type(reward.score).__name__)
    assert reward(EXAMPLES, TEXTS).total.tolist() == expected[name]


def test_weights_and_workers_are_named_in_yaml():
    text = """
    class_path: dmpo_lightning.Reward
    init_args:
      score: {class_path: dmpo_lightning.CombinedScore, init_args: {functions: {half: worker_functions.half}}}
      weights: {half: 3.0}
      workers: 1
      time_limit: 20
    """
    reward = from_yaml(text)
    assert reward(EXAMPLES, TEXTS).total.tolist() == [[1.5] * 3] * 2
    reward.close()


# Batches --------------------------------------------------------------------------------------------------------------


def test_batched_scoring_is_one_call_with_all_completions():
    scores = Reward(worker_functions.score_batch, batched=True)(EXAMPLES, TEXTS)
    assert scores.total.tolist() == [[6, 6, 6], [6, 6, 6]]


def test_batched_scoring_may_fail_on_one_completion():
    scores = Reward(worker_functions.score_batch, batched=True)(EXAMPLES, [["a", "nan"], ["a", "b"]])
    assert scores.total.tolist() == [[4, 0], [4, 4]]
    assert scores.failures == 1


@pytest.mark.parametrize("text", ["one too few", "fail: raise"])
@pytest.mark.parametrize("workers", [0, 1])
def test_batched_scoring_that_raises_or_miscounts_fails_on_all(text, workers):
    reward = Reward(worker_functions.score_batch, batched=True, workers=workers, failure_score=-1.0)
    scores = reward(EXAMPLES, [["a", text], ["a", "b"]])
    assert scores.failures == 4
    assert scores.total.tolist() == [[-1, -1], [-1, -1]]
    reward.close()


# Workers --------------------------------------------------------------------------------------------------------------


def test_workers_change_no_score():
    here, there = Reward(worker_functions.score), Reward(worker_functions.score, workers=2, time_limit=60.0)
    expected, scores = here(EXAMPLES, TEXTS), there(EXAMPLES, TEXTS)
    assert list(scores.components) == list(expected.components)
    assert torch.equal(scores.total, expected.total)
    there.close()


def test_what_takes_too_long_or_ends_its_worker_fails_alone(caplog):
    reward = Reward(worker_functions.score, workers=2, time_limit=2.0)
    scores = reward(EXAMPLES, [["a", "fail: sleep 60"], ["fail: exit 3", "b"]], [70, 71])
    assert scores.failures == 2
    assert scores.total.tolist() == [[2, 0], [0, 2]]
    assert "completion of prompt 70, which scores 0: TimeLimitError('the call took longer than the time" in caplog.text
    assert "completion of prompt 71, which scores 0: WorkerDiedError(" in caplog.text
    reward.close()


def test_the_time_limit_of_batched_scoring_is_one_for_all():
    reward = Reward(worker_functions.score_batch, batched=True, workers=1, time_limit=1.0)
    assert reward(EXAMPLES, [["a", "fail: sleep 60"], ["a", "b"]]).failures == 4
    reward.close()


def test_a_reward_with_workers_is_copied_pickled_and_called_from_a_thread():
    reward = Reward(worker_functions.score, workers=1)
    expected = reward(EXAMPLES, TEXTS).total.tolist()
    totals = []
    for other in (copy.deepcopy(reward), pickle.loads(pickle.dumps(reward))):
        thread = threading.Thread(target=lambda other=other: totals.append(other(EXAMPLES, TEXTS).total.tolist()))
        thread.start()
        thread.join()
        other.close()
    assert totals == [expected, expected]
    reward.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"time_limit": 1.0}, "`time_limit` 1.0 needs worker processes"),
        ({"workers": 2, "batched": True}, "pass 1"),
        ({"workers": -1}, "`workers` must be at least 1"),
        ({"workers": 1, "time_limit": 0.0}, "`time_limit` must be a positive"),
        ({"failure_score": math.nan}, "`failure_score` must be finite"),
    ],
)
def test_settings_that_do_not_fit_are_refused_at_construction(settings, message):
    with pytest.raises(ValueError, match=message):
        Reward(worker_functions.score, **settings)


def test_a_function_that_no_worker_could_import_is_refused_at_construction():
    with pytest.raises(ValueError, match="`score` must be picklable"):
        Reward(lambda example, completion: 0.0, workers=1)


# Failures -------------------------------------------------------------------------------------------------------------


def test_a_completion_on_which_scoring_raises_gets_zero_and_is_counted(caplog):
    with caplog.at_level(logging.WARNING):
        scores = Reward(failing_on("aa"), max_failure_share=0.5)(EXAMPLES, TEXTS)
    assert scores.failures == 1
    assert scores.total.tolist() == [[2, 0, 2], [2, 1, 0]]
    assert scores.components["length"].tolist() == [[1, 0, 2], [1, 1, 0]]
    assert "KeyError('aa')" in caplog.text


def test_each_kind_of_failure_is_told_once_with_its_prompt_and_later_ones_are_a_number(caplog):
    def fails(example, completion):
        raise ValueError(f"too short: {len(completion)}") if completion else ZeroDivisionError

    reward = Reward(fails, max_failure_share=1.0)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert reward(EXAMPLES, TEXTS, [17, 1234]).failures == 6
            reward.tell_failures()
        reward.tell_failures()
    assert [record.getMessage() for record in caplog.records] == [
        "The reward failed on a completion of prompt 17, which scores 0: ValueError('too short: 1')",
        "The reward failed on a completion of prompt 1234, which scores 0: ZeroDivisionError()",
        "The reward has failed on 6 of 6 completions so far.",
        "The reward has failed on 12 of 12 completions so far.",
    ]
    assert [record.exc_info is not None for record in caplog.records] == [True, True, False, False]


def test_a_failure_that_says_something_else_each_time_is_told_ten_times(caplog):
    def fails(example, completion):
        raise ValueError(completion)

    texts = [["x" * length for length in range(20)]]
    with caplog.at_level(logging.WARNING):
        Reward(fails, max_failure_share=1.0)(EXAMPLES[:1], texts)
    assert len(caplog.records) == 10


def test_the_failure_score_counts_in_every_component_and_the_total():
    scores = Reward(failing_on("aa"), weights={"count": 2.0, "length": 1.0}, failure_score=-1.0)(EXAMPLES, TEXTS)
    assert scores.components["count"].tolist() == [[1, -1, 0], [1, 0, 0]]
    assert scores.total.tolist() == [[3, -3, 2], [3, 1, 0]]


def test_where_every_completion_fails_the_total_is_that_of_failures():
    everything = failing_on("a", "aa", "xx", "b", "")
    weighted = Reward(everything, weights={"count": 2.0, "length": 1.0}, failure_score=-1.0, max_failure_share=1.0)
    assert weighted(EXAMPLES, TEXTS).total.tolist() == [[-3, -3, -3], [-3, -3, -3]]
    assert Reward(everything, failure_score=-1.0, max_failure_share=1.0)(EXAMPLES, TEXTS).total.unique().tolist() == [
        -1
    ]


@pytest.mark.parametrize(("share", "is_error"), [(0.02, False), (0.01, True), (0.0, True), (1.0, False)])
def test_more_failures_than_the_share_are_an_error_and_as_many_are_not(share, is_error):
    """Two of the six completions fail; a share is taken of at least 100."""
    reward = Reward(failing_on("a"), max_failure_share=share)
    if not is_error:
        assert reward(EXAMPLES, TEXTS).failures == 2
        return
    with pytest.raises(RuntimeError, match=r"The reward failed on 2 of 6 completions.*of prompt 1") as caught:
        reward(EXAMPLES, TEXTS)
    assert isinstance(caught.value.__cause__, KeyError)


def test_where_every_completion_fails_all_rewards_are_zero():
    scores = Reward(failing_on("a", "aa", "xx", "b", ""), weights={"count": 1.0}, max_failure_share=1.0)(
        EXAMPLES, TEXTS
    )
    assert scores.total.tolist() == [[0, 0, 0], [0, 0, 0]]
    assert scores.failures == 6


class NoException(BaseException):
    """As a library may use it to unwind its own stack."""


@pytest.mark.parametrize(
    "error",
    [
        *(NoException("x"), GeneratorExit(), SystemExit(2), RecursionError(), KeyboardInterrupt()),
        *(asyncio.CancelledError(), worker_functions.Unspeakable()),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("batched", [False, True])
def test_whatever_a_score_function_raises_is_a_failure(error, batched):
    def score(example, completion):
        if "aa" in completion:
            raise error
        return 1.0

    scores = Reward(score, batched=batched, max_failure_share=1.0)(EXAMPLES, TEXTS)
    assert scores.failures == (6 if batched else 1)
    assert batched or scores.total.tolist() == [[1, 0, 1], [1, 1, 1]]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("catches", [False, True])
def test_a_signal_of_the_user_ends_the_run_even_where_a_score_function_catches_it(number, catches):
    def score(example, completion):
        try:
            os.kill(os.getpid(), number)
            time.sleep(5)
        except BaseException:
            if not catches:
                raise
        return 1.0

    def leave(*_):
        sys.exit(3)

    handler = signal.default_int_handler if number == signal.SIGINT else leave
    before = signal.signal(number, handler)
    try:
        with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
            Reward(score, max_failure_share=1.0)(EXAMPLES, TEXTS)
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)


def test_a_check_reads_the_special_tokens_and_may_be_killed():
    reward = Reward(worker_functions.half, check=worker_functions.check_end, workers=1, time_limit=2.0)
    raw = [["a<end>", "a"], ["b<end>", "sleep"]]
    scores = reward(EXAMPLES, [["a", "a"], ["b", "sleep"]], raw=raw)
    assert scores.components["correct"].tolist() == [[1, 0], [1, 0]]
    assert (scores.failures, scores.total.tolist()) == (1, [[0.5, 0.5], [0.5, 0]])
    reward.close()


@pytest.mark.parametrize("value", [None, "many", "1.0", b"1", [1.0], torch.ones(2), numpy.ones(3)], ids=repr)
@pytest.mark.parametrize("wrap", [lambda value: value, lambda value: {"count": value}], ids=["number", "component"])
def test_a_score_that_is_no_number_is_a_failure(monkeypatch, value, wrap):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it: annotations are not checked
    reward = Reward(lambda example, completion: wrap(value) if completion == "aa" else wrap(1.0), max_failure_share=0.5)
    scores = reward(EXAMPLES, TEXTS)
    assert scores.failures == 1
    assert scores.total.tolist() == [[1, 0, 1], [1, 1, 1]]


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=repr)
@pytest.mark.parametrize("wrap", [lambda value: value, lambda value: {"count": value}], ids=["number", "component"])
def test_a_score_that_is_not_finite_is_a_failure(value, wrap):
    reward = Reward(lambda example, completion: wrap(value) if completion == "aa" else wrap(1.0), max_failure_share=0.5)
    scores = reward(EXAMPLES, TEXTS)
    assert scores.failures == 1
    assert scores.total.tolist() == [[1, 0, 1], [1, 1, 1]]


def test_the_answer_check_of_a_task_comes_with_its_reward_unless_it_has_none():
    task = GSM8K(check="published")
    assert Reward.of_task(task).check == task.check
    assert Reward.of_task(Sudoku(check=None)).check is None
    assert Reward(lambda example, completion: 1.0).check is None


def test_weights_are_checked_by_the_first_completions_that_can_be_scored():
    reward = Reward(failing_on("bad"), weights={"typo": 1.0}, max_failure_share=1.0)
    reward(EXAMPLES[:1], [["bad"]])
    with pytest.raises(ValueError, match=r"\['typo'\]; it returns \['count', 'length'\]"):
        reward(EXAMPLES[:1], [["a"]])


@pytest.mark.parametrize(
    "options", [{"max_failure_share": 2.0}, {"max_failure_share": -1.0}, {"weights": {"count": math.nan}}]
)
def test_settings_outside_their_range_are_refused(options):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}`"):
        Reward(components, **options)


def test_a_score_without_components_fails():
    scores = Reward(lambda example, completion: {}, max_failure_share=1.0)(EXAMPLES, TEXTS)
    assert scores.failures == 6


def test_nothing_to_score_gives_nothing():
    assert Reward(components)([], []).total.shape == (0, 0)


def test_an_answer_check_that_raises_is_a_failure_and_no_answer(caplog):
    def check(example, completion):
        raise KeyError("no")

    scores = Reward(components, check=check, failure_score=-1.0)(EXAMPLES[:1], [["a"]], [7])
    assert scores.verdicts == [[Verdict(None, False)]]
    assert (scores.failures, scores.components["correct"].item(), scores.total.item()) == (1, 0, -1)
    assert "prompt 7" in caplog.text


def test_a_failure_gets_its_score_where_the_check_alone_is_weighed():
    def check(example, completion):
        return None if completion == "b" else Verdict(completion, True)

    reward = Reward(lambda *_: 0.5, check=check, weights={"correct": 2.0}, failure_score=-1.0)
    scores = reward(EXAMPLES[:1], [["a", "b"]])
    assert scores.components["correct"].tolist() == [[1, 0]]
    # What is no Verdict is a failure too, and None is none.
    assert (scores.failures, scores.total.tolist()) == (1, [[2, -2]])


def cells(example, completion):
    """Three of four parts right, or an answer without parts."""
    share = None if completion == "whole" else Share(3, 4, name="cells")
    return Verdict(completion, False, share)


def test_a_failed_completion_answered_none_of_as_many_parts_as_others():
    reward = Reward(failing_on("bad"), check=cells, accuracy="cells", max_failure_share=1.0)
    scores = reward(EXAMPLES[:1] * 3, [["a", "bad"], ["bad", "bad"], ["whole", "bad"]])
    assert scores.named["accuracy"].tolist()[:2] == [[0.75, 0], [0, 0]]
    assert [each.share for each in scores.verdicts[1]] == [Share(0, 4)] * 2
    assert [each.share for each in scores.verdicts[2]] == [None, None]
    values = batch_values(scores, {})
    assert values.weights["accuracy"].tolist() == [4, 4, 0]
    assert values.correct.any() == torch.tensor(False)
    # A batch that fails as a whole has no share to go by but that of the one before, and the same components.
    later = reward(EXAMPLES[:1], [["bad", "bad"]])
    assert later.named["accuracy"].tolist() == [[0, 0]]
    assert batch_values(later, {}).weights["accuracy"].tolist() == [4]
    assert set(later.components) == {"count", "length", "cells", "correct"}


@pytest.mark.parametrize("failure_score", [1.0, -1.0])
@pytest.mark.parametrize("accuracy", ["count", None])
def test_a_failed_completion_is_not_correct_whatever_it_scores(failure_score, accuracy):
    reward = Reward(failing_on("aa"), accuracy=accuracy, weights={"count": 1.0}, failure_score=failure_score)
    scores = reward(EXAMPLES[:1], [["a", "aa"]])
    assert scores.components["count"].tolist() == scores.total.tolist() == [[1, failure_score]]
    assert scores.named["accuracy"].tolist() == [[1, 0 if accuracy else failure_score]]
    assert batch_values(scores, {}).correct.tolist() == [[True, False]]


def test_an_accuracy_that_is_no_component_ends_the_first_call():
    with pytest.raises(ValueError, match=r"`accuracy` names .*\['right'\]; it returns \['count', 'length'\]"):
        Reward(components, accuracy="right")(EXAMPLES, TEXTS)
    reward = Reward(one_or_the_other, accuracy="b")
    assert reward(EXAMPLES, TEXTS).named["accuracy"].nan_to_num(-1).tolist() == [[-1, 2, 2], [2, -1, 2]]
    assert reward(EXAMPLES[:1], [["a"]]).named["accuracy"].isnan().all()


class Unnamed(Task):
    """A task that states no accuracy."""

    def examples(self, split):
        return EXAMPLES

    def prompt(self, example):
        return example["word"]

    def score(self, example, completion):
        return {"count": float(completion.count(example["word"])), "length": 0.5 * len(completion)}


class UnnamedChecked(Unnamed):
    def check(self, example, completion):
        return Verdict(completion, completion == example["word"])


def test_a_task_without_an_accuracy_reports_its_check_or_else_its_reward():
    assert Reward.of_task(Unnamed())(EXAMPLES, TEXTS).named["accuracy"].tolist() == [[1.5, 3, 1], [1.5, 0.5, 0]]
    assert Reward.of_task(UnnamedChecked())(EXAMPLES, TEXTS).named["accuracy"].tolist() == [[1, 0, 0], [1, 0, 0]]
    assert [Unnamed().check(EXAMPLES[0], text).correct for text in ("xx", "a", "aa")] == [True, False, False]


def test_half_precision_as_the_default_changes_no_score():
    torch.set_default_dtype(torch.bfloat16)
    try:
        total = Reward(lambda example, completion: 2.953)(EXAMPLES, TEXTS).total
    finally:
        torch.set_default_dtype(torch.float32)
    assert total.dtype == torch.float32
    assert total[0, 0] == pytest.approx(2.953, abs=1e-6)


def too_large(value):
    return lambda example, completion: value if completion == "aa" else 1.0


@pytest.mark.parametrize("value", [1e39, -1e39, 3.5e38, 2e30, float("inf"), float("nan"), 10**400])
def test_a_score_that_single_precision_cannot_compute_with_is_a_failure(value):
    scores = Reward(too_large(value), max_failure_share=0.5)(EXAMPLES, TEXTS)
    assert scores.failures == 1
    assert scores.total.isfinite().all()
    assert scores.total.flatten().tolist().count(0) == 1


@pytest.mark.parametrize(
    "options", [{"failure_score": 1e39}, {"failure_score": float("nan")}, {"weights": {"reward": 1e39}}]
)
def test_a_failure_score_or_weight_that_is_too_large_is_refused(options):
    with pytest.raises(ValueError, match=r"must be finite, and at most 1e\+30, got"):
        Reward(components, **options)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_score_that_exits_the_interpreter_fails_alone(workers):
    reward = Reward(worker_functions.score, workers=workers)
    scores = reward(EXAMPLES, [["a", "fail: sys.exit"], ["b", "b"]])
    assert scores.failures == 1
    reward.close()


def test_an_answer_check_that_exits_or_returns_no_verdict_is_a_failure():
    for check in (lambda example, completion: sys.exit(3), lambda example, completion: True):
        scores = Reward(components, check=check)(EXAMPLES[:1], [["a"]])
        assert (scores.failures, scores.verdicts) == (1, [[Verdict(None, False)]])


@pytest.mark.parametrize(
    "function",
    [os.system, os.popen, subprocess.call, subprocess.getoutput, eval, functools.partial(subprocess.run, shell=True)],
)
def test_a_function_of_python_itself_is_no_score(function):
    for make in (Reward, lambda score: Reward(components, check=score), lambda score: CombinedScore({"a": score})):
        with pytest.raises(ValueError, match=r"must be a function of an example and a completion of your own, got "):
            make(function)


@pytest.mark.parametrize(
    "function", [lambda: 1.0, lambda completion: 1.0, lambda a, b, c: 1.0, lambda example, *, completion: 1.0]
)
def test_a_function_that_does_not_take_an_example_and_a_completion_is_no_score(function):
    with pytest.raises(ValueError, match=r"`score` must be a function of an example and a completion, got "):
        Reward(function)


async def later(example, completion):
    return 1.0


async def later_each(example, completion):
    yield 1.0


def each(example, completion):
    yield 1.0


class Later:
    async def __call__(self, example, completion):
        return 1.0

    async def method(self, example, completion):
        return 1.0


@pytest.mark.parametrize(
    "function",
    [later, later_each, each, Later(), Later().method, functools.partial(later), functools.partial(Later()), Later],
)
def test_a_function_that_is_run_later_and_a_class_are_no_score(function):
    for make in (Reward, lambda score: Reward(components, check=score), lambda score: CombinedScore({"a": score})):
        with pytest.raises(ValueError, match=r"`.+` must be a function of an example and a completion"):
            make(function)


@pytest.mark.parametrize("wrap", [lambda f: f, lambda f: CombinedScore({"a": f}), lambda f: lambda *a: {"a": f(*a)}])
@pytest.mark.parametrize(
    "function", [later, later_each, each, lambda *_: asyncio.Future(loop=asyncio.new_event_loop())]
)
def test_a_score_that_has_yet_to_be_run_ends_the_run_at_the_first_call(function, wrap):
    def score(example, completion):
        return function(example, completion)

    reward = Reward(wrap(score), max_failure_share=1.0)
    with pytest.raises(ValueError, match=r"`\w+` returned a \w+: neither `async def` nor `yield` is run here"):
        reward(EXAMPLES, TEXTS)


def test_a_score_that_has_yet_to_be_run_ends_the_run_from_a_worker_too():
    reward = Reward(worker_functions.score_later, workers=1, max_failure_share=1.0)
    with pytest.raises(ValueError, match="`score` returned a coroutine"):
        reward(EXAMPLES, TEXTS)
    reward.close()


def test_batched_scoring_may_yield_its_results():
    def scores(examples, completions):
        yield from map(len, completions)

    assert Reward(scores, batched=True)(EXAMPLES, TEXTS).total.tolist() == [[1, 2, 2], [1, 1, 0]]


@pytest.mark.parametrize(
    "function",
    [lambda a, b: 1.0, lambda *a: 1.0, lambda a, b, c=2: 1.0, functools.partial(lambda a, b, c: 1.0, c=1), torch.dist],
)
def test_any_other_function_may_be_a_score(function):
    assert Reward(function).score is function


def test_a_traceback_shows_what_a_terminal_would_obey(caplog):
    def score(example, completion):
        raise ValueError("\x1b[2J\x1b]0;title\x07 and \u202e")

    with caplog.at_level(logging.WARNING):
        Reward(score, max_failure_share=1.0)(EXAMPLES, TEXTS)
    assert "ValueError: \\x1b[2J\\x1b]0;title\\x07 and \\u202e" in caplog.text
    assert caplog.text.isascii()
    assert all(each.isprintable() or each == "\n" for each in caplog.text)
