"""What an evaluation counts, by hand."""

import math
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dmpo_lightning import GSM8K, Math500
from dmpo_lightning.evaluation.batch import EvaluatedBatch
from dmpo_lightning.evaluation.metrics import EvaluationMetrics
from dmpo_lightning.evaluation.values import BatchValues, majority, pass_at
from dmpo_lightning.samplers import Samples
from dmpo_lightning.tasks.base import Verdict
from dmpo_lightning.tasks.latex import canonical, equivalent


@pytest.mark.parametrize(
    ("completions", "correct", "draws", "expected"),
    [(4, 1, 1, 0.25), (4, 1, 2, 0.5), (4, 2, 2, 5 / 6), (4, 0, 4, 0.0), (4, 3, 2, 1.0), (4, 1, 4, 1.0)],
)
def test_pass_at_j_by_hand(completions, correct, draws, expected):
    """4 completions, 1 correct: of the 6 pairs 3 hold it."""
    found = pass_at(draws, correct=torch.tensor([correct]), completions=completions)
    assert found.tolist() == pytest.approx([expected])


@given(st.lists(st.booleans(), min_size=1, max_size=7), st.data())
def test_pass_at_j_is_the_share_of_subsets_with_a_success(outcomes, data):
    draws = data.draw(st.integers(1, len(outcomes)))
    subsets = [any(subset) for subset in combinations(outcomes, draws)]
    found = pass_at(draws, correct=torch.tensor([sum(outcomes)]), completions=len(outcomes))
    assert float(found) == pytest.approx(sum(subsets) / len(subsets))


@pytest.mark.parametrize(
    ("ballots", "winner"),
    [
        (["7", "5", "5"], 1),
        (["7", "5", "5", "7"], 0),
        ([None, None, "5"], 2),
        ([None, "5", "7"], 1),
        ([None, None], None),
        ([], None),
    ],
)
def test_the_most_frequent_answer_wins_and_ties_go_to_the_first(ballots, winner):
    assert majority(ballots) == winner


def test_answers_that_mean_the_same_vote_together():
    texts = ["<answer>41</answer>", "<answer>$42</answer>", "<answer>42.0</answer>", "no idea\nat all"]
    verdicts = [GSM8K().check({"answer": "42"}, text) for text in texts]
    assert verdicts[1].answer != verdicts[2].answer
    assert majority([verdict.ballot for verdict in verdicts]) == 1
    assert verdicts[3].ballot is None
    fractions = [Math500().check({"answer": "1"}, f"\\boxed{{{text}}}").ballot for text in (r"\frac12", "0.5", "1/2")]
    assert len(set(fractions)) == 1


def test_zero_is_an_answer_and_an_empty_text_is_none():
    assert Verdict(0.0, correct=False).ballot == 0
    assert Verdict("", correct=False).ballot is None


@pytest.mark.parametrize("first", ["1/2", r"\frac{1}{2}", "(1, 2)", "x=3", "x^2+1", "0", ""])
@pytest.mark.parametrize("second", ["0.5", r"\dfrac12", "(1,2)", "3", "x^{2} + 1", "00", "a"])
def test_canonical_forms_are_equal_exactly_for_equivalent_answers(first, second):
    assert (canonical(first) == canonical(second)) == equivalent(first, second)


def batch_of(scores, seconds=1.0, **weights):
    """What an evaluation found of some prompts, with a value for each completion."""
    scores = torch.as_tensor(scores)
    values = BatchValues(scores == 1, {"score": scores}, {}, {}, weights)
    nothing = torch.zeros(0, 8, dtype=torch.int64)
    facts = {"prompt_index": [], "completions": [], "verdicts": None, "completion_length": 8}
    facts["samples"] = Samples(nothing, nothing, nothing.float())
    return EvaluatedBatch(**facts, examples=[{}] * len(scores), values=values, tokens=30 * len(scores), seconds=seconds)


def result_of(*batches):
    metrics = EvaluationMetrics()
    for batch in batches:
        metrics.update(batch)
    return metrics.result("greedy", 8)


def mean_of(*batches):
    return result_of(*map(batch_of, batches)).means["score"]


def test_the_standard_error_takes_prompts_as_the_unit():
    """Prompt means 1 and 0: sqrt(1/4 / 2), whatever the number of completions; eight prompts: sqrt(1/4 / 8)."""
    assert mean_of([[1.0] * 4, [0.0] * 4]) == pytest.approx((0.5, math.sqrt(1 / 8)))
    assert mean_of([[1.0], [0.0]]) == pytest.approx((0.5, math.sqrt(1 / 8)))
    assert mean_of([[1.0]] * 4 + [[0.0]] * 4) == pytest.approx((0.5, math.sqrt(1 / 32)))


def test_completions_that_disagree_within_every_prompt_leave_no_error():
    assert mean_of([[1.0, 0.0], [0.0, 1.0]]) == (0.5, 0.0)


def test_batches_do_not_matter():
    rows = [[1.0], [0.0], [0.5], [1.0], [0.25]]
    assert mean_of(rows[:2], rows[2:]) == pytest.approx(mean_of(rows))


def test_what_does_not_apply_is_left_out():
    nan = math.nan
    assert mean_of([[1.0, nan], [nan, nan], [0.0, 0.0]]) == pytest.approx(mean_of([[1.0], [0.0]]))
    assert all(map(math.isnan, mean_of([[nan]])))


def test_weights_give_the_ratio_of_sums():
    """6 of 8 and 1 of 2 cells: 7/10. Error sqrt((8 x .05)^2 + (2 x .2)^2) / 10."""
    found = result_of(batch_of([[6 / 8], [1 / 2]], score=torch.tensor([8.0, 2.0]))).means["score"]
    assert found == pytest.approx((0.7, math.sqrt(0.4**2 + 0.4**2) / 10))


def test_prompts_and_tokens_per_second_are_those_of_all_batches():
    found = result_of(batch_of([[1.0], [0.0]], seconds=1.0), batch_of([[1.0]], seconds=0.5))
    assert (found.prompts, found.tokens_per_second) == (3, 60.0)


def test_many_prompts_are_counted_exactly_whatever_the_default_type():
    torch.set_default_dtype(torch.bfloat16)
    try:
        batch = batch_of(torch.tensor([[500.0], [497.0]], dtype=torch.float32))
        mean, error = result_of(*[batch] * 1000).means["score"]
    finally:
        torch.set_default_dtype(torch.float32)
    assert mean == pytest.approx(498.5)
    assert error == pytest.approx(1.5 / 2000**0.5, rel=1e-4)


def test_one_prompt_has_no_standard_error():
    mean, error = mean_of([[1.0, 0.0]])
    assert mean == 0.5
    assert math.isnan(error)
