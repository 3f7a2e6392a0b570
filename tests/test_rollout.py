import io

import pytest
import torch

from dmpo_lightning.functional import row_keys
from dmpo_lightning.policy import Policy
from dmpo_lightning.rewards.reward import Reward
from dmpo_lightning.rollout import RolloutBuffer, Rollouts, Sampling, collect, joined, sample_completions
from dmpo_lightning.samplers import ConfidenceSampler, RandomOrderSampler, Sampler
from helpers import lora_policy, prompt_batch, tiny_policy

GROUP, LENGTH = 4, 6
PROMPTS = ["12", "1234", "3"]


def score(example, completion):
    return {"length": float(len(completion)), "prompt": float(len(example["prompt"]))}


def rollouts_of(
    policy: Policy | None = None,
    prompts: list[str] = PROMPTS,
    index: list[int] | None = None,
    *,
    sampler: Sampler | None = None,
    seed: int = 0,
    buffer: int = 0,
    rows_per_forward: int | None = None,
) -> Rollouts:
    policy = policy or tiny_policy()
    sampler = sampler or ConfidenceSampler(block_length=3, temperature=1.0)
    sampling = Sampling(sampler, LENGTH, GROUP, seed=seed, buffer=buffer, rows_per_forward=rows_per_forward)
    return collect(policy, Reward(score, weights={"length": 1.0}), prompt_batch(policy, prompts, index), sampling)


# Collecting -----------------------------------------------------------------------------------------------------------


def test_rollouts_are_grouped_by_prompt():
    rollouts = rollouts_of()
    assert rollouts.group_shape == (3, GROUP)
    assert len(rollouts) == 12
    assert rollouts.prompts.prompt_ids.shape == rollouts.prompts.prompt_mask.shape == (3, 14)
    assert (
        rollouts.completion_ids.shape
        == rollouts.reveal_step.shape
        == rollouts.sampled_log_prob.shape
        == (3, GROUP, LENGTH)
    )
    assert rollouts.reward.shape == rollouts.keys.shape == (3, GROUP)
    assert set(rollouts.components) == {"length", "prompt"}
    assert rollouts.components["prompt"].tolist() == [[2.0] * 4, [4.0] * 4, [1.0] * 4]


def test_rewards_belong_to_their_completions():
    policy = tiny_policy()
    rollouts = rollouts_of(policy)
    for prompt in range(3):
        texts = policy.decode(rollouts.completion_ids[prompt])
        assert rollouts.reward[prompt].tolist() == [float(len(text)) for text in texts]
    assert rollouts.reward.unique().numel() > 2


def test_texts_and_scores_come_along():
    policy = tiny_policy()
    rollouts = rollouts_of(policy)
    texts = [text for group in rollouts.completions for text in group]
    assert texts == policy.decode(rollouts.completion_ids.flatten(0, 1))
    assert torch.equal(rollouts.scores.total, rollouts.reward)


def test_keys_are_those_of_the_prompts_positions():
    rollouts = rollouts_of(index=[7, 3, 100], seed=5, buffer=2)
    assert torch.equal(rollouts.keys, row_keys(5, torch.tensor([7, 3, 100]), group_size=GROUP, buffer=2))
    assert rollouts.keys.unique().numel() == 12


def test_a_group_holds_different_completions():
    for group in rollouts_of().completion_ids:
        assert len({tuple(row) for row in group.tolist()}) > 1


def test_a_prompt_gets_the_same_completions_in_another_batch():
    policy = tiny_policy()
    expected = rollouts_of(policy, index=[0, 1, 2])
    shuffled = rollouts_of(policy, [PROMPTS[2], PROMPTS[0]], [2, 0])
    assert torch.equal(shuffled.completion_ids, expected.completion_ids[[2, 0]])
    assert torch.equal(shuffled.reward, expected.reward[[2, 0]])


