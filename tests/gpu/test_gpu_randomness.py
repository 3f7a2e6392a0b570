"""Everything keyed is the same on every device, bit for bit."""

import pytest
import torch

from dmpo_lightning.functional import draw_masks, fold_in, row_keys, uniforms
from dmpo_lightning.functional.masking import position_ranks, trajectory_masks
from dmpo_lightning.functional.randomness import Purpose, inverse_cdf
from dmpo_lightning.policy import evaluating
from dmpo_lightning.samplers import RandomOrderSampler
from gpu.runs import assert_same
from helpers import prompt_batch, tiny_policy

pytestmark = pytest.mark.gpu
SEEDS = (0, 1, -1, 2**31, 2**63 - 1, 2**64 + 5)
PROMPTS = torch.tensor([0, 1, 2, 7, 1000, 2**31 - 1, 2**40])


def keys(count: int = 64) -> torch.Tensor:
    return row_keys(3, torch.arange(count), group_size=1, buffer=0).squeeze(1)


@pytest.mark.parametrize("seed", SEEDS)
def test_row_keys_are_the_same(device, seed):
    for buffer in (0, 1, 12345):
        options = {"group_size": 5, "buffer": buffer}
        found = row_keys(seed, PROMPTS.to(device), **options)
        assert_same(found, row_keys(seed, PROMPTS, **options), f"row_keys of seed {seed}, buffer {buffer}")


@pytest.mark.parametrize("value", [0, 1, -3, 2**40, PROMPTS], ids=str)
def test_folded_keys_are_the_same(device, value):
    own = value.to(device) if isinstance(value, torch.Tensor) else value
    start = keys(7)
    assert_same(fold_in(start.to(device), own), fold_in(start, value), f"fold_in of {value}")
    assert_same(fold_in(start.to(device)[:, None], own), fold_in(start[:, None], value), f"fold_in of {value}, wide")


@pytest.mark.parametrize("count", [1, 257, 4096])
def test_uniforms_are_the_same(device, count):
    found = uniforms(keys().to(device), count)
    assert_same(found, uniforms(keys(), count), f"{count} uniforms for each key")
    assert found.dtype == torch.float32
    assert found.min() > 0, f"smallest {found.min().item()}"
    assert found.max() < 1, f"largest {found.max().item()}"


VOCABULARIES = [2, 24, 500, 512, 32000, 32768, 50257, 126464, 152064]


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_tokens_of_exact_probabilities_are_the_same(device, vocabulary):
    """Small whole numbers, whose sums are exact in float32 in whatever order they are taken; a third of them zero."""
    numbers = torch.Generator().manual_seed(vocabulary)
    probabilities = torch.randint(0, 60, (48, vocabulary), generator=numbers).sub_(20).clamp_(min=0).float()
    probabilities[:, 1] += 1
    uniform = uniforms(keys(48), 1).squeeze(1)
    expected = inverse_cdf(probabilities, uniform)
    found = inverse_cdf(probabilities.to(device), uniform.to(device))
    assert_same(found, expected, f"tokens of {vocabulary}")
    grid = inverse_cdf(probabilities.to(device).unflatten(0, (6, 8)), uniform.to(device).unflatten(0, (6, 8)))
    assert_same(grid.flatten(), expected, f"tokens of {vocabulary}, in a grid")
    for row in (0, 17):  # a cumulative sum of one row alone takes other paths
        alone = inverse_cdf(probabilities[row].to(device), uniform[row].to(device))
        assert_same(alone, expected[row], f"tokens of {vocabulary}, row {row} alone")
    assert (probabilities.gather(1, found.cpu()[:, None]) > 0).all(), "a token of probability zero was drawn"


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_tokens_of_a_softmax_differ_only_where_sums_are_rounded(device, vocabulary):
    """Devices sum in different orders. So a draw may fall on the other side of an edge that it all but hits."""
    numbers = torch.Generator().manual_seed(vocabulary)
    probabilities = (3 * torch.randn(256, vocabulary, generator=numbers)).softmax(-1)
    uniform = uniforms(keys(256), 1).squeeze(1)
    found = inverse_cdf(probabilities.to(device), uniform.to(device)).cpu()
    edges = torch.nn.functional.pad(probabilities.double().cumsum(-1), (1, 0))
    target = uniform.double() * edges[:, -1]
    below, above = (edges.gather(1, (found + shift)[:, None]).squeeze(1) for shift in (0, 1))
    outside = torch.maximum(below - target, target - above)
    worst = int(outside.argmax())
    assert outside[worst] < 4e-6, (
        f"row {worst}: token {found[worst]} covers {below[worst]:.9f} to {above[worst]:.9f}, drawn {target[worst]:.9f}"
    )
    differing = int((found != inverse_cdf(probabilities, uniform)).sum())
    allowed = 256 * min(1.0, 0.01 + 1e-6 * vocabulary)
    assert differing <= allowed, f"{differing} of 256 tokens differ from the CPU's, at most {allowed:.0f} by rounding"


@pytest.mark.parametrize("antithetic", [True, False])
@pytest.mark.parametrize("length", [1, 7, 256, 1024])
def test_masks_are_the_same(device, length, antithetic):
    options = {"length": length, "replicates": 4, "antithetic": antithetic}
    assert_same(draw_masks(keys().to(device), **options), draw_masks(keys(), **options), f"masks of {options}")


def test_ties_are_ranked_the_same(device):
    """16 values for 300 places."""
    noise = torch.randint(16, (64, 300), generator=torch.Generator().manual_seed(0)) / 16
    assert_same(position_ranks(noise.to(device)), position_ranks(noise), "ranks of tied values")


@pytest.mark.parametrize("length", [8, 256, 1024])
def test_random_orders_are_the_same(device, length):
    orders = [
        position_ranks(uniforms(fold_in(each, Purpose.ORDER), length)).argsort(-1)
        for each in (keys().to(device), keys())
    ]
    assert_same(*orders, "orders")


@pytest.mark.parametrize("steps", [None, 5])
def test_random_order_reveals_places_in_the_same_order(device, steps):
    sampler, revealed = RandomOrderSampler(denoising_steps=steps), []
    for place in (device, torch.device("cpu")):
        policy = tiny_policy(with_reference=False).to(place)
        batch = prompt_batch(policy, ["12", "1234", "3", "44 12"]).to(place)
        own = row_keys(0, batch.prompt_index, group_size=1, buffer=0).squeeze(1)
        with evaluating(policy):
            samples = sampler.sample(policy, batch.prompt_ids, batch.prompt_mask, completion_length=16, keys=own)
        revealed.append(samples.reveal_step)
    assert_same(*revealed, "reveal steps")
    masks = [trajectory_masks(each, sampler.num_steps(16))[0] for each in revealed]
    assert_same(*masks, "masks of the trajectory")
