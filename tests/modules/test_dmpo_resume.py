"""A resumed run equals the uninterrupted one, bit for bit."""

import random
from functools import cache
from itertools import product

import pytest
import torch
from dmpo_runs import Recorder, SaveAt, loader, module, trainer, weights
from lightning.pytorch.callbacks import ModelCheckpoint

from dmpo_lightning import DMPO, WDCE, WDDO, LoRA, RandomOrderSampler, TrajectoryEstimator
from dmpo_lightning.modules.checkpoint import loaded_arguments
from tiers import slow_unless

OBJECTIVES = {
    "published": {
        "objective": WDCE(
            reward_temperature=0.1,
            replicates=2,
            baseline="negative",
            negative_term="log_likelihood",
            uninformative_groups="train",
        )
    },
    "policy": {"objective": WDCE(reward_temperature=0.1, replicates=2, baseline="policy")},
    "demo": {
        "objective": WDCE(
            reward_temperature=0.1, replicates=2, baseline="group", baseline_scale=0.5, prompt_weight="reward"
        )
    },
    "masks": {"objective": WDCE(reward_temperature=0.1, replicates=3, baseline="none", antithetic=False)},
    "wddo": {"objective": WDDO(reward_temperature=0.1, replicates=2)},
    "trajectory": {
        "objective": WDCE(reward_temperature=0.1, replicates=2, baseline="group", estimator=TrajectoryEstimator()),
        "sampler": RandomOrderSampler(denoising_steps=4),
    },
    "refreshed reference": {"reference_refresh_interval": 1},
}


def options_for(name):
    scheduler = {"lr_scheduler": lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=10)}
    return OBJECTIVES[name] | scheduler


MID_BUFFER, BUFFER_END, EPOCH_END, SECOND_EPOCH = 3, 4, 12, 14
CUTS = slow_unless(
    lambda name, stop: name in ("published", "trajectory") or (name, stop) == ("refreshed reference", BUFFER_END),
    [
        *((name, MID_BUFFER) for name in OBJECTIVES),
        *product(("published", "refreshed reference"), (BUFFER_END, EPOCH_END, SECOND_EPOCH)),
    ],
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The run of each objective, made once, which saves at every step."""

    @cache
    def run(name):
        folder = tmp_path_factory.mktemp("uninterrupted")
        whole, record = module(**options_for(name)), Recorder()
        save = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer(folder, max_steps=18, callbacks=[record, save], enable_checkpointing=True).fit(whole, loader())
        return whole, record, folder

    return run


@pytest.mark.parametrize(("name", "stop"), CUTS)
def test_resumed_equals_uninterrupted(tmp_path, uninterrupted, name, stop):
    whole, whole_record, folder = uninterrupted(name)
    resumed, record = module(**options_for(name)), Recorder()
    checkpoint = folder / f"step={stop}.ckpt"
    trainer(tmp_path, max_steps=18, callbacks=[record]).fit(resumed, loader(), ckpt_path=checkpoint, weights_only=True)
    assert record.prompts == whole_record.prompts[stop:]
    assert record.losses == whole_record.losses[stop:]
    assert torch.equal(weights(resumed), weights(whole))


def test_a_checkpoint_holds_trainable_weights_only(tmp_path):
    dmpo = module()
    run = trainer(tmp_path, max_steps=1)
    run.fit(dmpo, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    trainable = {f"policy.model.{name}" for name, _ in dmpo.policy.model.named_parameters()}
    assert set(saved["state_dict"]) == trainable


def test_a_refreshed_reference_survives_a_resume(tmp_path):
    dmpo = module(reference_refresh_interval=2)
    run = trainer(tmp_path, max_steps=14)
    run.fit(dmpo, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    reference = {name: value.clone() for name, value in dmpo.policy.reference.model.state_dict().items()}
    again = module(reference_refresh_interval=2)
    trainer(tmp_path, max_steps=14).fit(again, loader(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    for name, value in again.policy.reference.model.state_dict().items():
        assert torch.equal(value, reference[name])
    assert not torch.equal(
        reference["model.transformer.ff_out.weight"],
        module().policy.model.state_dict()["model.transformer.ff_out.weight"],
    )


@pytest.mark.parametrize("batch", slow_unless(lambda batch: batch in (3, 12), (0, 1, 3, 4, 11, 12, 13)))
def test_a_checkpoint_between_two_optimizer_steps_continues_exactly(tmp_path, batch):
    """At any micro-batch: accumulated gradients are in no checkpoint, so the step is begun again; 12 batches an epoch
    and 4 a buffer.
    """
    flags = {"max_steps": 8, "accumulate_grad_batches": 2}
    options = {"adapter": LoRA(r=2, alpha=4, dropout=0.3), "reward": drawing_reward}
    whole, record = module(**options), Recorder()
    seed_all()
    trainer(tmp_path, callbacks=[record, SaveAt(batch, tmp_path / "a.ckpt")], **flags).fit(whole, loader())
    resumed, rest = module(**options), Recorder()
    run = trainer(tmp_path, callbacks=[rest], **flags)
    run.fit(resumed, loader(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert rest.losses == record.losses[(batch + 1) // 2 * 2 :]
    assert run.global_step == 8
    assert torch.equal(weights(resumed), weights(whole))
    assert (resumed.buffers_collected, resumed.rollouts_seen) == (whole.buffers_collected, whole.rollouts_seen)


def test_a_second_fit_of_a_module_counts_its_own_micro_batches(tmp_path):
    dmpo = module()
    trainer(tmp_path, max_steps=1, accumulate_grad_batches=2).fit(dmpo, loader())
    again = trainer(tmp_path, max_steps=1, accumulate_grad_batches=2, callbacks=[SaveAt(0, tmp_path / "a.ckpt")])
    again.fit(dmpo, loader())
    progress = torch.load(tmp_path / "a.ckpt", weights_only=True)["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert progress["current"]["ready"] == progress["total"]["ready"] == 0


def drawing_reward(example, completion):
    return sum(character.isdigit() for character in completion) / 8 + random.random() / 4


def seed_all():
    random.seed(0)
    torch.manual_seed(0)


def test_a_checkpoint_of_another_class_says_what_becomes_of_it():
    with pytest.raises(ValueError, match=r"what `objective` was: .* another class than DMPO is exported first"):
        loaded_arguments(DMPO, {"arguments": {"replicates": 2, "antithetic": True}}, {})


@pytest.mark.parametrize("sampler", [{"class": "ConfidenceSampler", "temperature": "hot"}, {"class": ["a"]}])
def test_an_argument_that_no_module_wrote_is_named(sampler):
    given = {"completion_length": 8, "objective": WDCE(reward_temperature=0.5)}
    with pytest.raises(ValueError, match="cannot say what `sampler` was: it cannot be built again"):
        loaded_arguments(DMPO, {"arguments": {"sampler": sampler}}, given)
