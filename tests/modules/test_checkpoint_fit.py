"""A checkpoint that is not of this model and adapter ends the run in a sentence; a module loads from one that is."""

from importlib import import_module
from inspect import isabstract, isclass, signature
from pkgutil import iter_modules

import pytest
import torch
from dmpo_runs import digit_share, loader, module, small_dmpo, trainer, weights

from dmpo_lightning import (
    DMPO,
    WDCE,
    WDDO,
    Backbone,
    ConfidenceSampler,
    DemonstrationsDataModule,
    LatinSquareDemonstrations,
    LoRA,
    MaskedSFT,
    PromptLoader,
    RandomOrderSampler,
    WinoSampler,
    objectives,
    samplers,
)
from dmpo_lightning.checkpoints.reading import UnfitCheckpointError
from dmpo_lightning.models.loading import load_tokenizer
from dmpo_lightning.modules.checkpoint import REBUILT, described, rebuilt
from dmpo_lightning.objectives import ElboEstimator, LogProbEstimator, Objective, TrajectoryEstimator
from dmpo_lightning.objectives.weighted import WeightedObjective
from dmpo_lightning.samplers import Sampler
from helpers import tiny_model
from small_models import bert_tokenizer, tiny_bert

ADAPTED = {"adapter": LoRA(r=4, alpha=8)}
MODULES = {
    "whole": {},
    "adapted": ADAPTED,
    "other rank": {"adapter": LoRA(r=2, alpha=4)},
    "other scale": {"adapter": LoRA(r=4, alpha=4)},
    "fewer targets": {"adapter": LoRA(r=4, alpha=8, targets=["q_proj"])},
    "refreshed": ADAPTED | {"reference_refresh_interval": 1},
}


def saved(tmp_path, made, steps=6):
    run = trainer(tmp_path, max_steps=steps)
    run.fit(made, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    return str(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    ("wrote", "reads", "stage"),
    [
        ("whole", "adapted", "validate"),
        ("adapted", "whole", "fit"),
        ("adapted", "other rank", "test"),
        ("adapted", "other scale", "fit"),
        ("adapted", "other scale", "predict"),
        ("adapted", "fewer targets", "validate"),
        ("refreshed", "whole", "fit"),
    ],
)
def test_a_checkpoint_of_other_weights_is_refused_in_one_line(tmp_path, wrote, reads, stage):
    path = saved(tmp_path, module(**MODULES[wrote]), steps=6 if wrote == "refreshed" else 1)
    other = module(**MODULES[reads])
    before = weights(other)
    with pytest.raises(UnfitCheckpointError) as refused:
        getattr(trainer(tmp_path, max_steps=8), stage)(other, loader(shuffle=stage == "fit"), ckpt_path=path)
    assert "\n" not in str(refused.value)
    assert "Set model and adapter as in the run that wrote it" in str(refused.value)
    assert torch.equal(weights(other), before)


def test_a_checkpoint_of_llada_is_refused_by_bert(tmp_path):
    path = saved(tmp_path, module(), steps=1)
    bert = small_dmpo(tiny_bert(), tokenizer=bert_tokenizer())
    words = PromptLoader([{"prompt": "1 2", "digit": "1"}], bert_tokenizer(), batch_size=1)
    for stage in ("validate", "fit"):
        with pytest.raises(UnfitCheckpointError, match="weights are not those of this run"):
            getattr(trainer(tmp_path, max_steps=2), stage)(bert, words, ckpt_path=path)


@pytest.mark.parametrize("kind", ["whole", "adapted", "refreshed"])
def test_a_module_loads_from_its_checkpoint_alone(tmp_path, kind):
    made = module(**MODULES[kind])
    path = saved(tmp_path, made)
    loaded = DMPO.load_from_checkpoint(path, reward=digit_share)
    assert torch.equal(weights(loaded), weights(made))
    assert (loaded.buffers_collected, loaded.policy.reference.is_refreshed) == (2, kind == "refreshed")
    measured = [
        trainer(tmp_path).validate(each, loader(3, shuffle=False), verbose=False)[0]["val/sampled/accuracy"]
        for each in (made, loaded)
    ]
    assert measured[0] == measured[1]


class OwnSampler(ConfidenceSampler):
    """Another class than the package's, of which a checkpoint must not construct one."""


def test_what_a_checkpoint_cannot_say_is_named(tmp_path):
    path = saved(tmp_path, module(sampler=OwnSampler(denoising_steps=4)), steps=1)
    with pytest.raises(
        ValueError, match=r"cannot say what `sampler` was: test_checkpoint_fit.OwnSampler, code of your"
    ):
        DMPO.load_from_checkpoint(path)
    assert DMPO.load_from_checkpoint(path, sampler=OwnSampler(denoising_steps=2)).sampler.denoising_steps == 2


def test_supervised_fine_tuning_reads_the_weights_of_dmpo_but_does_not_continue_it(tmp_path):
    path = saved(tmp_path, module(**MODULES["refreshed"]))
    loaded = MaskedSFT.load_from_checkpoint(path)
    trained = DMPO.load_from_checkpoint(path).policy.model.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in loaded.policy.model.state_dict().items())
    assert not any("reference" in name for name in loaded.state_dict())
    sft = MaskedSFT(Backbone("sudoku_tiny", random_weights=True, **ADAPTED))
    with pytest.raises(UnfitCheckpointError, match="written by DMPO"):
        trainer(tmp_path, max_steps=8).fit(sft, loader(), ckpt_path=path)


