import logging

import jaxtyping
import pytest

from dmpo_lightning.rewards import Reward
from dmpo_lightning.tasks import GSM8K, Sudoku

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


@pytest.mark.parametrize("number", [float, int, bool])
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


def test_a_component_that_some_completions_lack_is_zero_there():
    scores = Reward(lambda example, completion: {"a": 1.0} if completion == "a" else {"b": 2.0})(EXAMPLES, TEXTS)
    assert scores.components["a"].tolist() == [[1, 0, 0], [0, 1, 0]]
    assert scores.total.tolist() == [[1, 2, 2], [2, 1, 2]]


def test_weights_of_a_component_that_is_not_returned_are_an_error_that_lists_what_is():
    with pytest.raises(ValueError, match=r"\['correct'\]; it returns \['count', 'length'\]"):
        Reward(components, weights={"correct": 1.0})(EXAMPLES, TEXTS)


def test_accuracy_is_the_reward_itself_unless_named():
    assert Reward(components).accuracy == "reward"
    assert Reward(components, accuracy="count").accuracy == "count"


def test_the_reward_of_a_task_is_its_score():
    task = Sudoku(sizes={"train": 2})
    reward = Reward.of_task(task, {"solved": 1.0})
    examples = task.examples("train")
    scores = reward(examples, [[example["solution"], ""] for example in examples])
    assert scores.total.tolist() == [[1, 0], [1, 0]]
    assert reward.accuracy == "solved"


def test_examples_and_completions_must_be_equally_many():
    with pytest.raises(ValueError, match=r"argument 2 is (shorter|longer)"):
        Reward(components)(EXAMPLES, TEXTS[:1])


# Failures -------------------------------------------------------------------------------------------------------------


def test_a_completion_on_which_scoring_raises_gets_zero_and_is_counted(caplog):
    with caplog.at_level(logging.WARNING):
        scores = Reward(failing_on("aa"), max_failure_share=0.5)(EXAMPLES, TEXTS)
    assert scores.failures == 1
    assert scores.total.tolist() == [[2, 0, 2], [2, 1, 0]]
    assert scores.components["length"].tolist() == [[1, 0, 2], [1, 1, 0]]
    assert "KeyError('aa')" in caplog.text


@pytest.mark.parametrize(("share", "is_error"), [(0.02, False), (0.01, True), (0.0, True), (1.0, False)])
def test_more_failures_than_the_share_are_an_error_and_as_many_are_not(share, is_error):
    """Two of the six completions fail; a share is taken of at least 100."""
    reward = Reward(failing_on("a"), max_failure_share=share)
    if not is_error:
        assert reward(EXAMPLES, TEXTS).failures == 2
        return
    with pytest.raises(RuntimeError, match="The reward failed on 2 of 6 completions") as caught:
        reward(EXAMPLES, TEXTS)
    assert isinstance(caught.value.__cause__, KeyError)


def test_where_every_completion_fails_all_rewards_are_zero():
    scores = Reward(failing_on("a", "aa", "xx", "b", ""), weights={"count": 1.0}, max_failure_share=1.0)(
        EXAMPLES, TEXTS
    )
    assert scores.total.tolist() == [[0, 0, 0], [0, 0, 0]]
    assert scores.failures == 6


def test_an_interrupt_is_not_a_failure():
    def interrupted(example, completion):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Reward(interrupted, max_failure_share=1.0)(EXAMPLES, TEXTS)


@pytest.mark.parametrize("value", [None, "many", [1.0]], ids=repr)
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
    task = GSM8K(verifier="published")
    assert Reward.of_task(task).verify == task.verify
    assert Reward.of_task(Sudoku(verifier=None)).verify is None
    assert Reward(lambda example, completion: 1.0).verify is None
