"""Trainer flags keep their meaning."""

import functools
import math
import operator

import jaxtyping
import pytest
import torch
from dmpo_runs import Recorder, loader, module, trainer, weights
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from dmpo_lightning import WDCE, ConfidenceSampler, PromptLoader, SkipNonFiniteSteps
from dmpo_lightning.models.loading import load_tokenizer


def fit(tmp_path, dmpo=None, batches=None, **options):
    dmpo, recorder = dmpo or module(), Recorder()
    run = trainer(tmp_path, callbacks=[recorder, *options.pop("callbacks", [])], **options)
    run.fit(dmpo, batches or loader(), **({"val_dataloaders": loader(3, shuffle=False)}))
    return dmpo, recorder, run


def test_max_steps_counts_optimizer_steps(tmp_path):
    dmpo, recorder, run = fit(tmp_path, max_steps=5, accumulate_grad_batches=2)
    assert (run.global_step, len(recorder.losses), dmpo.buffers_collected) == (5, 10, 3)


def test_each_buffer_is_passed_num_iterations_times_over_all_its_micro_batches(tmp_path):
    dmpo, recorder, _ = fit(tmp_path, max_steps=8)  # 2 prompts x 4 rollouts = 2 micro-batches of 4, twice
    assert dmpo.buffers_collected == 2
    assert dmpo.rollouts_seen == 16
    assert recorder.prompts[0] == recorder.prompts[3] != recorder.prompts[4]


def test_no_prompt_is_skipped_in_an_epoch(tmp_path):
    _, recorder, _ = fit(tmp_path, max_epochs=1)
    assert len(recorder.prompts) == 12  # 3 buffers x 4 uses
    assert sorted(functools.reduce(operator.iadd, recorder.prompts[::4], [])) == list(range(6))


def test_accumulated_micro_batches_equal_one_large_micro_batch(tmp_path):
    whole, _, _ = fit(tmp_path, module(micro_batch_size=8), max_steps=4)
    parts, _, _ = fit(tmp_path, module(micro_batch_size=2), max_steps=4, accumulate_grad_batches=4)
    torch.testing.assert_close(weights(parts), weights(whole), rtol=0, atol=1e-5)


def test_the_gradient_is_clipped_before_the_step(tmp_path):
    _, free, _ = fit(tmp_path, max_steps=2)
    _, clipped, _ = fit(tmp_path, max_steps=2, gradient_clip_val=free.gradient_norms[0] / 10)
    assert free.gradient_norms[0] == pytest.approx(clipped.gradient_norms[0])  # the hook runs before clipping

    class AfterClipping(Recorder):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            norms = [p.grad.norm() for p in pl_module.parameters() if p.grad is not None]
            if norms:
                self.validated_at.append(torch.stack(norms).norm().item())

    recorder = AfterClipping()
    limit = free.gradient_norms[0] / 10
    trainer(tmp_path, max_steps=2, gradient_clip_val=limit, callbacks=[recorder]).fit(module(), loader())
    assert max(recorder.validated_at) <= limit * (1 + 1e-4)


def test_the_scheduler_advances_once_per_optimizer_step(tmp_path):
    dmpo = module(lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
    _, recorder, _ = fit(tmp_path, dmpo, max_steps=3, accumulate_grad_batches=2)
    assert recorder.learning_rates[1::2] == pytest.approx([5e-4, 2.5e-4, 1.25e-4])


def test_val_check_interval_and_limit_val_batches(tmp_path):
    _, recorder, run = fit(
        tmp_path, max_steps=8, val_check_interval=4, check_val_every_n_epoch=None, limit_val_batches=1
    )
    assert recorder.validated_at == [4, 8]
    assert {"val/sampled/accuracy", "val/greedy/accuracy", "val/sampled/accuracy_stderr"} <= set(run.callback_metrics)
    assert run.num_val_batches == [1]


def test_fast_dev_run_trains_and_validates_one_batch(tmp_path):
    _, recorder, run = fit(tmp_path, fast_dev_run=True)
    assert (len(recorder.losses), run.global_step, len(recorder.validated_at)) == (1, 1, 1)


def test_model_checkpoint_monitors_a_validation_accuracy(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="val/greedy/accuracy", mode="max", save_top_k=1)
    fit(tmp_path, max_epochs=1, callbacks=[best], enable_checkpointing=True)
    assert (tmp_path / best.best_model_path.split("/")[-1]).is_file()
    assert best.best_model_score is not None


def test_tensorboard_gets_rewards_weights_and_learning_rate(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path, name="run")
    fit(tmp_path, max_steps=4, logger=logger, log_every_n_steps=1, callbacks=[LearningRateMonitor()])
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    names = set(events.Tags()["scalars"])
    assert {"reward/total", "weight/ess", "policy/log_rnd", "train/loss", "lr-AdamW"} <= names


def test_limit_train_batches_that_cuts_a_buffer_starts_the_next_epoch_with_new_prompts(tmp_path):
    dmpo, recorder, _ = fit(tmp_path, max_epochs=2, limit_train_batches=3)
    assert dmpo.buffers_collected == 2
    assert len(recorder.losses) == 6


def test_validation_does_not_change_training(tmp_path):
    with_validation, _, _ = fit(tmp_path, max_steps=4, val_check_interval=2, check_val_every_n_epoch=None)
    without = module()
    trainer(tmp_path, max_steps=4).fit(without, loader())
    assert torch.equal(weights(with_validation), weights(without))


def test_a_run_depends_on_its_seed_alone(tmp_path):
    first, second, other = (fit(tmp_path, module(seed=seed), max_steps=3)[0] for seed in (3, 3, 4))
    assert torch.equal(weights(first), weights(second))
    assert not torch.equal(weights(first), weights(other))


def test_another_training_loader_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="PromptLoader, got DataLoader"):
        trainer(tmp_path, max_steps=1).fit(module(), DataLoader([1, 2]))