def test_dmpo_evaluates_the_weights_of_supervised_fine_tuning_but_does_not_continue_it(tmp_path):
    sft = MaskedSFT(Backbone("sudoku_tiny", random_weights=True, **ADAPTED), seed=5)
    run = trainer(tmp_path, max_steps=1)
    task = LatinSquareDemonstrations(size=8, corruption=0.0)
    run.fit(sft, DemonstrationsDataModule(task, tokenizer="sudoku_tiny", completion_length=20, batch_size=2))
    run.save_checkpoint(tmp_path / "sft.ckpt")
    dmpo = module(**ADAPTED)
    trainer(tmp_path).validate(dmpo, loader(3, shuffle=False), ckpt_path=str(tmp_path / "sft.ckpt"), verbose=False)
    held = sft.state_dict()
    assert held
    assert all(torch.equal(dmpo.state_dict()[name], value) for name, value in held.items())
    with pytest.raises(UnfitCheckpointError, match="was not written by DMPO"):
        trainer(tmp_path, max_steps=8).fit(module(**ADAPTED), loader(), ckpt_path=str(tmp_path / "sft.ckpt"))


@pytest.mark.parametrize(
    "made",
    [
        WDCE(reward_temperature=0.1, baseline="group", replicates=2, estimator=TrajectoryEstimator(2)),
        WDDO(reward_temperature=0.5, proximal_coefficient=0.5, beta=0.3),
        ElboEstimator(2, antithetic=False),
        ConfidenceSampler(block_length=4, factor=0.5, cache="prefix"),
        RandomOrderSampler(temperature=0.5, denoising_steps=2),
        WinoSampler(block_length=4, threshold=0.5, verification_threshold=0.8),
    ],
    ids=lambda made: type(made).__name__,
)
def test_objectives_and_samplers_are_rebuilt_as_they_were(made):
    again = rebuilt(described(made))
    assert type(again) is type(made)
    assert described(again) == described(made)


@pytest.mark.parametrize(
    "made", [{"class": "Popen", "args": ["true"]}, described(WDCE(reward_temperature=0.1, baseline=lambda *args: 0.0))]
)
def test_only_classes_of_the_package_are_rebuilt(made):
    with pytest.raises(LookupError, match="code of your own"):
        rebuilt(made)
    assert all(each.__module__.startswith("dmpo_lightning.") for each in REBUILT.values())


def test_an_option_that_a_class_no_longer_has_is_named():
    with pytest.raises(LookupError, match="WDDO with gamma, which this version does not have"):
        rebuilt({"class": "WDDO", "reward_temperature": 1.0, "gamma": 2})


def test_every_shipped_sampler_objective_and_estimator_is_rebuilt():
    """Those are found in the source, so that none is forgotten: a checkpoint of it could not be loaded."""
    found = set()
    for package in (objectives, samplers):
        for each in iter_modules(package.__path__, f"{package.__name__}."):
            for value in vars(import_module(each.name)).values():
                if (
                    isclass(value)
                    and issubclass(value, Objective | LogProbEstimator | Sampler)
                    and not isabstract(value)
                ):
                    found.add(value)
    assert len(found) >= 7
    assert found - {WeightedObjective} == set(REBUILT.values())
    for each in REBUILT.values():
        own = dict.fromkeys(signature(each).parameters)
        given = {"reward_temperature": 0.5} if "reward_temperature" in own else {}
        assert set(described(each(**given))) - {"class"} == set(own), each


@pytest.fixture
def two_revisions(tmp_path, monkeypatch):
    """The hub's cache with a model of two revisions, of other weights and other chat templates, without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for number, name in enumerate(("main", "v2")):
        commit, folder = str(number) * 40, tmp_path / "models--someone--tiny"
        snapshot, tokenizer = folder / "snapshots" / commit, load_tokenizer("sudoku_tiny")
        tokenizer.chat_template = name
        tiny_model(seed=number).save_pretrained(snapshot)
        tokenizer.save_pretrained(snapshot)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / name).write_text(commit)
    return "someone/tiny"


def test_the_revision_of_a_backbone_is_that_of_weights_and_tokenizer_and_comes_back_with_a_checkpoint(
    tmp_path, two_revisions
):
    first, second = (Backbone(two_revisions, revision=revision) for revision in (None, "v2"))
    assert (first.load_tokenizer().chat_template, second.load_tokenizer().chat_template) == ("main", "v2")
    for seed, backbone in enumerate((first, second)):
        expected = tiny_model(seed=seed).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in backbone.build().state_dict().items())
    run = trainer(tmp_path, max_steps=1)
    task = LatinSquareDemonstrations(size=2, corruption=0.0)
    data = DemonstrationsDataModule(task, tokenizer="sudoku_tiny", completion_length=20, batch_size=2)
    run.fit(MaskedSFT(Backbone(two_revisions, revision="v2", adapter=LoRA(r=2))), data)
    run.save_checkpoint(tmp_path / "a.ckpt")
    loaded = MaskedSFT.load_from_checkpoint(tmp_path / "a.ckpt")
    assert loaded.backbone.revision == "v2"
    assert loaded.policy.tokenizer.chat_template == "v2"
