"""Attention of unpadded batches takes no mask, which is what the flash kernels ask for."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dmpo_lightning.functional import draw_masks, row_keys
from dmpo_lightning.policy import Policy, evaluating
from dmpo_lightning.samplers import ConfidenceSampler
from gpu.runs import assert_same
from helpers import pad_more, prompt_batch, tiny_model, tiny_policy
from small_models import tiny_dream

pytestmark = pytest.mark.gpu
LENGTH = 16
MODELS = {"LLaDA": tiny_model, "Dream": tiny_dream}


@pytest.fixture(params=MODELS)
def policy(request, device) -> Policy:
    return tiny_policy(model=MODELS[request.param](), with_reference=False).to(device, torch.bfloat16)


@pytest.fixture
def flash(device, monkeypatch):
    """Other kernels are refused. On the CPU, where there is one for every mask, masks are."""
    if device.type == "cuda":
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            yield
        return
    attend = torch.nn.functional.scaled_dot_product_attention

    def without_a_mask(*tensors, attn_mask=None, **options):
        if attn_mask is not None:
            raise RuntimeError(f"attention was given a mask of shape {tuple(attn_mask.shape)}")
        return attend(*tensors, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", without_a_mask)
    yield


def batch(policy: Policy, device: torch.device, *, padding: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked completions behind two prompts of equal length: ids and mask."""
    prompt = prompt_batch(policy, ["1234", "5678"])
    ids, mask = pad_more(prompt.prompt_ids, prompt.prompt_mask, padding)
    ids = torch.nn.functional.pad(ids, (0, LENGTH), value=policy.facts.mask_token_id)
    return ids.to(device), torch.nn.functional.pad(mask, (0, LENGTH), value=True).to(device)


def logits(policy: Policy, device: torch.device, *, padding: int = 0, masked: bool = True) -> torch.Tensor:
    ids, mask = batch(policy, device, padding=padding)
    mask = mask if masked else None  # which says that nothing is padded
    places = torch.arange(ids.shape[1] - LENGTH, ids.shape[1], device=device)
    with evaluating(policy):
        return policy.logits(ids, mask, torch.arange(2, device=device)[:, None] * ids.shape[1] + places)


def test_flash_attends_without_a_mask_here(device, flash):
    """The kernel is there for heads as small as those of these tests; else the tests below say nothing."""
    q = torch.randn(2, 4, 20, 8, device=device, dtype=torch.bfloat16)
    assert torch.nn.functional.scaled_dot_product_attention(q, q, q).isfinite().all()
    k = q[:, :2]
    assert torch.nn.functional.scaled_dot_product_attention(q, k, k, enable_gqa=True).isfinite().all()


def test_logits_of_an_unpadded_batch_take_no_mask(policy, device, flash):
    found = logits(policy, device, masked=False)
    assert found[..., 6:20].isfinite().all()


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_sampling_for_unpadded_prompts_takes_no_mask(policy, device, flash, cache):
    prompt = prompt_batch(policy, ["1234", "5678"]).to(device)
    keys = row_keys(0, prompt.prompt_index, group_size=1, buffer=0).squeeze(1)
    sampler = ConfidenceSampler(block_length=8, cache=cache, threshold=0.5)
    with evaluating(policy):
        sampler.sample(policy, prompt.prompt_ids, prompt.prompt_mask, completion_length=LENGTH, keys=keys)


def test_a_loss_on_unpadded_prompts_takes_no_mask(policy, device, flash):
    prompt = prompt_batch(policy, ["1234", "5678"]).to(device)
    completions = torch.full((2, LENGTH), 9, device=device)
    masks = draw_masks(torch.arange(2, device=device), length=LENGTH, replicates=2)
    policy.completion_log_probs(prompt.prompt_ids, prompt.prompt_mask, completions, masks).sum().backward()


def test_padding_changes_logits_by_rounding_only(policy, device):
    """Whatever kernels are taken with and without a mask."""
    policy.float()
    found, expected = logits(policy, device, padding=3), logits(policy, device)
    assert_same(found, expected, "logits of a padded batch", within=1e-4)


def test_kernels_agree_in_bfloat16(policy, device):
    """A sanity bound, relative to how far the logits spread; it finds a mask that is ignored."""
    found, unpadded = logits(policy, device, padding=3)[..., 6:20], logits(policy, device)[..., 6:20]
    assert_same(found / unpadded.std(), unpadded / unpadded.std(), "logits of a padded batch", within=0.25)
