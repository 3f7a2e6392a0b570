"""Callbacks freeze weights for a run: checkpoints hold all that a run can train, whatever is frozen."""

import pytest
import torch
from dmpo_runs import SaveAt, loader, module, trainer, weights
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file
from torch import nn

from dmpo_lightning import DMPO, LoRA, SavePretrained
from dmpo_lightning.checkpoints.export import export_checkpoint
from tiers import slow_unless


def embedding(pl_module):
    return pl_module.policy.model.get_input_embeddings()


def first_block(pl_module):
    """Its own weights, or its part of an adapter."""
    named = dict(pl_module.policy.model.named_parameters()).items()
    adapter = ".default." if pl_module.policy.has_adapters else "."
    return [weight for name, weight in named if "blocks.0." in name and adapter in name]


class Sets(Callback):
    """Freezes or thaws weights in a hook."""

    def __init__(self, hook, which=embedding, *, trains=False):
        def change(trainer, pl_module, *args, **kwargs):
            found = which(pl_module)
            for weight in found.parameters() if isinstance(found, nn.Module) else found:
                weight.requires_grad_(trains)

        setattr(self, hook, change)


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
