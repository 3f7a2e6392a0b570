"""Callbacks freeze and thaw weights: checkpoints hold all that a run can train, and it goes on with what it trained."""

from itertools import product

import pytest
import torch
from dmpo_runs import SaveAt, loader, module, trainer, weights
from lightning.pytorch.callbacks import BaseFinetuning, Callback, EMAWeightAveraging
from safetensors.torch import load_file
from torch import nn

from dmpo_lightning import DMPO, LoRA, SavePretrained
from dmpo_lightning.checkpoints.export import export_checkpoint
from tiers import slow_unless

EPOCH = 12  # steps: 3 buffers x 4 uses


def embedding(pl_module):
    return pl_module.policy.model.get_input_embeddings()


def first_block(pl_module):
    """Its own weights, or its part of an adapter."""
    named = dict(pl_module.policy.model.named_parameters()).items()
    adapter = ".default." if pl_module.policy.has_adapters else "."
    return [weight for name, weight in named if "blocks.0." in name and adapter in name]


class Sets(Callback):
    """Freezes or thaws weights in a hook, at an optimizer step or at all of them."""

    def __init__(self, hook, which=embedding, step=None, *, trains=False):
        def change(trainer, pl_module, *args, **kwargs):
            if step in (None, trainer.global_step):
                found = which(pl_module)
                for weight in found.parameters() if isinstance(found, nn.Module) else found:
                    weight.requires_grad_(trains)

        setattr(self, hook, change)


class Thaws(BaseFinetuning):
    """Trains the first block from the second epoch on."""

    def block(self, pl_module):
        return pl_module.policy.model.get_submodule("model.transformer.blocks.0")

    def freeze_before_training(self, pl_module):
        self.freeze(self.block(pl_module))

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(self.block(pl_module), optimizer, lr=1e-2)


class ThawsByItself(Callback):
    """The same without Lightning's bookkeeping, of an adapter too: of weights that the optimizer knows."""

    def on_fit_start(self, trainer, pl_module):
        for weight in first_block(pl_module):
            weight.requires_grad_(False)

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            for weight in first_block(pl_module):
                weight.requires_grad_(True)


class AddsAGroup(Callback):
    """Has the optimizer know the weights when they are thawed."""

    def setup(self, trainer, pl_module, stage):
        for weight in first_block(pl_module):
            weight.requires_grad_(False)

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            block = [weight.requires_grad_(True) for weight in first_block(pl_module)]
            trainer.optimizers[0].add_param_group({"params": block, "lr": 1e-2})


def fit(folder, steps, *callbacks, save_at=None, made=None, ckpt_path=None, flags=None, **options):
    made = made or module(**options)
    # One training batch is one step here.
    saves = [] if save_at is None else [SaveAt(save_at - 1, folder / "at.ckpt")]
    run = trainer(folder, max_steps=steps, callbacks=[*callbacks, *saves], **flags or {})
    run.fit(made, loader(), ckpt_path=ckpt_path, weights_only=True)
    return made


def names(path):
    return set(torch.load(path, weights_only=True)["state_dict"])


FREEZERS = {
    "setup": lambda: Sets("setup"),
    "on_fit_start": lambda: Sets("on_fit_start"),
    "on_train_start": lambda: Sets("on_train_start"),
    "on the way": lambda: Sets("on_train_batch_start", step=2),
}


@pytest.mark.parametrize("hook", slow_unless(lambda hook: hook == "on_fit_start", FREEZERS))
def test_whatever_is_frozen_a_checkpoint_holds_the_whole_model_and_continues(tmp_path, hook):
    whole = fit(tmp_path, 6, FREEZERS[hook](), save_at=3)
    path = tmp_path / "at.ckpt"
    assert names(path) == {f"policy.model.{name}" for name, _ in whole.policy.model.named_parameters()}
    again = fit(tmp_path, 6, FREEZERS[hook](), ckpt_path=path)
    assert torch.equal(weights(again), weights(whole))
    assert not torch.equal(weights(again), weights(fit(tmp_path, 6)))
    assert export_checkpoint(path, tmp_path / "out") == len(names(path))
    loaded = DMPO.load_from_checkpoint(path, reward=lambda example, completion: 0.0)
    trainer(tmp_path).test(loaded, loader(3, shuffle=False), ckpt_path=path, verbose=False, weights_only=True)


THAWS = {"Lightning's": (Thaws, {}), "own": (ThawsByItself, {}), "adapted": (ThawsByItself, {"adapter": LoRA(r=2)})}


@pytest.mark.parametrize(
    ("kind", "stop"),
    slow_unless(lambda *case: case == ("Lightning's", EPOCH + 2), product(THAWS, (2, EPOCH, EPOCH + 2))),
)
def test_a_run_that_thaws_on_its_way_goes_on_as_if_it_had_not_ended(tmp_path, kind, stop):
    callback, options = THAWS[kind]
    whole = fit(tmp_path, EPOCH + 4, callback(), save_at=stop, **options)
    again = fit(tmp_path, EPOCH + 4, callback(), ckpt_path=tmp_path / "at.ckpt", save_at=EPOCH + 4, **options)
    assert torch.equal(weights(again), weights(whole))
    assert all(weight.requires_grad for weight in first_block(again))
    held = torch.load(tmp_path / "at.ckpt", weights_only=True)["state_dict"]
    assert all(
        torch.equal(held[f"policy.model.{n}"], w) for n, w in again.policy.model.named_parameters() if w.requires_grad
    )


