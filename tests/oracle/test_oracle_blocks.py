"""A block-causal model of which every completion can be enumerated: three tokens of two values, behind one of a prompt.

Blocks have two tokens, so that the first begins within the prompt, and the completion is drawn from left to right.
"""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from dmpo_lightning.objectives import WDCE, TrajectoryEstimator
from dmpo_lightning.policy import Policy, evaluating
from dmpo_lightning.rewards.reward import Reward
from dmpo_lightning.rollout import PromptBatch, Rollouts, Sampling, collect
from dmpo_lightning.samplers import ConfidenceSampler
from helpers import MASK, tiny_policy
from oracle.tabular import total_variation
from small_models import tiny_adapted, tiny_llada2, tiny_sdar

ALPHA, PROMPT = 0.5, 20
VALUES = torch.tensor([9, 14])
COMPLETIONS = torch.tensor(list(product(range(2), repeat=3)))
REWARD = torch.tensor([0.0, 0.3, 0.1, 1.0, 0.2, 0.6, 0.4, 0.8])


def mixture(**changes) -> nn.Module:
    """Experts are in the second layer."""
    return tiny_llada2(**changes | {"num_hidden_layers": 2})


def policy_of_two_values(model: Callable[..., nn.Module] = tiny_sdar) -> Policy:
    policy = tiny_policy(model=model(block_size=2, num_hidden_layers=1))
    banned = torch.ones(32, dtype=torch.bool)
    banned[VALUES] = False
    policy._ban[banned] = -torch.inf
    return policy


@torch.no_grad()
def distribution(policy: Policy, *, reference: bool = False) -> Tensor:
    """The probability of each completion, by the chain rule, from forwards of the network alone."""
    model = policy.reference.model if reference else policy.model
    ids = torch.cat((torch.full((8, 1), PROMPT), VALUES[COMPLETIONS]), dim=1)
    total = torch.zeros(8)
    for place in range(1, 4):
        masked = torch.where(torch.arange(4) < place, ids, MASK)
        # The network sees no block behind, so that what stands there does not matter.
        total += model(masked).logits[:, place, VALUES].log_softmax(-1).gather(1, COMPLETIONS[:, place - 1, None])[:, 0]
    return total.exp()


def buffer_of(policy: Policy, number: int, group_size: int) -> Rollouts:
    def reward(_: object, completion: str) -> float:
        return float(REWARD[index_of[completion]])

    index_of = {text: index for index, text in enumerate(policy.decode(VALUES[COMPLETIONS]))}
    prompts = PromptBatch(
        prompt_ids=torch.tensor([[PROMPT]]),
        prompt_mask=torch.ones(1, 1, dtype=torch.bool),
        prompt_index=torch.zeros(1, dtype=torch.long),
        examples=[{}],
        is_filler=torch.zeros(1, dtype=torch.bool),
    )
    sampling = Sampling(ConfidenceSampler(remasking="sequential"), 3, group_size, buffer=number)
    return collect(policy, Reward(reward), prompts, sampling)


@pytest.mark.parametrize("model", [tiny_sdar, tiny_adapted, mixture], ids=["plain", "shifted", "mixture"])
def test_recorded_and_replayed_log_probs_are_those_of_the_chain_rule(model):
    policy = policy_of_two_values(model)
    rollouts = buffer_of(policy, 0, 64)
    log_prob = distribution(policy).log()
    torch.testing.assert_close(log_prob.exp().sum(), torch.tensor(1.0))
    drawn = (rollouts.completion_ids[0] == VALUES[1]).long() @ torch.tensor([4, 2, 1])
    torch.testing.assert_close(rollouts.sampled_log_prob[0].sum(-1), log_prob[drawn], atol=1e-5, rtol=1e-5)
    replayed = TrajectoryEstimator().log_prob(policy, rollouts, rows_per_forward=64)
    torch.testing.assert_close(replayed[0], log_prob[drawn], atol=1e-5, rtol=1e-5)


def test_draws_have_the_frequencies_of_the_chain_rule():
    policy = policy_of_two_values()
    rollouts = buffer_of(policy, 0, 8192)
    drawn = (rollouts.completion_ids[0] == VALUES[1]).long() @ torch.tensor([4, 2, 1])
    assert total_variation(drawn.bincount(minlength=8) / 8192, distribution(policy)) < 0.02


@pytest.mark.slow
def test_dmpo_with_trajectory_log_rnd_reaches_the_target():
    """Sampler, likelihood, log_rnd and loss are the shipped ones, in the model's own blocks."""
    policy = policy_of_two_values()
    reference = distribution(policy, reference=True)
    target = (reference.log() + REWARD / ALPHA).softmax(-1)
    assert total_variation(reference, target) > 0.15
    objective = WDCE(
        reward_temperature=ALPHA,
        negative_term="log_likelihood",
        uninformative_groups="train",
        replicates=8,
        estimator=TrajectoryEstimator(),
    )
    optimizer = torch.optim.Adam(policy.model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 120)
    for number in range(120):
        rollouts = buffer_of(policy, number, 512)
        with evaluating(policy):
            targets, _ = objective.prepare(policy, rollouts, rows_per_forward=512)
        flat = {name: value.flatten(0, 1) for name, value in targets.items()}
        loss, _ = objective.loss(policy, rollouts.rows(), flat, iteration=0, planned_rollouts=len(rollouts))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    assert total_variation(distribution(policy), target) < 0.05