def test_a_prompt_loader_from_a_foreign_datamodule_is_told_its_repeats(tmp_path):
    class Foreign(LightningDataModule):
        def train_dataloader(self):
            return loader()

    recorder = Recorder()
    trainer(tmp_path, max_epochs=1, callbacks=[recorder]).fit(module(), Foreign())
    assert len(recorder.losses) == 12


@pytest.mark.parametrize(
    ("options", "flags", "message"),
    [
        ({"micro_batch_size": 3}, {}, "must divide the buffer of 8 rollouts"),
        ({}, {"accumulate_grad_batches": 4}, "multiple of accumulate_grad_batches, got 4"),
        ({"completion_length": 124, "sampler": ConfidenceSampler()}, {}, "Prompt 0 of the dataset has"),
        ({"reward": None}, {}, "DMPO needs a reward"),
    ],
)
def test_what_does_not_fit_together_is_an_error_before_training(tmp_path, options, flags, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, max_steps=1, **flags).fit(module(**options), loader())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"completion_length": 10, "sampler": ConfidenceSampler(block_length=4)},
            "multiple of `block_length`, got 10 and 4",
        ),
        ({"sampler": ConfidenceSampler(block_length=4, denoising_steps=3)}, "multiple of the number of blocks, 2"),
        ({"sampler": ConfidenceSampler(denoising_steps=9)}, "at most `completion_length`, got 9 and 8"),
        ({"group_size": 1}, "`group_size` must be at least 2"),
        ({"micro_batch_size": 0}, "`micro_batch_size` must be at least 1"),
        ({"num_iterations": 0}, "`num_iterations` must be at least 1"),
        ({"completion_length": 128, "sampler": ConfidenceSampler()}, "room for a prompt in the 128 tokens .* got 128"),
        ({"evaluation_lengths": [8, 500]}, "room for a prompt in the 128 tokens .* got 500"),
        ({"seed": 2**64}, r"`seed` must be from -2\*\*63 to 2\*\*64 - 1, got 18446744073709551616"),
    ],
)
def test_bad_settings_are_errors_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        module(**options)


