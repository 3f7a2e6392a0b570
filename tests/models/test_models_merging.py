"""Sampling from merged weights, and compiled blocks."""

import copy
import shutil

import jaxtyping
import pytest
import torch
from dmpo_runs import loader, module, trainer

from dmpo_lightning import LoRA
from dmpo_lightning.policy import evaluating


def adapted(**options):
    dmpo = module(adapter=LoRA(r=4, alpha=8, dropout=0.0), random_weights=True, **options)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in dmpo.policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    return dmpo


def logits(policy, **options):
    ids = torch.randint(6, 20, (2, 12), generator=torch.Generator().manual_seed(0))
    with evaluating(policy):
        return policy.logits(ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(24).view(2, 12), **options)


def test_merged_weights_give_the_logits_of_the_adapted_model_and_leave_it_as_it_is():
    policy = adapted().policy
    before = {name: value.clone() for name, value in policy.named_parameters()}
    expected, reference = logits(policy), logits(policy, reference=True)
    with policy.merged():
        found = logits(policy)
        assert torch.equal(logits(policy, reference=True), reference)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - reference)[found.isfinite()].abs().max() > 0.01
    assert not torch.equal(found, expected)  # another rounding: the merged weights were used
    assert torch.equal(logits(policy), expected)
    assert {name: value.clone() for name, value in policy.named_parameters()}.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in policy.named_parameters())


def test_merged_weights_follow_the_adapters():
    policy = adapted().policy
    with policy.merged():
        logits(policy)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.mul_(-2)
    expected = logits(policy)
    with policy.merged():
        torch.testing.assert_close(logits(policy), expected, rtol=1e-4, atol=1e-4)


def test_only_the_adapted_layers_are_held_twice():
    policy = adapted().policy
    parameters, state = sum(p.numel() for p in policy.parameters()), len(policy.state_dict())
    with policy.merged():
        pass
    assert sum(p.numel() for p in policy.parameters()) == parameters
    assert len(policy.state_dict()) == state
    own = {p.data_ptr() for p in policy.parameters()}
    copied = [name for name, p in policy._merged.model.named_parameters() if p.data_ptr() not in own]
    assert copied
    assert all(name.rpartition(".")[0].rpartition(".")[2] in name for name in copied)
    assert not any("wte" in name or "norm" in name or "transformer.ff_out" in name for name in copied)


def test_a_run_samples_from_merged_weights_and_trains_the_adapters(tmp_path):
    dmpo = adapted(sample_merged=True)
    before = copy.deepcopy({n: p.detach() for n, p in dmpo.policy.named_parameters() if p.requires_grad})
    trainer(tmp_path, max_steps=6).fit(dmpo, loader())
    assert dmpo.policy._merged is not None
    after = {n: p for n, p in dmpo.policy.named_parameters() if p.requires_grad}
    assert any(not torch.equal(after[name], value) for name, value in before.items())


def test_merging_needs_adapters():
    with pytest.raises(ValueError, match="needs adapters"):
        module(sample_merged=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a processor needs g++")
def test_compiled_blocks_compute_the_same_and_keep_their_names(tmp_path, monkeypatch):
    # Compiled, the checks of shapes that tests install would be compiled too, which they do not survive.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    plain, compiled = module(), module(compile_blocks=True)
    assert list(plain.state_dict()) == list(compiled.state_dict())
    torch.testing.assert_close(logits(compiled.policy), logits(plain.policy), rtol=1e-4, atol=1e-4)
    trainer(tmp_path, max_steps=4).fit(compiled, loader())
    assert torch.isfinite(compiled.trainer.callback_metrics["train/loss"])


def test_compiling_needs_a_model_that_names_its_blocks():
    from dmpo_lightning.models.parts import compile_layers

    with pytest.raises(ValueError, match="names its layers, got Linear"):
        compile_layers(torch.nn.Linear(2, 2))
