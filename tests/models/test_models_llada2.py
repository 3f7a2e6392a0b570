"""LLaDA2 against what the published code computed, against a plain computation, and against damaged files."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import revert_weight_conversion

from dmpo_lightning.checkpoints.export import save_policy
from dmpo_lightning.functional import row_keys
from dmpo_lightning.models.llada2 import GroupedRouter, LLaDA2Config
from dmpo_lightning.models.loading import load_model, load_tokenizer
from dmpo_lightning.models.lora import LoRA
from dmpo_lightning.models.routing import expert_load, routing_values
from dmpo_lightning.policy import evaluating
from dmpo_lightning.samplers import ConfidenceSampler
from helpers import tiny_policy
from small_models import random_ids, tiny_llada2, tiny_sdar

IDS = torch.from_numpy(np.random.RandomState(1).randint(6, 25, (2, 11)))


def numbered(block: int = 4):
    """A model whose weights are the same with every version of torch, and whose head is sure of some tokens."""
    model, draws = tiny_llada2(block_size=block).eval(), np.random.RandomState(0)
    with torch.no_grad():
        for name, tensor in sorted(model.state_dict().items()):
            drawn = torch.from_numpy(draws.standard_normal(tuple(tensor.shape))).float() / 4
            tensor.copy_(1 + drawn if "norm" in name else drawn)
        model.lm_head.weight.mul_(3)
    return model


# What the published code computed -------------------------------------------------------------------------------------
# modeling_llada2_moe.py and modeling_llada21_moe.py of ZHZisZZ/dllm (ca176752), run with these weights. All logits
# differed by 7e-6 at most and all gradients by 7e-7, but for the embedding of the padding, which has none there. The
# routing of equal states differed in no bit, and of 455 settings of the decoding loops all drew the same tokens.

LOGITS = [[-0.85815, 0.40566, 0.86321, 1.39567], [5.82371, 0.47018, -7.21892, 0.45551]]
GRADIENTS = {
    "layers.0.attention.query_key_value.weight": 14.325326,
    "layers.0.mlp.down_proj.weight": 8.615623,
    "layers.1.attention.key_layernorm.weight": 0.3253348,
    "layers.1.mlp.gate.weight": 0.8251224,
    "layers.1.mlp.experts.0.gate_proj.weight": 1.1116174,
    "layers.1.mlp.shared_experts.up_proj.weight": 2.1053889,
}
"""Norms of those of the mean log-prob of token 7."""


def test_logits_and_gradients_are_those_of_the_published_code():
    model = numbered().train()
    logits = model(IDS).logits
    torch.testing.assert_close(logits[:, -1, 6:10], torch.tensor(LOGITS), atol=2e-5, rtol=0)
    logits.log_softmax(-1)[..., 7].mean().backward()
    found = revert_weight_conversion(model, {name: each.grad for name, each in model.named_parameters()})
    for name, norm in GRADIENTS.items():
        assert found[f"model.{name}"].norm().item() == pytest.approx(norm, rel=1e-5), name


DECODED = {
    (4, 6, 0.6, 2, None): "11 11 11 11 11 11",
    (4, 7, 0.6, None, None): "11 11 11 11 11",
    (4, 7, 0.9, None, 0.5): "11 11 17 11 11",
    (4, 6, 0.3, None, 0.7): "11 11 17 17 17 17",
    (32, 40, 0.3, None, None): "24 24 24 13 13 24 24 24 8 9 9 9 22 22 22 9 9 9 9 22 22 17 3 3",
    (32, 40, 0.9, 16, None): "24 24 17 17 24 24 24 17 17 17 17 17 24 17 17 9 9 20 24 17 17 17 3 17",
    (32, 40, 0.9, 8, None): "24 24 17 17 24 24 24 17 17 9 9 17 24 24 17 17 9 17 24 24 17 22 3 17",
    (32, 40, 0.9, None, 1.0): "24 24 17 17 24 24 24 17 17 17 20 17 24 17 17 9 9 17 24 17 17 17 3 17",
    (32, 37, 0.6, None, 0.9): "13 24 13 13 13 13 17 13 13 13 13 17 17 17 17 13 17 17 17 17 17 24 24 17 17 17 17",
}
"""Completions by `generate` of LLaDA2.0 (with steps per block) and of LLaDA2.1 (with editing above a probability)."""


@pytest.mark.parametrize(("block", "prompt", "threshold", "steps", "editing"), DECODED)
def test_greedy_decoding_draws_the_tokens_of_the_published_loops(block, prompt, threshold, steps, editing):
    """Prompts end inside a block, and completions with one."""
    policy = tiny_policy(model=numbered(block), with_reference=False)
    policy._ban[list(policy.facts.end_token_ids)] = -torch.inf
    expected = [int(token) for token in DECODED[block, prompt, threshold, steps, editing].split()]
    length = len(expected)
    sampler = ConfidenceSampler(temperature=0.0, threshold=threshold, editing_threshold=editing)
    ids = torch.from_numpy(np.random.RandomState(5).randint(6, 25, (1, prompt)))
    # Beside another row, which takes other steps.
    rows, mask = torch.cat((ids, ids.flip(1))), torch.ones(2, prompt, dtype=torch.bool)
    if steps is not None:
        sampler.denoising_steps = steps * length // block
    keys = row_keys(0, torch.arange(2), group_size=1, buffer=0).squeeze(1)
    with evaluating(policy):
        drawn = sampler.sample(policy, rows, mask, completion_length=length, keys=keys)
    assert drawn.completion_ids[0].tolist() == expected


# A plain computation --------------------------------------------------------------------------------------------------


def gated(x: torch.Tensor, weights: dict, name: str) -> torch.Tensor:
    gate, up, down = (weights[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def mixture(x: torch.Tensor, weights: dict, name: str, config: LLaDA2Config) -> torch.Tensor:
    """Of one token, with every expert asked."""
    score = 1 / (1 + torch.exp(-(weights[f"{name}.gate.weight"] @ x)))
    biased = (score + weights[f"{name}.gate.expert_bias"]).tolist()
    size = config.num_experts // config.n_group
    groups = [range(g * size, (g + 1) * size) for g in range(config.n_group)]
    best = sorted(groups, key=lambda group: -sum(sorted(biased[e] for e in group)[-2:]))[: config.topk_group]
    chosen = sorted((e for group in best for e in group), key=lambda e: -biased[e])[: config.num_experts_per_tok]
    total, out = sum(score[e] for e in chosen), gated(x, weights, f"{name}.shared_experts")
    for expert in range(config.num_experts):
        share = config.routed_scaling_factor * score[expert] / total if expert in chosen else 0.0
        out = out + share * gated(x, weights, f"{name}.experts.{expert}")
    return out


@torch.no_grad()
def test_experts_are_computed_as_if_every_one_of_them_was_asked():
    model, h = tiny_llada2().eval(), torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    weights = revert_weight_conversion(model, model.state_dict())
    expected = [mixture(token, weights, "model.layers.1.mlp", model.config) for token in h.flatten(0, 1)]
    torch.testing.assert_close(model.model.layers[1].mlp(h).flatten(0, 1), torch.stack(expected), atol=1e-5, rtol=1e-5)


def test_routing_is_in_float32_whatever_autocast_says_and_the_bias_decides_who_is_chosen_alone():
    router, h = tiny_llada2().model.layers[1].mlp.gate, torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    chosen, weights = router(h)
    with torch.autocast("cpu", torch.bfloat16):
        again = router(h)
    assert torch.equal(again[0], chosen)
    assert torch.equal(again[1], weights)
    torch.testing.assert_close(weights.sum(-1), torch.full((50,), 2.5))
    router.expert_bias[3] += 10
    assert (router(h)[0] == 3).any(-1).all()
    assert not router.expert_bias.requires_grad


def test_the_load_of_experts_is_counted_and_what_is_logged_of_it():
    model = tiny_llada2(num_hidden_layers=3)
    with expert_load(model) as loads:
        model(IDS)
        model(IDS[:1])
    model(IDS)
    assert [int(load.sum()) for load in loads] == [(IDS.numel() + IDS[:1].numel()) * 3] * 2
    even, one = torch.full((8,), 5), torch.tensor([0, 0, 0, 24, 0, 0, 0, 8])
    values = routing_values([even, one, torch.zeros(8, dtype=torch.int64)])
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / np.log(8)
    assert values["routing/lowest_entropy"].item() == pytest.approx(entropy, rel=1e-6)
    assert values["routing/entropy"].item() == pytest.approx((1 + entropy) / 2, rel=1e-6)
    assert values["routing/busiest_expert"].item() == 0.75
    with expert_load(tiny_sdar()) as loads:
        pass
    assert routing_values(loads) == {}


def test_a_model_in_bfloat16_keeps_its_biases_in_float32_and_routes_a_token_alike_in_any_batch(tmp_path):
    tiny_llada2().save_pretrained(tmp_path)
    model = load_model(str(tmp_path), dtype="bfloat16").eval()
    assert torch.equal(
        load_model(str(tmp_path), dtype="float32").bfloat16().model.layers[1].mlp.gate.expert_bias,
        model.model.layers[1].mlp.gate.expert_bias,
    )
    assert {name for name, each in model.state_dict().items() if each.dtype == torch.float32} == {
        "model.layers.1.mlp.gate.expert_bias"
    }
    routed, ids = [], random_ids(3, 8)
    next(each for each in model.modules() if isinstance(each, GroupedRouter)).register_forward_hook(
        lambda _, __, said: routed.append(said[0])
    )
    with torch.no_grad():
        whole, alone = model(ids).logits, model(ids[1:2]).logits
    assert torch.equal(routed[0][8:16], routed[1])
    torch.testing.assert_close(whole[1:2], alone)


# Files ----------------------------------------------------------------------------------------------------------------

EXPERT = "model.layers.1.mlp.experts.{}.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held.pop(EXPERT.format(3)), rf"tensor '{EXPERT.format(3)}' is missing"),
        (
            lambda held: held.update({EXPERT.format(8): held[EXPERT.format(7)].clone()}),
            f"unexpected tensor '{EXPERT.format(8)}'",
        ),
        (
            lambda held: held.update({EXPERT.format(2): torch.zeros(24, 32)}),
            rf"tensor '{EXPERT.format(2)}' must have shape \(16, 32\), got \(24, 32\)",
        ),
        (lambda held: held.pop("model.layers.1.mlp.gate.expert_bias"), r"gate\.expert_bias' is missing"),
    ],
)
def test_wrong_missing_and_extra_experts_are_refused_by_name(tmp_path, change, message):
    tiny_llada2().save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    change(held)
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_group": 3}, "`n_group` groups"),
        ({"moe_intermediate_size": 12}, "multiples of 8"),
        ({"score_function": "softmax"}, "score_function='softmax' is not supported"),
        ({"use_qk_norm": False}, "use_qk_norm=False is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 1.0}}, "scaled rotary positions"),
    ],
)
def test_a_configuration_that_is_not_implemented_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        LLaDA2Config(**change)


# Adapters -------------------------------------------------------------------------------------------------------------


def test_routed_experts_are_adapted_by_choice_saved_loaded_and_merged_and_routers_never(tmp_path):
    """That they are not by default is a test of every family."""
    base, ids = tiny_llada2().eval(), random_ids(2, 9)
    base.save_pretrained(tmp_path / "base")
    adapted = LoRA(r=2, dropout=0.0, experts=True).apply(base, str(tmp_path / "base"))
    trained = {name for name, each in adapted.named_parameters() if each.requires_grad}
    assert len(trained) == 2 * (2 * 5 + 2)
    assert {name.split(".mlp.experts")[1].count("base_layer") for name in trained if ".mlp.experts" in name} == {0, 1}
    assert not any(".gate." in name for name in trained)
    with torch.no_grad():
        for name in trained:
            adapted.get_parameter(name).normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
        expected = adapted.eval()(ids).logits
    save_policy(adapted, load_tokenizer("sudoku_tiny"), adapted.state_dict(), tmp_path / "adapter")
    again = load_model(str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(again(ids).logits, expected)
    assert not torch.allclose(tiny_llada2().eval()(ids).logits, expected, atol=0.1)
    whole = adapted.merge_and_unload()
    save_policy(whole, load_tokenizer("sudoku_tiny"), whole.state_dict(), tmp_path / "whole")
    torch.testing.assert_close(load_model(str(tmp_path / "whole")).eval()(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_quantisation_and_adapters_of_experts_that_are_not_there_are_refused(tmp_path):
    tiny_llada2().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"nf4 quantises linear layers, but \d+% of LLaDA2ForMaskedDiffusion are stacked experts"
    ):
        load_model(str(tmp_path), quantization="nf4")
    with pytest.raises(ValueError, match="needs `dropout` 0"):
        LoRA(experts=True)
    with pytest.raises(ValueError, match="needs a mixture of experts"):
        LoRA(dropout=0.0, experts=True).apply(tiny_sdar())
