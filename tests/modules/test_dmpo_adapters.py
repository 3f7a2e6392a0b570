"""DMPO under LoRA: what is the reference, what a checkpoint holds, what a resume restores."""

from functools import cache

import huggingface_hub
import pytest
import torch
from dmpo_runs import Recorder, loader, module, small_dmpo, trainer, weights
from lightning.pytorch.callbacks import ModelCheckpoint

from dmpo_lightning import DMPO, LoRA
from dmpo_lightning.models.loading import load_model
from dmpo_lightning.policy import evaluating
from helpers import perturb, prompt_batch, tiny_policy

PLACES = torch.tensor([3, 10, 20])


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def lora_module(**options) -> DMPO:
    return module(**{"random_weights": False, "adapter": LoRA(r=4, alpha=8, dropout=0.0)} | options)


def module_from(folder, **options) -> DMPO:
    """Of a folder that holds an adapter, or a whole model."""
    return small_dmpo(str(folder), **{"num_iterations": 2, **options})


def logits(policy, **options) -> torch.Tensor:
    prompts = prompt_batch(policy, ["0012", "0100"])
    with evaluating(policy):
        return policy.logits(prompts.prompt_ids, prompts.prompt_mask, PLACES, **options)


def base_logits() -> torch.Tensor:
    return logits(tiny_policy(model=load_model("sudoku_tiny"), with_reference=False))


def adapters(dmpo: DMPO, name: str = "default") -> torch.Tensor:
    return torch.cat([p.detach().flatten() for key, p in dmpo.policy.named_parameters() if f".{name}." in key])


def fit(dmpo: DMPO, tmp_path, steps: int, **options):
    run = trainer(tmp_path, max_steps=steps, **options)
    run.fit(dmpo, loader())
    return run


@pytest.fixture
def adapter_folder(tmp_path):
    """A trained adapter on the embedded model."""
    adapted = LoRA(r=4, alpha=8, dropout=0.0).apply(load_model("sudoku_tiny"), "sudoku_tiny")
    perturb(adapted)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


# The reference --------------------------------------------------------------------------------------------------------


def test_the_reference_is_the_base_while_the_adapters_train(tmp_path):
    dmpo = lora_module()
    assert torch.equal(logits(dmpo.policy), base_logits())
    fit(dmpo, tmp_path, 3)
    assert torch.equal(logits(dmpo.policy, reference=True), base_logits())
    assert not torch.equal(logits(dmpo.policy), base_logits())


def test_the_base_is_not_trained_and_not_copied(tmp_path):
    dmpo = lora_module()
    fit(dmpo, tmp_path, 3)
    assert dmpo.policy.reference.model is None
    base = load_model("sudoku_tiny").state_dict()
    found = {name.replace(".base_layer", ""): p for name, p in dmpo.policy.model.named_parameters()}
    for name, value in base.items():
        assert torch.equal(found[f"base_model.model.{name}"], value), name


def test_every_adapter_takes_part_in_training(tmp_path):
    dmpo = lora_module()
    before = {name: p.detach().clone() for name, p in dmpo.policy.named_parameters() if p.requires_grad}
    fit(dmpo, tmp_path, 2)
    after = dict(dmpo.policy.named_parameters())
    assert all(not torch.equal(after[name], value) for name, value in before.items())


def test_a_refreshed_reference_is_the_policy_of_the_last_buffer(tmp_path):
    """4 steps per buffer: after 8 the third buffer refreshes the reference, and then trains one step."""
    dmpo = lora_module(reference_refresh_interval=2)
    fit(dmpo, tmp_path, 8)
    at_the_refresh = adapters(dmpo).clone()
    dmpo = lora_module(reference_refresh_interval=2)
    fit(dmpo, tmp_path, 9)
    assert torch.equal(adapters(dmpo, "reference"), at_the_refresh)
    assert not torch.equal(adapters(dmpo), at_the_refresh)


@pytest.mark.parametrize("interval", [None, 1])
def test_a_reference_of_every_buffer_is_the_policy_in_the_first_one_already(tmp_path, interval):
    dmpo = lora_module(reference_refresh_interval=interval)
    with torch.no_grad():
        for parameter in dmpo.policy.parameters():
            # So that the adapter that a run begins with differs from its base, as a loaded one does.
            parameter.add_(0.02 * parameter.requires_grad)
    fit(dmpo, tmp_path, 1)
    assert (dmpo.buffer.targets["log_rnd"] == 0).all() == (interval == 1)


# Checkpoints ----------------------------------------------------------------------------------------------------------


def test_a_run_depends_on_its_seed_alone_under_lora_too(tmp_path):
    found = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        dmpo = lora_module(seed=7)
        fit(dmpo, tmp_path, 3)
        found.append(weights(dmpo))
    assert torch.equal(*found)