@pytest.mark.slow
def test_a_param_group_that_nobody_restores_is_refused_before_the_first_step(tmp_path):
    fit(tmp_path, EPOCH + 2, AddsAGroup(), save_at=EPOCH + 2)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        fit(tmp_path, EPOCH + 4, AddsAGroup(), ckpt_path=tmp_path / "at.ckpt")


@pytest.mark.slow
def test_a_run_decides_itself_where_it_freezes_otherwise_than_the_one_it_continues(tmp_path):
    fit(tmp_path, 3, Sets("on_fit_start"), save_at=3)
    made = module()
    before = embedding(made).weight.clone()
    assert embedding(fit(tmp_path, 6, made=made, ckpt_path=tmp_path / "at.ckpt")).weight.requires_grad
    assert not torch.equal(embedding(made).weight, before)
    frozen = fit(tmp_path, 8, Sets("on_fit_start"), ckpt_path=tmp_path / "at.ckpt")
    assert torch.equal(embedding(frozen).weight, before)


@pytest.mark.slow
def test_an_optimizer_of_other_weights_is_named(tmp_path):
    fit(tmp_path, 3, save_at=3)
    with pytest.raises(ValueError, match=r"optimizer has other weights .* 1 differ, such as .*wte.weight"):
        fit(tmp_path, 6, Sets("setup"), ckpt_path=tmp_path / "at.ckpt")


@pytest.mark.parametrize("interval", [None, pytest.param(1, marks=pytest.mark.slow)])
def test_a_frozen_part_of_an_adapter_stays_frozen_and_is_saved(tmp_path, interval):
    """PEFT makes each adapter trainable that it switches on, and the reference is an adapter that is switched off."""
    made = module(adapter=LoRA(r=2), reference_refresh_interval=interval)
    before = [weight.clone() for weight in first_block(made)]
    fit(tmp_path, 6, Sets("on_fit_start", first_block), SavePretrained(str(tmp_path / "out")), save_at=5, made=made)
    assert all(map(torch.equal, first_block(made), before))
    adapter = {name for name, _ in made.named_parameters() if ".default." in name}
    assert adapter <= names(tmp_path / "at.ckpt")
    assert len(load_file(tmp_path / "out" / "adapter_model.safetensors")) == len(adapter)


@pytest.mark.slow
def test_weights_of_the_base_that_were_trained_beside_an_adapter_are_kept(tmp_path):
    thaw, options = lambda: Sets("setup", trains=True), {"adapter": LoRA(r=2), "random_weights": False}
    whole = fit(tmp_path, 6, thaw(), save_at=3, **options)
    path = tmp_path / "at.ckpt"
    assert torch.equal(weights(fit(tmp_path, 6, thaw(), ckpt_path=path, **options)), weights(whole))
    with pytest.raises(ValueError, match=r"also trained 1 weights of the base, such as .*wte.weight.* --merge"):
        export_checkpoint(path, tmp_path / "out")
    export_checkpoint(path, tmp_path / "merged", merge=True)
    trained = torch.load(path, weights_only=True)["state_dict"]
    held = next(value for name, value in trained.items() if "wte" in name)
    assert torch.equal(load_file(tmp_path / "merged" / "model.safetensors")["model.transformer.wte.weight"], held)


@pytest.mark.slow
def test_averages_of_what_is_thawed_go_on_and_those_of_what_is_frozen_stay(tmp_path):
    whole = fit(tmp_path, EPOCH + 4, Thaws(), EMAWeightAveraging(decay=0.5), save_at=EPOCH + 2)
    again = fit(tmp_path, EPOCH + 4, Thaws(), EMAWeightAveraging(decay=0.5), ckpt_path=tmp_path / "at.ckpt")
    assert torch.equal(weights(again), weights(whole))


class WithHead(DMPO):
    """Has weights of its own beside the policy's."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.head = nn.Linear(2, 2)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.head(torch.ones(2)).sum()


def with_head():
    made = module()
    made.__class__ = WithHead
    made.head = nn.Linear(2, 2)
    return made


@pytest.mark.slow
def test_weights_that_a_class_of_ones_own_adds_are_held_too(tmp_path):
    torch.manual_seed(0)
    whole = fit(tmp_path, 6, made=with_head(), save_at=3)
    torch.manual_seed(1)
    again = fit(tmp_path, 6, made=with_head(), ckpt_path=tmp_path / "at.ckpt")
    assert torch.equal(again.head.weight, whole.head.weight)


@pytest.mark.slow
@pytest.mark.parametrize("callback", [Thaws, lambda: Sets("on_train_batch_start", step=1)])
def test_several_ranks_cannot_thaw(tmp_path, callback):
    with pytest.raises(ValueError, match="What is trained cannot change in a run of several ranks"):
        fit(tmp_path, 4, callback(), flags={"strategy": "ddp_find_unused_parameters_true", "devices": 1})