@pytest.mark.parametrize("rows_per_forward", [1, 5, 12, 100])
def test_rows_per_forward_changes_nothing(rows_per_forward):
    policy = tiny_policy()
    expected, chunked = rollouts_of(policy), rollouts_of(policy, rows_per_forward=rows_per_forward)
    assert torch.equal(chunked.completion_ids, expected.completion_ids)
    assert torch.equal(chunked.reveal_step, expected.reveal_step)
    torch.testing.assert_close(chunked.sampled_log_prob, expected.sampled_log_prob, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("change", [{"seed": 1}, {"buffer": 1}, {"index": [3, 4, 5]}], ids=str)
def test_another_seed_buffer_or_prompt_gives_other_completions(change):
    policy = tiny_policy()
    expected = rollouts_of(policy)
    assert torch.equal(rollouts_of(policy).completion_ids, expected.completion_ids)
    assert not torch.equal(rollouts_of(policy, **change).completion_ids, expected.completion_ids)


def test_rollouts_remember_how_they_were_sampled():
    independent = rollouts_of(sampler=RandomOrderSampler(temperature=0.7))
    assert independent.order_is_independent
    assert independent.temperature == 0.7
    assert not rollouts_of().order_is_independent


def test_sampling_is_without_dropout_and_without_gradient_and_restores_the_mode():
    policy = lora_policy(dropout=0.5).train()
    batch, sampling = prompt_batch(policy, PROMPTS), Sampling(RandomOrderSampler(), LENGTH, GROUP)
    samples, _ = sample_completions(policy, batch, sampling)
    assert policy.training
    assert not samples.log_prob.requires_grad
    expected, _ = sample_completions(policy.eval(), batch, sampling)
    assert torch.equal(samples.completion_ids, expected.completion_ids)
    assert torch.equal(samples.log_prob, expected.log_prob)


# Rows and groups ------------------------------------------------------------------------------------------------------


def test_rows_are_flat_group_by_group():
    rollouts = rollouts_of()
    rows = rollouts.rows()
    assert len(rows) == 12
    for row in range(12):
        prompt, member = divmod(row, GROUP)
        assert torch.equal(rows.prompt_ids[row], rollouts.prompts.prompt_ids[prompt])
        assert torch.equal(rows.prompt_mask[row], rollouts.prompts.prompt_mask[prompt])
        assert torch.equal(rows.completion_ids[row], rollouts.completion_ids[prompt, member])
        assert torch.equal(rows.reveal_step[row], rollouts.reveal_step[prompt, member])
        assert rows.keys[row] == rollouts.keys[prompt, member]


@pytest.mark.parametrize("index", [slice(3, 7), torch.tensor([11, 0])], ids=["slice", "tensor"])
def test_some_rows_are_those_rows(index):
    rows = rollouts_of(sampler=RandomOrderSampler(temperature=0.7)).rows()
    some = rows[index]
    expected = torch.arange(12)[index]
    assert len(some) == len(expected)
    assert torch.equal(some.keys, rows.keys[expected])
    assert torch.equal(some.prompt_ids, rows.prompt_ids[expected])
    assert torch.equal(some.completion_ids, rows.completion_ids[expected])
    assert some.temperature == 0.7


@pytest.mark.parametrize(
    "index", [slice(1, 3), torch.tensor([1, 2]), torch.tensor([False, True, True])], ids=["slice", "tensor", "mask"]
)
def test_some_groups_are_those_groups(index):
    rollouts = rollouts_of()
    some = rollouts[index]
    assert some.group_shape == (2, GROUP)
    assert torch.equal(some.completion_ids, rollouts.completion_ids[1:])
    assert torch.equal(some.components["length"], rollouts.components["length"][1:])
    assert torch.equal(some.rows().keys, rollouts.rows().keys[GROUP:])
    assert (some.completions, some.prompts.examples) == (rollouts.completions[1:], rollouts.prompts.examples[1:])


def test_joined_tables_are_the_whole_and_a_name_that_one_lacks_is_nan():
    rollouts = rollouts_of()
    first, rest = rollouts[:1], rollouts[1:]
    del rest.components["length"]
    whole = joined([first, rest])
    assert torch.equal(whole.keys, rollouts.keys)
    assert whole.completions == rollouts.completions
    assert whole.prompts.examples == rollouts.prompts.examples
    assert torch.equal(whole.components["length"][:1], rollouts.components["length"][:1])
    assert whole.components["length"][1:].isnan().all()


# The buffer -----------------------------------------------------------------------------------------------------------


def full_buffer(num_iterations: int = 2, micro_batch_size: int = 4) -> RolloutBuffer:
    buffer = RolloutBuffer(num_iterations=num_iterations, micro_batch_size=micro_batch_size)
    rollouts = rollouts_of()
    buffer.fill(rollouts, {"weight": torch.rand(3, GROUP, generator=torch.Generator().manual_seed(0))})
    return buffer


def next_keys(buffer: RolloutBuffer) -> tuple[int, list[int]]:
    """The pass and the rollouts of the next micro-batch."""
    iteration, rows, targets = buffer.next_micro_batch()
    assert all(len(each) == len(rows) for each in targets.values())
    return iteration, rows.keys.tolist()


def test_a_buffer_hands_out_equal_micro_batches_pass_by_pass_and_then_wants_rollouts():
    buffer = full_buffer()
    assert buffer.micro_batches == 3
    handed_out = []
    while not buffer.needs_rollouts:
        handed_out.append(next_keys(buffer))
    one_pass = buffer.rollouts.keys.view(3, 4).tolist()
    assert handed_out == [(0, keys) for keys in one_pass] + [(1, keys) for keys in one_pass]


def test_the_groups_of_the_next_micro_batches_are_whole_where_these_cut_through_one():
    buffer = full_buffer(micro_batch_size=3 * GROUP // 2)
    assert [buffer.groups_of_next(1), buffer.groups_of_next(2)] == [slice(0, 2), slice(0, 3)]
    buffer.next_micro_batch()
    assert buffer.groups_of_next(1) == slice(1, 3)


def test_a_new_buffer_and_a_cleared_one_want_rollouts():
    buffer = RolloutBuffer(num_iterations=2, micro_batch_size=4)
    assert buffer.needs_rollouts
    buffer = full_buffer()
    buffer.next_micro_batch()
    buffer.clear()
    assert buffer.needs_rollouts
    assert (len(buffer), buffer.targets, buffer.position) == (0, {}, 0)


def test_filling_starts_over():
    buffer = full_buffer()
    buffer.next_micro_batch()
    buffer.fill(buffer.rollouts, {})
    assert next_keys(buffer) == (0, buffer.rollouts.keys.flatten()[:4].tolist())


def facts_of(buffer: RolloutBuffer) -> dict:
    """All that is known of its rollouts but texts and examples."""
    held = dict(vars(buffer.rollouts))
    del held["completions"]
    prompts, scores = vars(held.pop("prompts")), vars(held.pop("scores"))
    return {
        name: value
        for name, value in (held | prompts | scores | scores["components"]).items()
        if name not in ("examples", "components")
    }


def through_a_checkpoint(state: dict) -> dict:
    """As Lightning reads it: tensors and primitives only."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_buffer_continues_mid_pass_from_a_checkpoint():
    buffer, resumed = full_buffer(), RolloutBuffer(num_iterations=2, micro_batch_size=4)
    for _ in range(4):
        buffer.next_micro_batch()
    resumed.load_state_dict(through_a_checkpoint(buffer.state_dict()))
    assert not resumed.needs_rollouts
    found = facts_of(resumed)
    for name, value in facts_of(buffer).items():
        assert torch.equal(found[name], value) if isinstance(value, torch.Tensor) else found[name] == value, name
    assert (resumed.rollouts.completions, resumed.rollouts.prompts.examples) == ([], [])
    assert torch.equal(resumed.targets["weight"], buffer.targets["weight"])
    assert [next_keys(resumed), next_keys(resumed)] == [next_keys(buffer), next_keys(buffer)]
    assert resumed.needs_rollouts


def test_an_empty_buffer_stays_empty_through_a_checkpoint():
    buffer = full_buffer()
    buffer.load_state_dict(through_a_checkpoint(RolloutBuffer(num_iterations=2, micro_batch_size=4).state_dict()))
    assert buffer.needs_rollouts
    assert (len(buffer), buffer.targets) == (0, {})


def test_a_used_up_buffer_stays_used_up_through_a_checkpoint():
    buffer = full_buffer(num_iterations=1, micro_batch_size=12)
    buffer.next_micro_batch()
    resumed = RolloutBuffer(num_iterations=1, micro_batch_size=12)
    resumed.load_state_dict(through_a_checkpoint(buffer.state_dict()))
    assert resumed.needs_rollouts


def test_a_buffer_moves_as_a_whole():
    buffer = full_buffer()
    buffer.to(torch.device("meta"))
    tensors = [*facts_of(buffer).values(), *buffer.targets.values()]
    assert all(each.device.type == "meta" for each in tensors if isinstance(each, torch.Tensor))
    RolloutBuffer(num_iterations=1, micro_batch_size=1).to(torch.device("meta"))
