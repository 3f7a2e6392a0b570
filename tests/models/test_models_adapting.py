"""Causal models of transformers, adapted: with blocks of one they are what they were, and every command takes them."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, Qwen2Config, Qwen2ForCausalLM, Qwen3Config
from transformers import Qwen3ForCausalLM as Qwen3

from dmpo_lightning.__main__ import main
from dmpo_lightning.models.adapting import adapt
from dmpo_lightning.models.loading import load_model, load_tokenizer, token_facts
from small_models import SMALL, random_ids, word_tokenizer

WORDS = ("<unk>", "<|endoftext|>", "<spare>", *map(str, range(29)))
"""With the end token that transformers gives to every tokenizer of a Qwen."""
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
SHAPES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SMALL, head_dim=12, tie_word_embeddings=True, rms_norm_eps=1e-3)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SMALL, rope_parameters={"rope_type": "default", "rope_theta": 7000.0})),
    "qwen3": (Qwen3, Qwen3Config(**SMALL, head_dim=12, tie_word_embeddings=True)),
}


def save(folder, model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith(".bias"):
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    tokenizer = word_tokenizer(WORDS, unk_token="<unk>", eos_token="<|endoftext|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=SHAPES)
def causal(request, tmp_path):
    kind, config = SHAPES[request.param]
    torch.manual_seed(0)
    model = kind(config).eval()
    return model, save(tmp_path / "causal", model)


@torch.no_grad()
def test_in_blocks_of_one_the_adapted_model_has_the_causal_logits(causal, tmp_path):
    model, folder = causal
    assert main(["adapt", "--model", folder, "--output", str(tmp_path / "adapted"), "--block_size", "1"]) == 0
    adapted, ids = load_model(str(tmp_path / "adapted")).eval(), random_ids(2, 17)
    expected = model(ids).logits
    torch.testing.assert_close(adapted(ids).logits[:, 1:, :32], expected[:, :-1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_states_see_their_own_block_and_earlier_ones_and_predict_the_token_behind_them(causal):
    _, folder = causal
    adapted, ids = adapt(folder, block_size=4).model, random_ids(2, 9)
    logits = adapted(ids).logits
    changed = ids.clone()
    changed[:, 6] = (ids[:, 6] + 1) % 32
    moved = (adapted(changed).logits != logits).any(-1)[0].tolist()
    # States at 4 to 8 see position 6.
    assert moved == [False] * 5 + [True] * 4


@torch.no_grad()
def test_without_blocks_and_shift_a_position_sees_all_and_predicts_its_own_token(causal):
    _, folder = causal
    adapted, ids = adapt(folder, shift=False).model, random_ids(1, 6)
    shifted = adapt(folder).model
    torch.testing.assert_close(shifted(ids).logits[:, 1:], adapted(ids).logits[:, :-1])
    changed = ids.clone()
    changed[:, 5] = (ids[:, 5] + 1) % 32
    assert (adapted(changed).logits != adapted(ids).logits).any(-1).all()


@pytest.mark.parametrize(
    ("mask_token", "width", "number"), [(None, 32, 32), ("<spare>", 32, 2), (None, 40, 32), ("<new>", 32, 32)]
)
def test_the_mask_token_is_a_spare_one_or_a_new_row_with_the_mean_embedding(tmp_path, mask_token, width, number):
    model = LlamaForCausalLM(LlamaConfig(**SMALL | {"vocab_size": width}))
    adapted = adapt(save(tmp_path, model), mask_token=mask_token)
    assert adapted.tokenizer.mask_token == (mask_token or "<|mask|>")
    assert adapted.model.config.mask_token_id == adapted.tokenizer.mask_token_id == number
    facts = token_facts(adapted.model, adapted.tokenizer)
    assert (facts.mask_token_id, facts.end_token_ids, facts.vocab_size) == (number, (1,), max(width, number + 1))
    embedding = adapted.model.get_input_embeddings().weight
    if number == 32:
        torch.testing.assert_close(embedding[number], model.get_input_embeddings().weight[:32].mean(0))
    torch.testing.assert_close(embedding[:32], model.get_input_embeddings().weight[:32])


def test_the_chat_template_is_kept_and_a_folder_says_what_became_of_the_model(causal, tmp_path, capsys):
    _, folder = causal
    output = str(tmp_path / "adapted")
    assert main(["adapt", "--model", folder, "--output", output, "--no_shift", "--mask_token", "<spare>"]) == 0
    said = capsys.readouterr().out
    assert "bidirectional, not shifted, mask token <spare> (2)" in said
    assert load_tokenizer(output).chat_template == TEMPLATE
    stated = json.loads((tmp_path / "adapted/config.json").read_text())
    assert (stated["model_type"], stated["block_size"], stated["shift"]) == ("adapted_causal", None, False)
    # A second one takes the place of the first.
    assert main(["adapt", "--model", folder, "--output", output, "--block_size", "2"]) == 0
    assert load_model(output).block_size == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MistralConfig(**SMALL), "is a 'mistral', which cannot be adapted; models of the types llama, qwen2, qwen3"),
        (LlamaConfig(**SMALL, attention_bias=True), "attention_bias=True"),
        (LlamaConfig(**SMALL, mlp_bias=True), "mlp_bias=True"),
        (LlamaConfig(**SMALL, hidden_act="gelu"), "hidden_act='gelu'"),
        (Qwen2Config(**SMALL, use_sliding_window=True), "use_sliding_window=True"),
        (
            LlamaConfig(**SMALL, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
            "scaled rotary positions",
        ),
    ],
    ids=["another shape", "biases", "mlp biases", "activation", "window", "scaled positions"],
)
def test_what_cannot_be_adapted_is_refused_by_name_before_its_weights_are_read(tmp_path, config, message):
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        adapt(str(tmp_path))


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("no.gguf", {}, "no file 'no.gguf'"),
        ("sudoku_tiny", {}, "is a 'llada', which cannot be adapted"),
        (None, {"block_size": 0}, "`block_size` must be at least 1"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, source, options, message):
    LlamaConfig(**SMALL).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        adapt(source or str(tmp_path), **options)
