"""What rollouts look like, by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmpo_lightning.evaluation.rollout_values import repeated_share, rollout_values
from dmpo_lightning.rewards.scores import Scores
from dmpo_lightning.rollout import PromptBatch, Rollouts
from helpers import END_OF_TURN, tiny_policy


def rollouts_of(rows, completions, *, reveal_step, log_prob):
    """One prompt, with a group of completions."""
    ids = torch.tensor([rows])
    zero, mask = torch.zeros(1, dtype=torch.int64), torch.ones(1, 2, dtype=torch.bool)
    return Rollouts(
        prompts=PromptBatch(mask.long(), mask, zero, [{}], ~mask[:, 0]),
        completion_ids=ids,
        keys=torch.arange(len(rows))[None],
        reveal_step=torch.tensor([reveal_step]),
        sampled_log_prob=torch.tensor([log_prob]),
        scores=Scores({}, torch.zeros(1, len(rows)), failures=0),
        completions=[completions],
        order_is_independent=False,
        temperature=1.0,
    )


def test_values_of_a_group_by_hand():
    """A loop, the same in another order, a text that ends, and one that ends at once; the last token of the last row
    was filled in by an early exit.
    """
    policy, end = tiny_policy(with_reference=False), END_OF_TURN
    rows = [[8, 8, 8, 8, 8, 8], [8, 9, 8, 9, 8, 9], [8, 9, end, 8, 8, 8], [end, 9, 9, 9, 9, 9]]
    steps = [[0] * 6] * 3 + [[0] * 5 + [-1]]
    log_prob = [[-0.5] * 6, [-1.5] * 6, [-0.5] * 6, [-1.5] * 5 + [0.0]]
    texts = ["aaaaaa", "aaaaaa", "ab", " \n"]
    found = rollout_values(policy, rollouts_of(rows, texts, reveal_step=steps, log_prob=log_prob))
    assert found["completion/length"].tolist() == [6, 6, 2, 0]
    assert found["completion/truncated"].tolist() == [1, 1, 0, 0]
    assert found["completion/empty"].tolist() == [0, 0, 0, 1]
    assert found["completion/distinct"].tolist() == [0.75]
    assert found["reward/informative_groups"].tolist() == [0]
    # Three 4-grams, all the same; three, the third of which is the first; none; none.
    assert found["completion/repetition"].tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0])
    # 12 tokens of .5 nats and 11 of 1.5.
    assert float(found["policy/entropy"].mean()) == pytest.approx(22.5 / 23)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=12, max_size=12), min_size=1, max_size=5), st.data())
def test_repetition_is_one_minus_distinct_ngrams_over_all(rows, data):
    lengths = [data.draw(st.integers(0, 12)) for _ in rows]
    expected = []
    for row, length in zip(rows, lengths, strict=True):
        grams = [tuple(row[start : start + 4]) for start in range(length - 3)]
        expected.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
    assert repeated_share(torch.tensor(rows), torch.tensor(lengths)).tolist() == pytest.approx(expected)


def test_completions_shorter_than_a_4_gram_repeat_nothing():
    assert repeated_share(torch.ones(2, 3, dtype=torch.int64), torch.tensor([3, 0])).tolist() == [0, 0]
