import json

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForMaskedLM, Qwen3Config, Qwen3ForCausalLM

from dmpo_lightning.checkpoints.export import save_policy
from dmpo_lightning.models.backbone import Backbone
from dmpo_lightning.models.llada import LLaDAConfig
from dmpo_lightning.models.loading import load_model, load_tokenizer, token_facts
from dmpo_lightning.models.lora import LoRA
from dmpo_lightning.models.parts import layers_of
from dmpo_lightning.models.sdar import FAMILY, SDARConfig, SDARForMaskedDiffusion
from dmpo_lightning.planning.parameters import read_architecture
from small_models import SMALL, assert_published_is_default, random_ids, tiny_sdar, word_tokenizer

PUBLISHED_CONFIG = {
    "architectures": ["SDARForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_sdar.SDARConfig",
        "AutoModel": "modeling_sdar.SDARModel",
        "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
    },
    "bos_token_id": 151643,
    "debug": False,
    "eos_token_id": 151643,
    "ep_size": 1,
    "fuse_cross_entropy": True,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 32768,
    "max_window_layers": 36,
    "model_type": "sdar",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.52.4",
    "use_cache": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
SMALL_CHECKPOINT = SMALL | {"head_dim": 12, "mask_token_id": 5}
SIZES = {
    "1.7B": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "4B": {"hidden_size": 2560, "intermediate_size": 9728},
    "8B": {},
}
CONVERSATION = [{"role": "user", "content": "2 + 2"}]
USER_TURN = "<|im_start|>user\n2 + 2<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def published_names(layers: int) -> set[str]:
    """Qwen3's names."""
    parts = [f"self_attn.{part}.weight" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
    parts += [f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
    parts += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    blocks = {f"model.layers.{i}.{part}" for i in range(layers) for part in parts}
    return blocks | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}


# Shapes and names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "tied", "tensors", "parameters"),
    [
        ("1.7B", False, 311, 2_031_739_904),
        ("1.7B", True, 311, 1_720_574_976),
        ("4B", False, 399, 4_411_424_256),
        ("8B", False, 399, 8_190_735_360),
    ],
)
def test_the_published_sizes_have_the_published_numbers_of_tensors_and_parameters(size, tied, tensors, parameters):
    with torch.device("meta"):
        model = SDARForMaskedDiffusion(SDARConfig(**SIZES[size], tie_word_embeddings=tied))
    assert set(model.state_dict()) == published_names(model.config.num_hidden_layers)
    assert len(model.state_dict()) == tensors
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_the_published_configuration_is_the_default_and_names_neither_block_nor_mask(tmp_path):
    loaded = assert_published_is_default(SDARConfig, PUBLISHED_CONFIG, tmp_path)
    assert (loaded.block_size, loaded.mask_token_id) == (4, 151669)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"block_size": 0}, "block_size"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    ],
)
def test_a_configuration_that_is_not_implemented_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        SDARConfig(**changes)


# Equality with transformers' Qwen3 ------------------------------------------------------------------------------------


def qwen3_twin(model: SDARForMaskedDiffusion) -> Qwen3ForCausalLM:
    """transformers' Qwen3 with the weights of ``model``, whose names are the same; causal until it is given a mask."""
    config = model.config
    twin = Qwen3ForCausalLM(
        Qwen3Config(
            **{name: getattr(config, name) for name in (*SMALL, "head_dim")},
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_word_embeddings,
            attn_implementation="eager",
        )
    )
    twin.load_state_dict(model.state_dict())
    return twin.eval()


def twin_logits(twin: Qwen3ForCausalLM, ids: torch.Tensor, attended: torch.Tensor, block: int) -> torch.Tensor:
    """Logits under a mask that is written out pair by pair."""
    rows, length = ids.shape
    position_ids = torch.tensor([[max(sum(row[: i + 1]) - 1, 0) for i in range(length)] for row in attended.tolist()])
    bias = torch.full((rows, 1, length, length), torch.finfo(torch.float32).min)
    for row in range(rows):
        for query in range(length):
            for key in range(length):
                earlier = position_ids[row, key] // block <= position_ids[row, query] // block
                if attended[row, key] and earlier:
                    bias[row, 0, query, key] = 0
    return twin(ids, attention_mask=bias, position_ids=position_ids, use_cache=False).logits


@torch.no_grad()
@pytest.mark.parametrize("block", [1, 4, 32])
def test_logits_equal_those_of_a_block_causal_qwen3(block):
    model, ids = tiny_sdar(block_size=block).eval(), random_ids(2, 67)
    expected = twin_logits(qwen3_twin(model), ids, torch.ones(2, 67, dtype=torch.bool), block)
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("block", [1, 4, 32])
def test_logits_equal_those_of_a_block_causal_qwen3_with_left_padding(block):
    """The amounts of padding are no multiples of the block, so that blocks counted in columns would differ."""
    model, ids = tiny_sdar(block_size=block).eval(), random_ids(3, 67)
    attended = torch.arange(67) >= torch.tensor([0, 5, 37])[:, None]
    expected = twin_logits(qwen3_twin(model), ids, attended, block)
    torch.testing.assert_close(model(ids, attended).logits[attended], expected[attended], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_blocks_of_one_token_are_qwen3_itself():
    model, ids = tiny_sdar(block_size=1).eval(), random_ids(2, 9)
    expected = qwen3_twin(model)(ids, use_cache=False).logits
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_token_sees_its_own_block_on_both_sides_and_no_later_one():
    model, ids = tiny_sdar().eval(), random_ids(1, 12)
    changed = ids.clone()
    changed[0, 6] = (ids[0, 6] + 1) % 32
    moved = (model(ids).logits != model(changed).logits).any(-1)[0]
    assert moved.tolist() == [False] * 4 + [True] * 8


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 3])
def test_logits_asked_for_at_positions_are_those_of_the_whole(padding):
    """In the shape [rows k] the last block computes these queries alone."""
    model, ids = tiny_sdar().eval(), random_ids(2, 10)
    attended = torch.arange(10).expand(2, -1) >= torch.tensor([0, padding])[:, None]
    positions = torch.tensor([[4, 9, 7], [15, 19, 16]])
    whole = model(ids, attended).logits.flatten(0, 1)
    for asked in (positions, positions.flatten()):
        torch.testing.assert_close(model(ids, attended, positions=asked), whole[asked], atol=1e-5, rtol=1e-5)