@pytest.mark.parametrize(
    ("weight", "interval", "is_warned"),
    [("reward", None, True), ("reward", 2, True), ("reward", 1, False), ("equal", None, False)],
)
def test_prompts_that_count_by_reward_need_a_reference_of_every_buffer(weight, interval, is_warned, recwarn):
    objective = WDCE(reward_temperature=0.1, prompt_weight=weight)
    module(objective=objective, reference_refresh_interval=interval)
    warned = [each for each in recwarn if "`prompt_weight` reward moves the minimum" in str(each.message)]
    assert len(warned) == is_warned


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward_temperature": 0.0}, "positive and finite, got 0.0; .* set `reference_refresh_interval`"),
        ({"reward_temperature": 0.1, "proximal_coefficient": 0.0}, r"in \(0, 1\], got 0.0"),
        ({"reward_temperature": 0.1, "proximal_coefficient": 1.5}, r"in \(0, 1\], got 1.5"),
        ({"reward_temperature": math.nan}, "positive and finite, got nan"),
        ({"reward_temperature": math.inf}, "positive and finite, got inf"),
        ({"reward_temperature": 0.1, "proximal_coefficient": math.nan}, r"in \(0, 1\], got nan"),
        ({"reward_temperature": 0.1, "weight_tolerance": math.nan}, r"in \[0, 1\), got nan"),
        ({"reward_temperature": 0.1, "replicates": 3}, "even when `antithetic` is true, got 3"),
        ({"reward_temperature": 0.1, "baseline": "mean"}, "`baseline` must be"),
    ],
)
def test_bad_objectives_are_errors_at_construction(monkeypatch, options, message):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it: annotations are not checked
    with pytest.raises(ValueError, match=message):
        WDCE(**options)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_half_precision_trains_and_evaluates_with_exact_rewards(tmp_path, precision):
    """Under ``bf16-true`` Lightning makes bfloat16 the default type within each step."""
    dmpo = module(reward=lambda example, completion: 2.953)
    run = trainer(tmp_path, max_steps=4, precision=precision)
    run.fit(dmpo, loader())
    assert float(run.callback_metrics["reward/total"]) == pytest.approx(2.953, abs=1e-6)
    run.test(dmpo, loader(6, shuffle=False), verbose=False)
    assert float(run.callback_metrics["test/sampled/reward"]) == pytest.approx(2.953, abs=1e-6)
    assert torch.isfinite(weights(dmpo)).all()


class Spoiler(Callback):
    """Makes a gradient NaN after the backward passes of some optimizer steps."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step in self.steps:
            next(p for p in pl_module.parameters() if p.grad is not None).grad[0] = torch.nan


def test_a_step_with_a_gradient_that_is_not_finite_is_left_out(tmp_path):
    dmpo, states = module(), []

    class Snapshots(Callback):
        def on_train_batch_end(self, *_):
            states.append(weights(dmpo).clone())

    skipping = SkipNonFiniteSteps()
    run = trainer(tmp_path, max_steps=4, callbacks=[Spoiler(1), Snapshots(), skipping])
    with pytest.warns(UserWarning, match="optimizer step 1 was left out, 1 so far"):
        run.fit(dmpo, loader())
    assert torch.equal(states[1], states[0])
    assert not torch.equal(states[2], states[1])
    assert torch.isfinite(states[-1]).all()
    assert skipping.total == 1
    assert run.callback_metrics["train/skipped_steps"] == 1


def test_the_gradients_norm_is_logged_as_it_is_before_clipping(tmp_path):
    recorder = Recorder()
    run = trainer(tmp_path, max_steps=2, accumulate_grad_batches=2, gradient_clip_val=1e-3, callbacks=[recorder])
    run.fit(module(), loader())
    assert float(run.callback_metrics["gradient/norm"]) == pytest.approx(recorder.gradient_norms[-1], rel=1e-5)
    assert recorder.gradient_norms[-1] > 1e-2


def test_too_many_such_steps_in_a_row_end_the_run(tmp_path):
    dmpo = module()
    run = trainer(tmp_path, max_steps=9, callbacks=[Spoiler(0, 2, 3, 4, 5), SkipNonFiniteSteps(2)])
    message = r"3 optimizer steps in a row .* `limit` 2 .* the learning rate is too high \(it is 0.001\)"
    with pytest.warns(UserWarning, match="was left out"), pytest.raises(ValueError, match=message):
        run.fit(dmpo, loader())
    assert run.global_step == 4


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_a_loader_with_a_tokenizer_of_its_own_must_have_the_models_tokens(tmp_path, stage):
    tokenizer = load_tokenizer("sudoku_tiny")
    tokenizer.add_tokens([f"<hint{i}>" for i in range(40)])
    foreign = PromptLoader([{"prompt": "04000001<hint39>"}] * 2, tokenizer, batch_size=2, shuffle=stage == "fit")
    with pytest.raises(ValueError, match="The loader's prompts have token ids up to 64, and the model knows 32 tokens"):
        getattr(trainer(tmp_path, max_steps=1), stage)(module(), foreign)


def test_a_destroyed_policy_is_named_with_what_most_often_destroys_it(tmp_path):
    class Destroyer(Callback):
        @torch.no_grad()
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 4:
                pl_module.policy.model.get_input_embeddings().weight.fill_(torch.nan)

    message = r"`policy/entropy` of the rollouts at optimizer step 4 is not finite.*`gradient_clip_val` is None"
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, max_steps=9, callbacks=[Destroyer()]).fit(module(), loader())
