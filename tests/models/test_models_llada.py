import pytest
import torch
from transformers import AutoModelForMaskedLM, LlamaConfig, LlamaForCausalLM

from dmpo_lightning.models.llada import LLaDAConfig, LLaDAForMaskedDiffusion
from helpers import pad_more, tiny_config, tiny_model
from small_models import random_ids

# Shapes and names -----------------------------------------------------------------------------------------------------


# Configuration --------------------------------------------------------------------------------------------------------


def test_transformers_own_words_reach_the_published_keys():
    config = LLaDAConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (4096, 32, 32)
    assert (config.num_key_value_heads, config.intermediate_size, config.max_position_embeddings) == (32, 12288, 4096)


@pytest.mark.parametrize(
    ("switch", "value"),
    [
        ("alibi", True),
        ("weight_tying", True),
        ("tie_word_embeddings", True),
        ("include_bias", True),
        ("rope", False),
        ("block_type", "sequential"),
    ],
)
def test_a_switch_that_no_published_llada_uses_is_an_error_that_names_it(switch, value):
    with pytest.raises(ValueError, match=f"{switch}={value!r}"):
        tiny_config(**{switch: value})


def test_scaled_rotary_positions_are_an_error():
    with pytest.raises(ValueError, match="LLaDA with scaled rotary positions is not supported"):
        tiny_config(rope_scaling={"rope_type": "dynamic", "factor": 4.0})


@pytest.mark.parametrize("sizes", [{"n_heads": 5}, {"n_heads": 32}, {"n_heads": 4, "n_kv_heads": 3}])
def test_head_sizes_that_do_not_fit_are_an_error(sizes):
    with pytest.raises(ValueError, match="n_heads"):
        tiny_config(**sizes)


# Equality with transformers' Llama ------------------------------------------------------------------------------------

LLAMA_NAMES = {
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}


def llama_twin(model: LLaDAForMaskedDiffusion) -> LlamaForCausalLM:
    """transformers' Llama with the weights of ``model``; causal until it is given a mask."""
    config = model.config
    twin = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.mlp_hidden_size,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            rms_norm_eps=config.rms_norm_eps,
            max_position_embeddings=config.max_sequence_length,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=False,
            attn_implementation="eager",
        )
    )
    names = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
    for i in range(config.n_layers):
        names |= {f"blocks.{i}.{ours}": f"model.layers.{i}.{theirs}" for ours, theirs in LLAMA_NAMES.items()}
    weights = model.state_dict()
    twin.load_state_dict({f"{new}.weight": weights[f"model.transformer.{old}.weight"] for old, new in names.items()})
    return twin.eval()


def llama_logits(twin: LlamaForCausalLM, ids: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """Logits with every position looking at all attended ones."""
    bias = torch.zeros(len(ids), 1, ids.shape[1], ids.shape[1])
    bias.masked_fill_(~attended[:, None, None, :], torch.finfo(torch.float32).min)
    position_ids = (attended.long().cumsum(-1) - 1).clamp(min=0)
    return twin(ids, attention_mask=bias, position_ids=position_ids, use_cache=False).logits


def test_the_twin_is_really_bidirectional():
    twin, ids = llama_twin(tiny_model()), random_ids(1, 7)
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % 32
    attended = torch.ones(1, 7, dtype=torch.bool)
    assert not torch.allclose(
        llama_logits(twin, ids, attended)[0, 0], llama_logits(twin, changed, attended)[0, 0], atol=1e-3
    )


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [4, 2], ids=["as published", "grouped keys"])
def test_logits_equal_those_of_a_bidirectional_llama(kv_heads):
    model, ids = tiny_model(n_kv_heads=kv_heads).eval(), random_ids(3, 9)
    expected = llama_logits(llama_twin(model), ids, torch.ones(3, 9, dtype=torch.bool))
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_logits_equal_those_of_a_bidirectional_llama_with_left_padding():
    model, ids = tiny_model().eval(), random_ids(3, 9)
    attended = torch.arange(9) >= torch.tensor([0, 2, 5])[:, None]
    expected = llama_logits(llama_twin(model), ids, attended)
    torch.testing.assert_close(model(ids, attended).logits[attended], expected[attended], atol=1e-5, rtol=1e-5)


# The forward that the policy uses -------------------------------------------------------------------------------------


@torch.no_grad()
def test_left_padding_changes_nothing():
    model, ids = tiny_model().eval(), random_ids(2, 6)
    padded_ids, padded_mask = pad_more(ids, torch.ones(2, 6, dtype=torch.bool), 4)
    torch.testing.assert_close(model(padded_ids, padded_mask).logits[:, 4:], model(ids).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_all_true_mask_equals_no_mask():
    model, ids = tiny_model().eval(), random_ids(2, 6)
    torch.testing.assert_close(model(ids, torch.ones_like(ids)).logits, model(ids).logits, atol=1e-6, rtol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_of_targets_are_those_of_the_full_softmax(temperature):
    model, ids = tiny_model().eval(), random_ids(3, 8)
    positions, targets = torch.tensor([[0, 23], [9, 17]]), torch.tensor([[3, 31], [0, 14]])
    bias = torch.zeros(32)
    bias[[5, 30]] = -torch.inf
    full = ((model(ids).logits + bias) / temperature).log_softmax(-1).flatten(0, 1)
    found = model(ids, positions=positions, targets=targets, logit_bias=bias, temperature=temperature)
    torch.testing.assert_close(found, full[positions, targets], atol=1e-6, rtol=1e-6)


def test_log_probs_are_float32_in_a_bfloat16_model():
    model = tiny_model().to(torch.bfloat16)
    found = model(random_ids(1, 4), positions=torch.tensor([1, 2]), targets=torch.tensor([3, 4]))
    assert found.dtype == torch.float32


# Saving and loading ---------------------------------------------------------------------------------------------------


def test_loading_in_bfloat16_rounds_each_weight(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.to(torch.bfloat16)), name


def test_input_and_output_embeddings_are_the_published_ones():
    model = tiny_model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert names[id(model.get_input_embeddings().weight)] == "model.transformer.wte.weight"
    assert names[id(model.get_output_embeddings().weight)] == "model.transformer.ff_out.weight"
