import json

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from dmpo_lightning.models.dream import FAMILY, DreamForMaskedDiffusion
from dmpo_lightning.models.loading import load_tokenizer, token_facts
from helpers import NEVER_SAMPLED, tiny_policy
from published import DREAM
from small_models import random_ids, tiny_dream, word_tokenizer

CONVERSATION = [{"role": "user", "content": "2 + 2"}]
DEFAULT_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
USER_TURN = "<|im_start|>user\n2 + 2<|im_end|>\n<|im_start|>assistant\n"


# Shapes and names -----------------------------------------------------------------------------------------------------


# Equality with transformers' Qwen2 ------------------------------------------------------------------------------------


def qwen2_twin(model: DreamForMaskedDiffusion) -> Qwen2ForCausalLM:
    """transformers' Qwen2 with the weights of ``model``, whose names are the same; causal until it is given a mask."""
    config = model.config
    twin = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=False,
            attn_implementation="eager",
        )
    )
    twin.load_state_dict(model.state_dict())
    return twin.eval()


def shifted_logits(twin: Qwen2ForCausalLM, ids: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """Logits with every position looking at all attended ones; place i holds those of place i - 1, place 0 its own."""
    bias = torch.zeros(len(ids), 1, ids.shape[1], ids.shape[1])
    bias.masked_fill_(~attended[:, None, None, :], torch.finfo(torch.float32).min)
    position_ids = (attended.long().cumsum(-1) - 1).clamp(min=0)
    logits = twin(ids, attention_mask=bias, position_ids=position_ids, use_cache=False).logits
    return logits[:, [0, *range(ids.shape[1] - 1)]]


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [4, 2], ids=["no sharing", "grouped keys as published"])
def test_logits_equal_those_of_a_bidirectional_shifted_qwen2(kv_heads):
    model, ids = tiny_dream(num_key_value_heads=kv_heads).eval(), random_ids(3, 9)
    expected = shifted_logits(qwen2_twin(model), ids, torch.ones(3, 9, dtype=torch.bool))
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_logits_equal_those_of_a_bidirectional_shifted_qwen2_with_left_padding():
    model, ids = tiny_dream().eval(), random_ids(3, 9)
    attended = torch.arange(9) >= torch.tensor([0, 2, 5])[:, None]
    expected = shifted_logits(qwen2_twin(model), ids, attended)
    torch.testing.assert_close(model(ids, attended).logits[attended], expected[attended], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_left_padding_changes_nothing_after_the_first_token():
    model, ids = tiny_dream().eval(), random_ids(2, 6)
    padded = torch.nn.functional.pad(ids, (4, 0), value=17)
    attended = torch.arange(10).expand(2, -1) >= 4
    torch.testing.assert_close(model(padded, attended).logits[:, 5:], model(ids).logits[:, 1:], atol=1e-5, rtol=1e-5)


# Behind the policy ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_policys_logits_at_a_position_come_from_the_hidden_state_before_it():
    model, ids = tiny_dream().eval(), random_ids(2, 7)
    policy, attended = tiny_policy(model=model), torch.ones(2, 7, dtype=torch.bool)
    raw = model.lm_head(model.hidden_states(ids, attended)).flatten(0, 1)
    found = policy.logits(ids, attended, torch.tensor([0, 3, 7, 13]))
    allowed = [token for token in range(32) if token not in NEVER_SAMPLED]
    torch.testing.assert_close(found[:, allowed], raw[[0, 2, 7, 12]][:, allowed], atol=1e-6, rtol=1e-6)
    assert (found[:, list(NEVER_SAMPLED)] == -torch.inf).all()


@torch.no_grad()
def test_log_probs_of_a_completion_are_those_of_the_shifted_full_softmax():
    model = tiny_dream().eval()
    policy, prompt, completion = tiny_policy(model=model), random_ids(2, 3), torch.tensor([[6, 9, 20], [24, 8, 7]])
    masks = torch.tensor([[[True, False, True]], [[True, True, False]]])
    noisy = torch.cat((prompt, torch.where(masks[:, 0], 5, completion)), dim=1)
    hidden = model.hidden_states(noisy)[:, 2:5]
    logits = model.lm_head(hidden)
    logits[..., list(NEVER_SAMPLED)] = -torch.inf
    expected = logits.log_softmax(-1).gather(-1, completion[..., None])[..., 0] * masks[:, 0]
    found = policy.completion_log_probs(prompt, torch.ones(2, 3, dtype=torch.bool), completion, masks)
    torch.testing.assert_close(found[:, 0], expected, atol=1e-5, rtol=1e-5)


# Saving, loading, text ------------------------------------------------------------------------------------------------


@pytest.fixture
def dream_tokenizer():
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>")
    return word_tokenizer(
        (*special, "2", "+"),
        unk_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        mask_token="<|mask|>",
        bos_token="<|beginoftext|>",
    )


def test_a_tokenizer_without_a_template_gets_chatml_with_the_default_system_message(dream_tokenizer, tmp_path):
    dream_tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.chat_template == FAMILY.chat_template
    text = loaded.apply_chat_template(CONVERSATION, add_generation_prompt=True, tokenize=False)
    assert text == DEFAULT_SYSTEM + USER_TURN


def test_a_system_message_of_ones_own_replaces_the_default(dream_tokenizer, tmp_path):
    dream_tokenizer.save_pretrained(tmp_path)
    messages = [{"role": "system", "content": "Be brief."}, *CONVERSATION]
    text = load_tokenizer(str(tmp_path)).apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>system\nBe brief.<|im_end|>\n" + USER_TURN


def test_a_completion_ends_at_end_of_text_or_end_of_turn(dream_tokenizer):
    facts = token_facts(tiny_dream(), dream_tokenizer, mask_token_id=4)
    assert sorted(facts.end_token_ids) == [0, 2]
    assert facts.pad_token_id == 0


def test_a_tokenizer_in_the_published_layout_needs_no_remote_code(tmp_path):
    """Dream publishes vocab.json and merges.txt with a tokenizer class of its own, which is Qwen2's."""
    (tmp_path / "config.json").write_text(json.dumps(DREAM))
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"]
    vocabulary = [*special, "a", "b", "1", "2", "ab"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(vocabulary)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "tokenization_dream.py").write_text("raise SystemExit('remote code was executed')\n")
    facts = {
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": {
            str(number): {"content": word, "special": True} for number, word in enumerate(special)
        },
        "bos_token": "<|beginoftext|>",
        "eos_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "DreamTokenizer",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(facts))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer("ab12<|im_end|>")["input_ids"] == [9, 7, 8, 2]  # digits one by one, as Qwen2 splits them
    assert (tokenizer.mask_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (4, 0, 3)
    assert tokenizer.chat_template == FAMILY.chat_template
