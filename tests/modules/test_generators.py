"""What a resume must survive besides the plain case: cut epochs, dropout, another layout."""

import io
import random

import numpy as np
import pytest
import torch
from dmpo_runs import Recorder, loader, module, trainer, weights
from lightning.pytorch.callbacks import ModelCheckpoint

from dmpo_lightning import LoRA
from dmpo_lightning.modules.continuation import generator_states, restore_generators
from tiers import slow_unless


def interrupted(tmp_path, stop, make=module, **flags):
    """An uninterrupted run with a checkpoint on the way, and the run resumed from it."""
    whole, whole_record = make(), Recorder()
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=stop, save_top_k=-1)
    trainer(tmp_path, callbacks=[whole_record, save], enable_checkpointing=True, **flags).fit(whole, loader())
    resumed, record = make(), Recorder()
    checkpoint = tmp_path / f"step={stop}.ckpt"
    trainer(tmp_path, callbacks=[record], **flags).fit(resumed, loader(), ckpt_path=checkpoint, weights_only=True)
    return whole, whole_record, resumed, record


@pytest.mark.parametrize(
    ("limit", "stop"), slow_unless(lambda *case: case == (3, 2), [(6, 6), (3, 3), (3, 2), (0.5, 6)])
)
def test_resume_is_exact_where_limit_train_batches_cuts_epochs_and_buffers(tmp_path, limit, stop):
    whole, expected, resumed, record = interrupted(tmp_path, stop, max_steps=12, limit_train_batches=limit)
    assert record.prompts == expected.prompts[stop:]
    assert record.losses == expected.losses[stop:]
    assert torch.equal(weights(resumed), weights(whole))


def test_resume_is_exact_with_dropout(tmp_path):
    def adapted():
        torch.manual_seed(0)
        return module(adapter=LoRA(r=2, alpha=4, dropout=0.3))

    whole, expected, resumed, record = interrupted(tmp_path, 3, make=adapted, max_steps=8)
    assert record.losses == expected.losses[3:]
    assert torch.equal(weights(resumed), weights(whole))


class DrawnReward:
    """Two draws per completion, one from each of the generators that rewards may use; keeps what it gave."""

    def __init__(self):
        self.given = []

    def __call__(self, example, completion):
        self.given.append(random.random() + float(np.random.rand()))
        return self.given[-1]


@pytest.mark.parametrize("stop", [3, 4])
def test_rewards_that_draw_from_python_and_numpy_are_the_same_after_a_resume(tmp_path, stop):
    rewards = []

    def drawn():
        random.seed(len(rewards))  # a new process is seeded, but has drawn nothing
        np.random.seed(len(rewards))
        rewards.append(DrawnReward())
        return module(reward=rewards[-1])

    whole, expected, resumed, record = interrupted(tmp_path, stop, make=drawn, max_steps=10)
    uninterrupted, after = (reward.given for reward in rewards)
    assert len(uninterrupted) == 3 * 8  # a buffer of 2 prompts x 4 rollouts every 4 steps
    assert after == uninterrupted[8:]
    assert record.losses == expected.losses[stop:]
    assert torch.equal(weights(resumed), weights(whole))


def draws():
    return [torch.randn(1).item(), random.gauss(0, 1), float(np.random.normal()), random.random(), np.random.rand()]


def test_generators_come_back_from_a_checkpoint_with_a_gaussian_kept_for_later():
    draws()  # of each pair of gaussians one is kept
    file = io.BytesIO()
    torch.save(generator_states(), file)
    expected = draws()
    assert draws() != expected
    file.seek(0)
    restore_generators(torch.load(file, weights_only=True))
    assert draws() == expected


def test_another_buffer_layout_is_collected_afresh_and_said(tmp_path):
    first = module(micro_batch_size=4)
    run = trainer(tmp_path, max_steps=3)
    run.fit(first, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    other, record = module(micro_batch_size=2), Recorder()
    again = trainer(tmp_path, max_steps=6, callbacks=[record])
    with pytest.warns(UserWarning, match="collected afresh"):
        again.fit(other, loader(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert again.global_step == 6
    assert other.buffers_collected == first.buffers_collected + 1
    assert record.prompts[0] not in [[], first]  # the interrupted buffer's prompts are not used a second time


def test_a_user_component_called_accuracy_is_left_alone(tmp_path):
    dmpo = module(reward=lambda example, completion: {"accuracy": 1.0, "format": 0.5})
    run = trainer(tmp_path)
    run.validate(dmpo, loader(3, shuffle=False), verbose=False)
    assert float(run.callback_metrics["val/greedy/accuracy"]) == 1.0
    assert float(run.callback_metrics["val/greedy/reward"]) == 1.5


def test_evaluation_refuses_prompts_that_the_model_cannot_take(tmp_path):
    from dmpo_runs import TOKENIZER

    from dmpo_lightning import PromptLoader

    long = PromptLoader([{"prompt": "1" * 300, "digit": "1"}], TOKENIZER, batch_size=1, shuffle=False)
    with pytest.raises(ValueError, match="Prompt 0 of the dataset has 310 tokens, but at most 120"):
        trainer(tmp_path).validate(module(), long)


def test_the_training_loader_is_refused_for_evaluation(tmp_path):
    shared = loader()
    with pytest.raises(ValueError, match="given for evaluation too"):
        trainer(tmp_path, max_epochs=1).fit(module(), shared, shared)
