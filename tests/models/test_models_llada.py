import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM, LlamaConfig, LlamaForCausalLM

from dmpo_lightning.models.llada import LLaDAConfig, LLaDAForMaskedDiffusion
from helpers import END_OF_TEXT, pad_more, tiny_config, tiny_model
from small_models import random_ids

PUBLISHED_CONFIG = {
    "activation_type": "silu",
    "alibi": False,
    "architectures": ["LLaDAModelLM"],
    "attention_layer_norm": False,
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModel": "modeling_llada.LLaDAModelLM",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
    },
    "block_type": "llama",
    "d_model": 4096,
    "embedding_size": 126464,
    "eos_token_id": 126081,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_device": "meta",
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "mask_token_id": 126336,
    "max_sequence_length": 4096,
    "mlp_hidden_size": 12288,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "pad_token_id": 126081,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "use_cache": False,
    "vocab_size": 126464,
    "weight_tying": False,
}


def published_names(n_layers: int) -> set[str]:
    parts = ["attn_norm", "ff_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"]
    blocks = {f"model.transformer.blocks.{i}.{part}.weight" for i in range(n_layers) for part in parts}
    return blocks | {f"model.transformer.{part}.weight" for part in ("wte", "ln_f", "ff_out")}


# Shapes and names -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llada_8b() -> LLaDAForMaskedDiffusion:
    with torch.device("meta"):
        return LLaDAForMaskedDiffusion(LLaDAConfig())


def test_llada_8b_has_the_published_number_of_tensors_and_parameters(llada_8b):
    tensors = llada_8b.state_dict()
    assert len(tensors) == 291
    assert sum(tensor.numel() for tensor in tensors.values()) == 8_015_581_184


def test_llada_8b_has_the_published_names(llada_8b):
    assert set(llada_8b.state_dict()) == published_names(32)


def test_llada_8b_has_the_published_shapes(llada_8b):
    shapes = {
        name.removeprefix("model.transformer."): tuple(value.shape) for name, value in llada_8b.state_dict().items()
    }
    assert shapes["wte.weight"] == shapes["ff_out.weight"] == (126464, 4096)
    assert shapes["blocks.31.attn_out.weight"] == (4096, 4096)
    assert shapes["blocks.31.ff_proj.weight"] == shapes["blocks.31.up_proj.weight"] == (12288, 4096)
    assert shapes["blocks.31.ff_out.weight"] == (4096, 12288)


# Configuration --------------------------------------------------------------------------------------------------------


def test_the_published_configuration_loads_and_equals_the_defaults(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED_CONFIG))
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is LLaDAConfig
    for name, value in PUBLISHED_CONFIG.items():
        if name in LLaDAConfig.__dataclass_fields__ and name not in ("architectures",):
            assert getattr(loaded, name) == getattr(LLaDAConfig(), name) == value, name


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
@pytest.mark.parametrize("shape", [(5,), (2, 3), (0,)])
def test_logits_at_positions_are_those_of_the_full_forward(shape):
    model, ids = tiny_model().eval(), random_ids(3, 8)
    positions = torch.randint(0, 24, shape, generator=torch.Generator().manual_seed(1))
    expected = model(ids).logits.flatten(0, 1)[positions]
    torch.testing.assert_close(model(ids, positions=positions), expected, atol=1e-6, rtol=1e-6)


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


def test_gradient_checkpointing_gives_the_same_gradients():
    ids, mask = random_ids(2, 6), torch.arange(6) >= torch.tensor([[0], [2]])
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert all(block.gradient_checkpointing for block in model.model.transformer["blocks"])
        model(ids, mask, positions=torch.tensor([3, 10]), targets=torch.tensor([7, 8])).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    plain, checkpointed = gradients
    assert all(gradient.abs().sum() > 0 for gradient in plain.values())
    torch.testing.assert_close(checkpointed, plain, atol=1e-7, rtol=1e-6)


# Saving and loading ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_size", ["10MB", "20KB"], ids=["one file", "shards"])
def test_saving_and_loading_is_exact(tmp_path, monkeypatch, shard_size):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "20KB")
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert type(loaded) is LLaDAForMaskedDiffusion
    assert set(loaded.state_dict()) == published_names(2)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert loaded.config.to_dict()["mask_token_id"] == 5
    assert (loaded.config.d_model, loaded.config.eos_token_id) == (32, END_OF_TEXT)


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
