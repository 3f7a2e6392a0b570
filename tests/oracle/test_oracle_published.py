"""Objectives of others on the tabular policy: one small step on its own samples raises the expected reward."""

import pytest
import torch

from dmpo_lightning.objectives import BGPO, EBPO, ESPO, GDPO, GDSD, SPG, WD1, CoupledGRPO, DiffuGRPO, JustGRPO, TraceRL
from dmpo_lightning.rollout import Sampling, collect
from dmpo_lightning.samplers import ConfidenceSampler, RandomOrderSampler
from oracle.tabular import random_tables, sequence_log_prob, sequential_log_prob
from oracle.tabular_model import prompts, tabular_policy, tabular_reward
from oracle.test_oracle_objectives import REWARD, update

RANDOM = (RandomOrderSampler(), sequence_log_prob)
LEFT_TO_RIGHT = (ConfidenceSampler(remasking="sequential"), sequential_log_prob)
OBJECTIVES = [DiffuGRPO(), CoupledGRPO(), ESPO(), GDPO(), GDSD(), WD1(), SPG(), SPG(ratio_clip=5.0), EBPO(), BGPO()]
CASES = [(objective, *RANDOM) for objective in OBJECTIVES]
CASES += [(TraceRL(shrink=1), *RANDOM), (TraceRL(shrink=1), *LEFT_TO_RIGHT), (JustGRPO(), *LEFT_TO_RIGHT)]


@pytest.mark.parametrize(("objective", "sampler", "log_prob"), CASES, ids=lambda each: type(each).__name__)
def test_a_small_step_raises_the_expected_reward(objective, sampler, log_prob):
    start = random_tables(5).float()
    policy = tabular_policy(start, start)
    rollouts = collect(policy, tabular_reward(REWARD), prompts(1), Sampling(sampler, 3, 1024))
    optimizer = torch.optim.SGD([policy.model.table], lr=1.0)
    update(objective, policy, rollouts, optimizer, iterations=1)
    moved = policy.model.table.detach() - start
    # A step of length .05, whatever the scale of the loss.
    after = start + 0.05 * moved / moved.norm()
    expected = [(log_prob(table).exp() * REWARD).sum() for table in (start, after)]
    assert expected[1] > expected[0] + 1e-3