REFRESH = pytest.mark.parametrize("interval", [None, 1, 2], ids=["the base", "every buffer", "every other buffer"])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The run of each interval, made once, which saves at every step."""

    @cache
    def run(interval):
        folder = tmp_path_factory.mktemp("uninterrupted")
        whole, expected = lora_module(reference_refresh_interval=interval), Recorder()
        save = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        fit(whole, folder, 15, callbacks=[expected, save], enable_checkpointing=True)
        return whole, expected, folder

    return run


@REFRESH
@pytest.mark.parametrize("stop", [3, 4, 9, 12], ids=["mid-buffer", "buffer end", "after a refresh", "epoch end"])
def test_resumed_equals_uninterrupted(tmp_path, uninterrupted, interval, stop):
    whole, expected, folder = uninterrupted(interval)
    resumed, record = lora_module(reference_refresh_interval=interval), Recorder()
    run = trainer(tmp_path, max_steps=15, callbacks=[record])
    run.fit(resumed, loader(), ckpt_path=folder / f"step={stop}.ckpt", weights_only=True)
    assert record.prompts == expected.prompts[stop:]
    assert record.losses == expected.losses[stop:]
    assert torch.equal(weights(resumed), weights(whole))
    assert len(weights(resumed)) == len(weights(whole))


def test_a_refreshed_reference_survives_a_resume(tmp_path):
    dmpo = lora_module(reference_refresh_interval=1)
    run = fit(dmpo, tmp_path, 5)
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = lora_module(reference_refresh_interval=1)
    trainer(tmp_path, max_steps=5).fit(again, loader(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert torch.equal(adapters(again, "reference"), adapters(dmpo, "reference"))
    assert not torch.equal(adapters(again, "reference"), adapters(again))
    assert torch.equal(logits(again.policy, reference=True), logits(dmpo.policy, reference=True))


def saved_state(dmpo: DMPO, tmp_path, name: str) -> tuple[dict, int]:
    run = fit(dmpo, tmp_path, 5)
    run.save_checkpoint(tmp_path / name)
    return torch.load(tmp_path / name, weights_only=True)["state_dict"], (tmp_path / name).stat().st_size


def test_a_checkpoint_holds_the_adapters_and_no_base(tmp_path):
    dmpo = lora_module()
    state, size = saved_state(dmpo, tmp_path, "a.ckpt")
    assert set(state) == {f"policy.{name}" for name, p in dmpo.policy.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in state)
    base = sum(p.numel() * p.element_size() for p in load_model("sudoku_tiny").parameters())
    assert size < base


def test_a_checkpoint_grows_with_the_rank(tmp_path):
    sizes = {}
    for rank in (1, 5, 9):
        state, sizes[rank] = saved_state(lora_module(adapter=LoRA(r=rank, dropout=0.0)), tmp_path, f"{rank}.ckpt")
        parameters = sum(value.numel() for value in state.values())
        per_rank = parameters / rank
    expected = 4 * per_rank * 3 * 4  # 4 ranks more; weights and AdamW's two moments; 4 bytes each
    assert sizes[5] - sizes[1] == pytest.approx(expected, rel=0.02)
    assert sizes[9] - sizes[5] == pytest.approx(expected, rel=0.02)


def test_a_refreshed_reference_adds_one_adapter_to_a_checkpoint(tmp_path):
    plain, _ = saved_state(lora_module(), tmp_path, "a.ckpt")
    refreshed, _ = saved_state(lora_module(reference_refresh_interval=1), tmp_path, "b.ckpt")
    assert set(refreshed) == set(plain) | {name.replace(".default.", ".reference.") for name in plain}


# Starting from an adapter ---------------------------------------------------------------------------------------------


def test_a_loaded_adapter_is_where_the_policy_and_the_reference_start(adapter_folder):
    dmpo = module_from(adapter_folder)
    expected = logits(tiny_policy(model=load_model(str(adapter_folder)), with_reference=False))
    assert torch.equal(logits(dmpo.policy), expected)
    assert torch.equal(logits(dmpo.policy, reference=True), expected)
    assert not torch.equal(expected, base_logits())
    assert dmpo.policy.reference_equals_policy()


def test_the_loaded_adapter_trains_and_the_reference_stays_as_it_was(adapter_folder, tmp_path):
    dmpo = module_from(adapter_folder)
    start = adapters(dmpo).clone()
    fit(dmpo, tmp_path, 3)
    assert torch.equal(adapters(dmpo, "reference"), start)
    assert not torch.equal(adapters(dmpo), start)


def test_a_run_from_a_loaded_adapter_resumes_exactly(adapter_folder, tmp_path):
    whole = module_from(adapter_folder)
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    fit(whole, tmp_path, 6, callbacks=[save], enable_checkpointing=True)
    resumed = module_from(adapter_folder)
    run = trainer(tmp_path, max_steps=6)
    run.fit(resumed, loader(), ckpt_path=tmp_path / "step=3.ckpt", weights_only=True)
    assert torch.equal(weights(resumed), weights(whole))


def test_a_second_adapter_over_a_loaded_one_is_an_error(adapter_folder):
    with pytest.raises(ValueError, match="already carries an adapter"):
        module_from(adapter_folder, adapter=LoRA(r=2))


def test_random_weights_under_a_loaded_adapter_are_an_error(adapter_folder):
    with pytest.raises(ValueError, match="random_weights"):
        module_from(adapter_folder, random_weights=True)
