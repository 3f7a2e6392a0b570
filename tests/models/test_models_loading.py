import json
from pathlib import Path

import pytest
import torch

from dmpo_lightning.models.llada import FAMILY, LLaDAForMaskedDiffusion
from dmpo_lightning.models.loading import load_model, load_tokenizer, token_facts
from dmpo_lightning.models.lora import LoRA
from dmpo_lightning.models.parts import linear_names
from dmpo_lightning.policy import Policy
from helpers import END_OF_TEXT, END_OF_TURN, MASK, NEVER_SAMPLED, FixedLogits, tiny_model
from small_models import tiny_dream, tiny_illada, tiny_sdar

CONVERSATION = [{"role": "system", "content": "4"}, {"role": "user", "content": " 12\n"}]
CONVERSATION_TEXT = (
    "<|startoftext|><|start_header_id|>system<|end_header_id|>\n\n4<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n12<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
"""As FACTS.md gives it for the published models."""


@pytest.fixture
def tokenizer():
    return load_tokenizer("sudoku_tiny")


# Models ---------------------------------------------------------------------------------------------------------------


def test_random_weights_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = load_model("sudoku_tiny", random_weights=True, seed=3)
    torch.manual_seed(2)
    second = load_model("sudoku_tiny", random_weights=True, seed=3)
    other = load_model("sudoku_tiny", random_weights=True, seed=4)
    assert isinstance(first, LLaDAForMaskedDiffusion)
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
    assert not torch.equal(first.get_output_embeddings().weight, other.get_output_embeddings().weight)


def test_random_weights_leave_the_global_generator_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    load_model("sudoku_tiny", random_weights=True)
    assert torch.equal(torch.rand(3), expected)


def test_a_dtype_is_taken_by_name_or_as_it_is():
    for dtype in ("bfloat16", torch.bfloat16):
        model = load_model("sudoku_tiny", random_weights=True, dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_folder_loads_exactly(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_a_folder_may_be_called_like_an_embedded_model(tmp_path, monkeypatch):
    tiny_model(seed=5).save_pretrained(tmp_path / "sudoku_tiny")
    monkeypatch.chdir(tmp_path)
    assert load_model("sudoku_tiny").config.d_model == 32


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_source_that_cannot_be_loaded_is_an_error_with_a_remedy(load):
    with pytest.raises(ValueError, match=r"hf download nobody/nothing --local-dir") as caught:
        load("nobody/nothing")
    message = str(caught.value)
    assert "neither a local folder nor reachable on the Hugging Face hub (offline mode is on)" in message
    assert "sudoku_tiny" in message
    assert "--model.model=DIR" in message


def test_loading_an_unknown_source_with_random_weights_is_the_same_error():
    with pytest.raises(ValueError, match="hf download nobody/nothing"):
        load_model("nobody/nothing", random_weights=True)


# Tokenizers -----------------------------------------------------------------------------------------------------------


def test_a_tokenizer_given_as_an_object_is_left_as_it_is(tokenizer):
    assert load_tokenizer(tokenizer) is tokenizer


def test_the_chat_template_writes_the_published_text(tokenizer):
    text = tokenizer.apply_chat_template(CONVERSATION, add_generation_prompt=True, tokenize=False)
    assert text == CONVERSATION_TEXT


def test_a_llada_tokenizer_without_a_template_gets_the_published_one(tokenizer, tmp_path):
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.chat_template == FAMILY.chat_template
    assert loaded.apply_chat_template(CONVERSATION, add_generation_prompt=True, tokenize=False) == CONVERSATION_TEXT


def test_a_template_of_the_tokenizer_itself_is_kept(tokenizer, tmp_path):
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).chat_template == "{{ messages[0]['content'] }}"


# Token facts ----------------------------------------------------------------------------------------------------------


def test_token_facts_of_the_embedded_tokenizer(tokenizer):
    facts = token_facts(tiny_model(), tokenizer)
    assert facts.mask_token_id == MASK
    assert facts.pad_token_id == END_OF_TEXT
    assert sorted(facts.end_token_ids) == [END_OF_TEXT, END_OF_TURN]
    assert sorted(facts.banned_token_ids) == list(NEVER_SAMPLED)


def test_ids_of_a_padded_embedding_are_banned_too(tokenizer):
    facts = token_facts(tiny_model(vocab_size=28, embedding_size=40), tokenizer)
    assert sorted(facts.banned_token_ids) == [MASK, *range(25, 40)]


def test_the_mask_id_comes_from_the_argument_then_the_model_then_the_tokenizer(tokenizer):
    unnamed, named = FixedLogits(torch.zeros(32), mask_token_id=None), FixedLogits(torch.zeros(32), mask_token_id=30)
    assert token_facts(unnamed, tokenizer).mask_token_id == MASK
    assert token_facts(named, tokenizer).mask_token_id == 30
    assert token_facts(named, tokenizer, mask_token_id=31).mask_token_id == 31


def test_without_a_mask_id_the_error_says_how_to_give_one(tokenizer):
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match=r"pass mask_token_id=\.\.\."):
        token_facts(FixedLogits(torch.zeros(32), mask_token_id=None), tokenizer)


@pytest.mark.parametrize("mask_token_id", [-1, 32])
def test_a_mask_id_outside_the_vocabulary_is_an_error(tokenizer, mask_token_id):
    with pytest.raises(ValueError, match=f"below the vocabulary size 32, got {mask_token_id}"):
        token_facts(tiny_model(), tokenizer, mask_token_id=mask_token_id)


@pytest.mark.parametrize("build", [tiny_model, tiny_dream, tiny_illada, tiny_sdar])
def test_a_tokenizer_with_more_tokens_than_the_embedding_is_an_error(tokenizer, build):
    network = build()
    known = network.get_input_embeddings().num_embeddings
    tokenizer.add_tokens([f"<hint{i}>" for i in range(known - len(tokenizer))])
    assert max(tokenizer.get_vocab().values()) == known - 1
    assert Policy(network, tokenizer, mask_token_id=5).facts.banned_token_ids == (5,)
    tokenizer.add_tokens(["<one more>"])
    for each in (network, LoRA(r=2, targets=linear_names(network)[:1]).apply(network)):
        with pytest.raises(ValueError, match=f"for {known} tokens, .* the tokenizer ids up to {known}; take"):
            Policy(each, tokenizer, mask_token_id=5)


# Adapters -------------------------------------------------------------------------------------------------------------


def adapter_folder(folder: Path, base: object) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    return str(folder)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_an_adapter_on_an_adapter_is_an_error(tmp_path, load):
    """Its own, too, which would be loaded for ever."""
    own, other = tmp_path / "own", adapter_folder(tmp_path / "other", "nobody/base")
    for base in (str(own / ".." / "own"), other):
        adapter_folder(own, base)
        with pytest.raises(ValueError, match=r"must name its base in `base_model_name_or_path`, got .* whole model"):
            load(str(own))


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
@pytest.mark.parametrize("base", [None, "", 3])
def test_an_adapter_without_a_base_is_an_error(tmp_path, load, base):
    with pytest.raises(ValueError, match=f"must name its base in `base_model_name_or_path`, got {base!r}"):
        load(adapter_folder(tmp_path / "adapter", base))


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000])
def test_a_damaged_adapter_file_is_an_error(tmp_path, load, text):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"adapter_config\.json' is damaged"):
        load(str(tmp_path))
