"""What an observer sees of each rollout buffer is what the run trains on."""

import copy

import pytest
import torch
from dmpo_runs import digit_share, loader, module, trainer

from dmpo_lightning.modules.observers import RolloutObserver


class Watcher(RolloutObserver):
    def __init__(self):
        self.seen = []

    def on_rollouts(self, trainer, module, buffer):
        assert buffer is module.buffer
        self.seen.append(copy.copy(buffer))


def test_an_observer_sees_each_buffer_once_before_it_is_trained_on(tmp_path):
    watcher, dmpo = Watcher(), module()
    trainer(tmp_path, max_steps=8, max_epochs=-1, callbacks=[watcher]).fit(dmpo, loader())
    assert [each.number for each in watcher.seen] == [0, 1]
    for buffer in watcher.seen:
        rollouts = buffer.rollouts
        assert buffer.position == 0
        assert {name: value.shape for name, value in buffer.targets.items()} == dict.fromkeys(
            ("weight", "signal", "log_rnd"), (2, 4)
        )
        texts = [text for group in rollouts.completions for text in group]
        assert texts == dmpo.policy.decode(rollouts.completion_ids.flatten(0, 1))
        expected = [
            [digit_share(example, text) for text in group]
            for example, group in zip(rollouts.prompts.examples, rollouts.completions, strict=True)
        ]
        torch.testing.assert_close(rollouts.reward, torch.tensor(expected))
        assert buffer.means["reward/total"] == pytest.approx(float(rollouts.reward.mean()))
        assert all(seconds > 0 for seconds in buffer.seconds.values())


def last_digit_is_one(example, completion):
    """Differs within groups of even prompts alone."""
    return 0.0 if int(example["digit"]) % 2 else float(completion.count("1"))


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_rounds_fill_a_buffer_with_groups_that_differ(tmp_path, rounds):
    watcher, dmpo = Watcher(), module(reward=last_digit_is_one, sampling_rounds=rounds, num_iterations=1, group_size=8)
    trainer(tmp_path, max_steps=2, max_epochs=-1, callbacks=[watcher]).fit(dmpo, loader(6, shuffle=False))
    kept = 6 // rounds
    first = watcher.seen[0]
    assert first.rollouts.reward.shape == (kept, 8)
    index, sampled = first.rollouts.prompts.prompt_index.tolist(), {1: 6, 2: 6, 3: 4}[rounds]
    # Prompts 0, 2 and 4 can differ. They come first, and as many rounds are sampled as it takes.
    assert index == {1: [0, 1, 2, 3, 4, 5], 2: [0, 2, 4], 3: [0, 2]}[rounds]
    assert first.sampled_reward.shape == (sampled, 8)
    assert sorted([*first.left_out, *index]) == list(range(sampled))
    kept_facts = (first.rollouts.prompts.examples, first.rollouts.completions, first.rollouts.reward)
    for example, texts, reward in zip(*kept_facts, strict=True):
        assert [last_digit_is_one(example, text) for text in texts] == reward.tolist()
    assert first.means["reward/total"] == pytest.approx(float(first.sampled_reward.mean()))
    assert dmpo.rollouts_seen == sum(each.sampled_reward.numel() for each in watcher.seen)


def test_a_round_more_leaves_the_rollouts_of_those_before_as_they_are(tmp_path):
    one, two = Watcher(), Watcher()
    for watcher, rounds in ((one, 1), (two, 2)):
        dmpo = module(reward=last_digit_is_one, sampling_rounds=rounds, num_iterations=1)
        trainer(tmp_path, max_steps=1, callbacks=[watcher]).fit(dmpo, loader(6, shuffle=False))
    index = two.seen[0].rollouts.prompts.prompt_index
    assert torch.equal(two.seen[0].rollouts.completion_ids, one.seen[0].rollouts.completion_ids[index])


def test_rounds_that_do_not_divide_the_prompts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`sampling_rounds` must divide the 6 prompts of a batch, got 4"):
        trainer(tmp_path, max_steps=1).fit(module(sampling_rounds=4), loader(6))
