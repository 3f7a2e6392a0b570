"""Masked language models of transformers without a family of their own, through the policy."""

import json
from types import SimpleNamespace

import pytest
import torch
from dmpo_runs import PROMPTS, small_dmpo, trainer, weights
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from dmpo_lightning import DMPO, LoRA, PromptLoader
from dmpo_lightning.models.loading import load_model
from dmpo_lightning.policy import Policy
from small_models import BERT_VOCABULARY, bert_tokenizer, tiny_bert, tiny_modernbert

BANNED = [4, *range(16, BERT_VOCABULARY)]
"""[MASK], and the ids beyond the tokenizer's words."""
MODELS = pytest.mark.parametrize("build", [tiny_bert, tiny_modernbert], ids=["BERT", "ModernBERT"])


def test_token_facts_of_a_bert():
    facts = Policy(tiny_bert(), bert_tokenizer()).facts
    assert (facts.mask_token_id, facts.pad_token_id, facts.end_token_ids) == (4, 0, (3,))
    assert sorted(facts.banned_token_ids) == BANNED


@pytest.mark.parametrize(("model", "config"), [(AlbertForMaskedLM, AlbertConfig), (ElectraForMaskedLM, ElectraConfig)])
def test_the_width_of_embeddings_is_not_taken_for_their_number(model, config):
    options = {"vocab_size": BERT_VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    facts = Policy(model(config(**options, intermediate_size=48, embedding_size=16)), bert_tokenizer()).facts
    assert facts.vocab_size == BERT_VOCABULARY
    assert sorted(facts.banned_token_ids) == BANNED


@MODELS
@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_log_probs_are_those_of_the_models_own_full_logits(build, temperature):
    policy = Policy(build().eval(), bert_tokenizer())
    generator = torch.Generator().manual_seed(0)
    prompt, completion = (torch.randint(5, 15, (2, length), generator=generator) for length in (4, 6))
    masks = torch.rand(2, 3, 6, generator=generator) < 0.5
    expected = torch.zeros(2, 3, 6)
    for row, replicate in torch.cartesian_prod(torch.arange(2), torch.arange(3)).tolist():
        mask = masks[row, replicate]
        ids = torch.cat((prompt[row], torch.where(mask, 4, completion[row])))[None]
        logits = policy.model(input_ids=ids).logits[0, 4:] / temperature
        logits[:, BANNED] = -torch.inf
        expected[row, replicate] = logits.log_softmax(-1)[range(6), completion[row]] * mask
    found = policy.completion_log_probs(
        prompt, torch.ones(2, 4, dtype=torch.bool), completion, masks, temperature=temperature
    )
    assert masks.any()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@MODELS
@torch.no_grad()
def test_padding_is_masked(build):
    policy = Policy(build().eval(), bert_tokenizer())
    mask = torch.tensor([[False, False, True, True, True, True, True]])
    ids = torch.tensor([[0, 0, 6, 7, 8, 4, 4]])
    other = torch.tensor([[9, 12, 6, 7, 8, 4, 4]])
    places = torch.tensor([5, 6])
    assert torch.equal(policy.logits(ids, mask, places), policy.logits(other, mask, places))
    everything = torch.ones_like(mask)
    assert not torch.equal(policy.logits(ids, everything, places), policy.logits(other, everything, places))


def bert_module(model, **options) -> DMPO:
    return small_dmpo(model, **{"tokenizer": bert_tokenizer(), **options})


def fit(module: DMPO, tmp_path, steps: int = 1):
    run = trainer(tmp_path, max_steps=steps)
    run.fit(module, PromptLoader(PROMPTS, bert_tokenizer(), batch_size=1))
    return run


@MODELS
def test_a_step_of_dmpo_trains_it(tmp_path, build):
    module = bert_module(build())
    before = weights(module)
    run = fit(module, tmp_path)
    assert torch.isfinite(run.callback_metrics["train/loss"])
    assert not torch.equal(before, weights(module))
    assert torch.isfinite(weights(module)).all()


def test_lora_needs_named_targets_and_then_trains_those_alone(tmp_path):
    with pytest.raises(ValueError, match=r"no default targets for BertForMaskedLM.*query"):
        bert_module(tiny_bert(), adapter=LoRA(r=2))
    module = bert_module(tiny_bert(), adapter=LoRA(r=2, targets=["query", "value"]))
    before = {name: p.detach().clone() for name, p in module.policy.named_parameters()}
    trainable = {name for name, p in module.policy.named_parameters() if p.requires_grad}
    assert sum(before[name].numel() for name in trainable) == 2 * 2 * 2 * (32 + 32)  # layers, targets, rank, in + out
    fit(module, tmp_path)
    changed = {name for name, p in module.policy.named_parameters() if not torch.equal(p, before[name])}
    assert changed <= trainable
    assert {name for name in trainable if ".lora_B." in name} <= changed


@MODELS
def test_a_saved_folder_loads_exactly(tmp_path, build):
    model = build()
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert type(loaded) is type(model)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_an_adapter_folder_of_a_bert_loads(tmp_path):
    tiny_bert().save_pretrained(tmp_path / "base")
    base = str(tmp_path / "base")
    adapted = LoRA(r=2, targets=["query"]).apply(load_model(base), base)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    loaded = load_model(str(tmp_path / "adapter"))
    adapted = [name for name, parameter in loaded.named_parameters() if parameter.requires_grad]
    assert len(adapted) == 4
    assert all(".query.lora_" in name for name in adapted)


REMOTE_CODE = """
import os, pathlib
pathlib.Path(os.environ["REMOTE_CODE_WAS_HERE"]).touch()
from transformers import BertConfig, BertForMaskedLM


class FancyConfig(BertConfig):
    model_type = "fancy"


class FancyForMaskedLM(BertForMaskedLM):
    config_class = FancyConfig
"""


@pytest.fixture
def folder_with_code(tmp_path, monkeypatch):
    monkeypatch.setenv("REMOTE_CODE_WAS_HERE", str(tmp_path / "executed"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "fancy"
    tiny_bert().save_pretrained(folder)
    (folder / "fancy.py").write_text(REMOTE_CODE)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "fancy",
        "auto_map": {"AutoConfig": "fancy.FancyConfig", "AutoModelForMaskedLM": "fancy.FancyForMaskedLM"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_code_in_a_folder_is_not_run_but_an_error_that_names_the_option(folder_with_code, tmp_path):
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_model(str(folder_with_code))
    assert not (tmp_path / "executed").exists()


def test_code_in_a_folder_is_run_by_explicit_option(folder_with_code, tmp_path):
    model = load_model(str(folder_with_code), trust_remote_code=True)
    assert type(model).__name__ == "FancyForMaskedLM"
    assert (tmp_path / "executed").exists()


def test_code_of_a_tokenizer_is_not_run_but_an_error(tmp_path):
    from dmpo_lightning.models.loading import load_tokenizer

    bert_tokenizer().save_pretrained(tmp_path)
    facts = json.loads((tmp_path / "tokenizer_config.json").read_text())
    facts |= {"tokenizer_class": "FancyTokenizer", "auto_map": {"AutoTokenizer": ["fancy.FancyTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(facts))
    (tmp_path / "fancy.py").write_text("raise SystemExit('remote code was executed')\n")
    with pytest.raises(ValueError, match="custom code"):
        load_tokenizer(str(tmp_path))


# Models that are none -------------------------------------------------------------------------------------------------


def tiny_gpt2() -> torch.nn.Module:
    config = GPT2Config(vocab_size=BERT_VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    return GPT2LMHeadModel(config)


def causal_bert() -> torch.nn.Module:
    return BertForMaskedLM(tiny_bert().config.__class__(**(tiny_bert().config.to_dict() | {"is_decoder": True})))


@pytest.mark.parametrize("build", [tiny_gpt2, causal_bert], ids=["GPT-2", "BERT as a decoder"])
def test_a_causal_model_is_refused_by_name(build):
    model = build()
    with pytest.raises(ValueError, match=f"{type(model).__name__} is causal"):
        Policy(model, bert_tokenizer(), mask_token_id=4)


class Returning(torch.nn.Module):
    """Returns what it is told to."""

    def __init__(self, output, **facts) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(**({"vocab_size": BERT_VOCABULARY, "mask_token_id": 4} | facts))
        self.output = output

    def forward(self, input_ids, attention_mask=None):
        return self.output(input_ids)


def one_hot(ids: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.one_hot(ids, BERT_VOCABULARY).float()


@pytest.mark.parametrize(
    ("output", "facts", "message"),
    [
        (one_hot, {}, "Returning must return an object whose `logits` are .*, got Tensor"),
        (lambda ids: SimpleNamespace(logits=one_hot(ids)[0]), {}, r"got logits of shape \[4, 24\]"),
        (
            lambda ids: SimpleNamespace(logits=one_hot(ids % 24)),
            {"vocab_size": 30},
            r"\[3, 4, 30\], got .*\[3, 4, 24\]",
        ),
        (one_hot, {"mask_token_id": "[MASK]"}, r"`mask_token_id` must be an id below .*, got \[MASK\]"),
        (one_hot, {"vocab_size": 12}, "has embeddings for 12 tokens.*the tokenizer ids up to 15"),
    ],
)
def test_what_a_model_must_hold_and_return_is_said_at_construction(output, facts, message):
    with pytest.raises(ValueError, match=message):
        Policy(Returning(output, **facts), bert_tokenizer())


def test_a_mask_token_without_an_embedding_is_named():
    with pytest.raises(ValueError, match="has embeddings for 20 tokens, but the mask token has the id 22"):
        Policy(embedding_twenty(), bert_tokenizer(), mask_token_id=22)


def embedding_twenty() -> torch.nn.Module:
    model = tiny_bert()
    model.bert.embeddings.word_embeddings = torch.nn.Embedding(20, 32)
    return model


def test_a_model_whose_predictions_ignore_their_context_is_no_causal_one():
    policy = Policy(Returning(lambda ids: SimpleNamespace(logits=one_hot(ids))), bert_tokenizer())
    assert policy.facts.mask_token_id == 4


def test_asking_a_model_leaves_modes_and_generators_as_they_were():
    model = tiny_bert().train()
    model.bert.eval()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    Policy(model, bert_tokenizer())
    assert torch.equal(torch.rand(1), expected)
    assert model.training
    assert not model.bert.training
    assert all(parameter.grad is None for parameter in model.parameters())
