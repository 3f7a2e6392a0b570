import dataclasses
import json

import pytest
import torch
from benchmarks.block_masks import Layer, compare
from benchmarks.block_masks import Size as MaskSize
from benchmarks.plain_blocks import generate
from benchmarks.plain_experts import LoopedExperts, with_loops
from torch.nn.attention.flex_attention import flex_attention

from benchmarks import blocks

SMALL = blocks.Size(vocab_size=97, prompt_length=6)


@pytest.fixture(scope="module")
def policy():
    return blocks.random_policy(SMALL)


@pytest.mark.parametrize("prompt_length", [4, 5, 6, 7])
def test_both_sides_decode_the_same_tokens(policy, prompt_length):
    prompts = blocks.random_prompts(dataclasses.replace(SMALL, prompt_length=prompt_length))
    mask = policy.facts.mask_token_id
    plain = generate(policy.model, prompts, completion_length=11, mask_token_id=mask)
    assert torch.equal(blocks.ours(policy, prompts, 11), plain.completion_ids)
    assert plain.forwards == 11


def test_experts_in_a_loop_say_what_grouped_ones_do(policy):
    ours = blocks.random_policy(SMALL, "llada2").model
    plain, ids = with_loops(ours), blocks.random_prompts(SMALL)
    for model in (ours, plain):
        assert sum(isinstance(module, LoopedExperts) for module in model.modules()) == 3 * (model is plain)
    for training in (False, True):
        found, expected = (model.train(training)(ids).logits for model in (ours, plain))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_mismatches_count_the_tokens_of_a_plain_side_that_decodes_something_else(policy):
    def off_by_one(*arguments, **options):
        result = generate(*arguments, **options)
        result.completion_ids[0, :3] += 1
        return result

    assert blocks.cost(policy, SMALL, 8, off_by_one, 3).mismatches == 3


def test_operations_of_a_token_do_not_grow_with_finished_blocks_but_for_attention(policy):
    prompts = blocks.random_prompts(SMALL)
    counted = [blocks.operations(lambda n=n: blocks.ours(policy, prompts, n)) for n in (8, 16, 24, 32)]
    products, attention = torch.tensor(counted).T
    further = products.diff()
    assert further[0] > 0
    assert (further == further[0]).all()
    # A token attends to all before it, so that the sum over tokens is a quadratic of their number and no more.
    assert (attention.diff() > 0).all()
    assert (attention.diff(n=2) > 0).all()
    assert (attention.diff(n=3) == 0).all()


def test_operations_are_those_of_the_products(policy):
    """All columns of the current block in each step, and those of the block before once, to keep what they are.

    Of these the last layer computes keys and values alone. The head is at all places of the block in each step.
    """
    prompts = blocks.random_prompts(SMALL)
    products = [blocks.operations(lambda n=n: blocks.ours(policy, prompts, n))[0] for n in (8, 12)]
    weights = {name: weight.numel() for name, weight in policy.model.named_parameters() if "_proj" in name}
    unneeded = sum(
        number for name, number in weights.items() if "layers.3" in name and not ("k_proj" in name or "v_proj" in name)
    )
    head = policy.model.get_output_embeddings().weight.numel()
    size = SMALL.block_size
    of_a_block = size * size * (sum(weights.values()) + head) + size * (sum(weights.values()) - unneeded)
    assert products[1] - products[0] == 2 * SMALL.rows * of_a_block


def test_json_is_one_line_per_length(capsys):
    blocks.main(["--lengths", "5", "6", "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["length"] for line in lines] == [5, 6]
    assert all(line["products"] > 0 and line["mismatches"] == 0 for line in lines)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_computes_what_the_boolean_mask_does():
    size = MaskSize(prompt_length=9, completion_length=10, copies=2, head_size=16)
    layer = Layer.random(size, torch.device("cpu"), torch.float32, flex_attention)
    attended = layer.allowed.any(-1)[:, None, :, None]
    ours, flex = (way().masked_fill(~attended, 0.0) for way in (layer.dense, layer.flex))
    torch.testing.assert_close(flex, ours)
    assert not layer.allowed[1].all()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_masks_are_compared_forward_alone_on_a_processor():
    size = MaskSize(prompt_length=9, completion_length=10, copies=2, head_size=16)
    timings = compare(size, torch.device("cpu"), torch.float32, 3, flex_attention)
    assert list(timings) == ["forward"]
    assert timings["forward"].ratio > 0
