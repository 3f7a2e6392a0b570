import json

import pytest
import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from dmpo_lightning.checkpoints.export import save_policy
from dmpo_lightning.models.llada import LLaDAConfig
from dmpo_lightning.models.loading import load_model, load_tokenizer, token_facts
from dmpo_lightning.models.sdar import FAMILY, SDARConfig, SDARForMaskedDiffusion
from dmpo_lightning.models.sdar_moe import SDARMoeConfig, SDARMoeForMaskedDiffusion
from dmpo_lightning.planning.network import read_model_config
from published import SDAR
from small_models import SMALL, random_ids, tiny_sdar, tiny_sdar_moe, word_tokenizer

SMALL_CHECKPOINT = SMALL | {"head_dim": 12, "mask_token_id": 5}
SIZES = {
    "1.7B": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "4B": {"hidden_size": 2560, "intermediate_size": 9728},
    "8B": {},
}
CONVERSATION = [{"role": "user", "content": "2 + 2"}]
USER_TURN = "<|im_start|>user\n2 + 2<|im_end|>\n<|im_start|>assistant\n"


# Shapes and names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"block_size": 0}, "block_size"),
        ({"moe_intermediate_size": 12}, "multiples of 8"),
        ({"num_experts": 6}, "`num_experts_per_tok` of SDARMoe must be at most"),
        ({"norm_topk_prob": False}, "norm_topk_prob=False is not supported"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\] is not supported"),
    ],
)
def test_a_configuration_that_is_not_implemented_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        SDARMoeConfig(**changes)


def test_a_dense_sdar_has_no_experts():
    with pytest.raises(ValueError, match="num_experts=8 is not supported"):
        SDARConfig(num_experts=8)


# Equality with transformers' Qwen3 ------------------------------------------------------------------------------------


def qwen3_twin(model: SDARForMaskedDiffusion) -> PreTrainedModel:
    """transformers' Qwen3 with the weights of ``model``, whose names are the same; causal until it is given a mask."""
    config, names, config_class, model_class = model.config, (*SMALL, "head_dim"), Qwen3Config, Qwen3ForCausalLM
    if isinstance(model, SDARMoeForMaskedDiffusion):
        names = (*names, "moe_intermediate_size", "num_experts", "num_experts_per_tok", "norm_topk_prob")
        config_class, model_class = Qwen3MoeConfig, Qwen3MoeForCausalLM
    twin = model_class(
        config_class(
            **{name: getattr(config, name) for name in names},
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_word_embeddings,
            attn_implementation="eager",
        )
    )
    twin.load_state_dict(model.state_dict())
    return twin.eval()


def twin_logits(twin: PreTrainedModel, ids: torch.Tensor, attended: torch.Tensor, block: int) -> torch.Tensor:
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
@pytest.mark.parametrize("kind", [tiny_sdar, tiny_sdar_moe], ids=["plain", "mixture"])
def test_logits_equal_those_of_a_block_causal_qwen3(kind, block):
    model, ids = kind(block_size=block).eval(), random_ids(2, 67)
    expected = twin_logits(qwen3_twin(model), ids, torch.ones(2, 67, dtype=torch.bool), block)
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("block", [1, 4, 32])
@pytest.mark.parametrize("kind", [tiny_sdar, tiny_sdar_moe], ids=["plain", "mixture"])
def test_logits_equal_those_of_a_block_causal_qwen3_with_left_padding(kind, block):
    """The amounts of padding are no multiples of the block, so that blocks counted in columns would differ."""
    model, ids = kind(block_size=block).eval(), random_ids(3, 67)
    attended = torch.arange(67) >= torch.tensor([0, 5, 37])[:, None]
    expected = twin_logits(qwen3_twin(model), ids, attended, block)
    torch.testing.assert_close(model(ids, attended).logits[attended], expected[attended], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_blocks_of_one_token_are_qwen3_itself():
    model, ids = tiny_sdar(block_size=1).eval(), random_ids(2, 9)
    expected = qwen3_twin(model)(ids, use_cache=False).logits
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_gradients_of_a_mixture_are_those_of_qwen3_moe():
    """Those of the published code are the same: modeling_sdar_moe.py as it stands in PKU-SEC-Lab/TEAM-MoE-dLLM
    (e9c502e5), run beside this. Logits differed by 2.2e-6 at most, gradients by 5.1e-7, and routing in no bit.
    """
    model, ids = tiny_sdar_moe(block_size=1), random_ids(2, 9)
    twin = qwen3_twin(model)
    for logits in (model(ids).logits, twin(ids, use_cache=False).logits):
        logits.log_softmax(-1)[..., 7].mean().backward()
    expected = dict(twin.named_parameters())
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name].grad, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_a_token_sees_its_own_block_on_both_sides_and_no_later_one():
    model, ids = tiny_sdar().eval(), random_ids(1, 12)
    changed = ids.clone()
    changed[0, 6] = (ids[0, 6] + 1) % 32
    moved = (model(ids).logits != model(changed).logits).any(-1)[0]
    assert moved.tolist() == [False] * 4 + [True] * 8


# Saving, loading, adapters, text --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "stated", "block"),
    [("SDAR-8B-Chat-b32", {}, 32), ("SDAR-8B-Chat", {}, 4), ("SDAR-8B-Chat-b32", {"block_size": 8}, 8)],
)
def test_a_block_that_the_configuration_leaves_out_is_that_of_the_name(tmp_path, name, stated, block):
    folder = tmp_path / name
    tiny_sdar().save_pretrained(folder)
    unstated = {name: value for name, value in SDAR.items() if name != "block_size"}
    config = unstated | SMALL_CHECKPOINT | {"tie_word_embeddings": False} | stated
    (folder / "config.json").write_text(json.dumps(config))
    assert load_model(str(folder)).block_size == block
    assert load_model(str(folder), random_weights=True).block_size == block
    assert read_model_config(str(folder))[0].block_size == block


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


def test_a_mixture_of_experts_is_never_read_as_a_dense_llada(tmp_path):
    config = {"model_type": "llada", "num_experts": 64, "hidden_size": 2048, "num_hidden_layers": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="LLaDA with num_experts=64 is not supported"):
        load_model(str(tmp_path))
    assert LLaDAConfig(num_experts=0).d_model == 4096
