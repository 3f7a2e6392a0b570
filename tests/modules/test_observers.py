"""What an observer sees of each rollout buffer is what the run trains on."""

import pytest
import torch
from dmpo_runs import digit_share, loader, module, trainer

from dmpo_lightning.modules.observers import RolloutObserver


class Watcher(RolloutObserver):
    def __init__(self):
        self.seen, self.buffers = [], []

    def on_rollouts(self, trainer, module, collected):
        self.seen.append(collected)
        self.buffers.append((module.buffer.rollouts, dict(module.buffer.targets), module.buffer.position))


def test_an_observer_sees_each_buffer_once_before_it_is_trained_on(tmp_path):
    watcher, dmpo = Watcher(), module()
    trainer(tmp_path, max_steps=8, max_epochs=-1, callbacks=[watcher]).fit(dmpo, loader())
    assert [each.iteration for each in watcher.seen] == [0, 1]
    for collected, (rollouts, targets, position) in zip(watcher.seen, watcher.buffers, strict=True):
        assert rollouts is collected.rollouts
        assert position == 0
        assert {name: value.shape for name, value in targets.items()} == dict.fromkeys(
            ("weight", "signal", "log_rnd"), (2, 4)
        )
        texts = [text for group in collected.completions for text in group]
        assert texts == dmpo.policy.decode(rollouts.completion_ids.flatten(0, 1))
        expected = [
            [digit_share(example, text) for text in group]
            for example, group in zip(collected.prompts.examples, collected.completions, strict=True)
        ]
        torch.testing.assert_close(rollouts.reward, torch.tensor(expected))
        assert collected.means["reward/total"] == pytest.approx(float(rollouts.reward.mean()))
        assert all(seconds > 0 for seconds in collected.seconds.values())