# Saving, loading, adapters, text --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("load", [AutoModelForMaskedLM.from_pretrained, load_model])
def test_saving_in_shards_and_loading_is_exact(tmp_path, load, tied):
    model = tiny_sdar(tie_word_embeddings=tied).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = load(str(tmp_path))
    assert type(loaded) is SDARForMaskedDiffusion
    assert set(loaded.state_dict()) == published_names(2)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("tied", [False, True])
def test_a_sharded_folder_with_the_published_configuration_loads_exactly_without_remote_code(tmp_path, tied):
    model = tiny_sdar(tie_word_embeddings=tied).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    config = PUBLISHED_CONFIG | SMALL_CHECKPOINT | {"tie_word_embeddings": tied}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_model(str(tmp_path))
    assert type(loaded) is SDARForMaskedDiffusion
    assert loaded.dtype == torch.bfloat16
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.parametrize(
    ("name", "stated", "block"),
    [("SDAR-8B-Chat-b32", {}, 32), ("SDAR-8B-Chat", {}, 4), ("SDAR-8B-Chat-b32", {"block_size": 8}, 8)],
)
def test_a_block_that_the_configuration_leaves_out_is_that_of_the_name(tmp_path, name, stated, block):
    folder = tmp_path / name
    tiny_sdar().save_pretrained(folder)
    config = PUBLISHED_CONFIG | SMALL_CHECKPOINT | {"tie_word_embeddings": False} | stated
    (folder / "config.json").write_text(json.dumps(config))
    assert load_model(str(folder)).block_size == block
    assert load_model(str(folder), random_weights=True).block_size == block
    assert read_architecture(str(folder)).block_size == block


def test_a_head_that_is_not_tied_must_be_there(tmp_path):
    tiny_sdar(tie_word_embeddings=True).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED_CONFIG | SMALL_CHECKPOINT))
    with pytest.raises(ValueError, match=r"'lm_head.weight' is missing"):
        load_model(str(tmp_path))


def test_lora_adapts_the_seven_linears_of_each_block():
    model = tiny_sdar()
    names = LoRA(r=2).target_names(model)
    parts = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    assert names == [f"model.layers.{i}.{part}" for i in range(2) for part in parts]
    assert [type(layer).__name__ for layer in layers_of(model)] == ["QwenLayer"] * 2


def test_checkpointing_changes_no_gradient():
    ids, gradients = random_ids(2, 8), []
    for checkpointing in (False, True):
        model = Backbone(tiny_sdar(), tokenizer="sudoku_tiny", gradient_checkpointing=checkpointing).build()
        model(ids).logits.logsumexp(-1).sum().backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    assert torch.equal(*gradients)


@pytest.fixture
def sdar_tokenizer():
    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|MASK|>")
    names = {"unk_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    return word_tokenizer((*special, "2", "+"), **names, mask_token="<|MASK|>")


def test_a_tokenizer_without_a_template_gets_chatml_without_a_system_message(sdar_tokenizer, tmp_path):
    """Dream's, which has the same end tokens, has one by default."""
    sdar_tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.chat_template == FAMILY.chat_template
    text = loaded.apply_chat_template(CONVERSATION, add_generation_prompt=True, tokenize=False)
    assert text == USER_TURN


def test_a_completion_ends_at_end_of_text_or_end_of_turn(sdar_tokenizer):
    facts = token_facts(tiny_sdar(), sdar_tokenizer, mask_token_id=3)
    assert sorted(facts.end_token_ids) == [0, 2]


def test_a_trained_model_is_written_as_it_is_read(tmp_path):
    for tied in (False, True):
        folder = tmp_path / str(tied)
        model = tiny_sdar(tie_word_embeddings=tied)
        weights = {name: value.detach().clone() for name, value in model.named_parameters()}
        save_policy(model, load_tokenizer("sudoku_tiny"), weights, folder)
        loaded = load_model(str(folder))
        assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())


# Relatives that are not supported -------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llada2_moe", "sdar_moe"])
def test_a_relative_is_refused_by_name_with_what_is_missing(tmp_path, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "auto_map": {"AutoConfig": "a.B"}}))
    with pytest.raises(ValueError, match=rf"'{model_type}', which is not supported: .*not built"):
        load_model(str(tmp_path), trust_remote_code=True)


def test_a_mixture_of_experts_is_never_read_as_a_dense_llada(tmp_path):
    config = {"model_type": "llada", "num_experts": 64, "hidden_size": 2048, "num_hidden_layers": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="LLaDA with num_experts=64 is not supported"):
        load_model(str(tmp_path))
    assert LLaDAConfig(num_experts=0).d_model == 4096
