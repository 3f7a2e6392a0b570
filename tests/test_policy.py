from dataclasses import replace

import pytest
import torch
from torch import nn

from dmpo_lightning.models.kv_cache import KeyValueCache
from dmpo_lightning.models.loading import load_tokenizer
from dmpo_lightning.policy import Policy, evaluating, full_attention_mask
from helpers import (
    END_OF_TEXT,
    END_OF_TURN,
    MASK,
    NEVER_SAMPLED,
    FixedLogits,
    lora_policy,
    pad_more,
    perturb,
    prompt_batch,
    tiny_model,
    tiny_policy,
)
from small_models import tiny_dream, tiny_illada

LENGTH = 6


def scoring_inputs(policy: Policy, *, replicates: int = 3, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Two prompts of different length, completions of ordinary tokens, masks with at least one True each."""
    generator = torch.Generator().manual_seed(seed)
    prompts = prompt_batch(policy, ["12", "1234"])
    completions = torch.randint(6, 25, (2, LENGTH), generator=generator)
    masks = torch.rand(2, replicates, LENGTH, generator=generator) < 0.5
    masks[..., 2] = True
    return prompts.prompt_ids, prompts.prompt_mask, completions, masks


def naive_log_probs(
    policy: Policy, prompt_ids, prompt_mask, completions, masks, *, temperature: float = 1.0
) -> torch.Tensor:
    """One row, one replicate and one unpadded forward at a time, a full softmax, no bias."""
    result = torch.zeros(masks.shape)
    for row, replicate in ((row, replicate) for row in range(masks.shape[0]) for replicate in range(masks.shape[1])):
        prompt = prompt_ids[row][prompt_mask[row]]
        noisy = [
            MASK if masked else token for masked, token in zip(masks[row, replicate], completions[row], strict=True)
        ]
        logits = policy.model(torch.cat((prompt, torch.tensor(noisy)))[None]).logits[0, len(prompt) :]
        for place in range(LENGTH):
            if masks[row, replicate, place]:
                scores = logits[place] / temperature
                allowed = [token for token in range(32) if token not in NEVER_SAMPLED]
                result[row, replicate, place] = scores[completions[row, place]] - scores[allowed].logsumexp(0)
    return result


def log_probs(policy: Policy, **options) -> torch.Tensor:
    return policy.completion_log_probs(*scoring_inputs(policy), **options)


# Logits and log-probs -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_log_probs_equal_a_full_softmax_row_by_row(temperature):
    policy = tiny_policy()
    expected = naive_log_probs(policy, *scoring_inputs(policy), temperature=temperature)
    torch.testing.assert_close(log_probs(policy, temperature=temperature), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_log_probs_are_zero_where_nothing_is_masked_and_negative_elsewhere():
    policy = tiny_policy()
    masks, found = scoring_inputs(policy)[3], log_probs(policy)
    assert found.dtype == torch.float32
    assert (found[~masks] == 0).all()
    assert (found[masks] < 0).all()


@torch.no_grad()
def test_at_restricts_the_positions_and_leaves_the_rest_masked():
    policy = tiny_policy()
    masks = scoring_inputs(policy)[3]
    at = masks & (torch.arange(LENGTH) == 2)
    expected = torch.where(at, log_probs(policy), 0.0)
    torch.testing.assert_close(log_probs(policy, at=at), expected, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_nothing_asked_for_gives_zeros():
    policy = tiny_policy()
    assert (log_probs(policy, at=torch.zeros(2, 3, LENGTH, dtype=torch.bool)) == 0).all()


@torch.no_grad()
def test_what_a_mask_hides_does_not_influence_the_other_positions():
    policy = tiny_policy()
    prompt_ids, prompt_mask, completions, masks = scoring_inputs(policy)
    masks[...] = torch.tensor([True, True, False, False, False, False])
    changed = completions.clone()
    changed[:, 0] = torch.where(completions[:, 0] == 20, 21, 20)
    before = policy.completion_log_probs(prompt_ids, prompt_mask, completions, masks)[..., 1]
    after = policy.completion_log_probs(prompt_ids, prompt_mask, changed, masks)[..., 1]
    torch.testing.assert_close(before, after, atol=0, rtol=0)


@torch.no_grad()
def test_more_prompt_padding_changes_nothing():
    policy = tiny_policy()
    prompt_ids, prompt_mask, completions, masks = scoring_inputs(policy)
    padded = policy.completion_log_probs(*pad_more(prompt_ids, prompt_mask, 5), completions, masks)
    torch.testing.assert_close(padded, log_probs(policy), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_banned_ids_have_probability_zero_and_the_others_sum_to_one():
    policy = tiny_policy()
    prompt_ids, prompt_mask, _, _ = scoring_inputs(policy)
    ids = torch.cat((prompt_ids, torch.full((2, 1), MASK)), dim=1)
    last = torch.tensor([ids.shape[1] - 1, ids.numel() - 1])
    logits = policy.logits(ids, full_attention_mask(prompt_mask, 1), last)
    probabilities = logits.softmax(-1)
    assert logits.dtype == torch.float32
    assert (probabilities[:, list(NEVER_SAMPLED)] == 0).all()
    others = [token for token in range(32) if token not in NEVER_SAMPLED]
    assert (probabilities[:, others] > 0).all()
    masks = torch.ones(2, 1, 1, dtype=torch.bool)
    by_token = [policy.completion_log_probs(prompt_ids, prompt_mask, torch.full((2, 1), t), masks) for t in range(32)]
    found = torch.stack(by_token).exp().view(32, 2).T
    torch.testing.assert_close(found, probabilities, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_logits_at_positions_are_flat_indices_into_rows_and_length():
    table = torch.arange(4.0)[:, None] * 100 + torch.arange(32.0)
    policy = tiny_policy(model=FixedLogits(table))
    ids, mask = torch.zeros(2, 4, dtype=torch.long), torch.ones(2, 4, dtype=torch.bool)
    found = policy.logits(ids, mask, torch.tensor([[1, 3], [4, 6]]))
    assert found[..., 7].tolist() == [[107, 307], [7, 207]]
    assert (found[..., MASK] == -torch.inf).all()


def test_log_probs_carry_the_gradient_of_the_naive_ones():
    policy = tiny_policy()
    weight = policy.model.model.transformer["blocks"][0].q_proj.weight
    log_probs(policy).sum().backward()
    found, weight.grad = weight.grad, None
    naive_log_probs(policy, *scoring_inputs(policy)).sum().backward()
    assert found.abs().max() > 1e-3
    torch.testing.assert_close(found, weight.grad, atol=1e-4, rtol=1e-4)


# The reference: a frozen copy -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_reference_starts_as_the_policy_and_stays_while_the_policy_moves():
    policy = tiny_policy()
    before = log_probs(policy)
    assert torch.equal(log_probs(policy, reference=True), before)
    perturb(policy.model)
    assert torch.equal(log_probs(policy, reference=True), before)
    assert (log_probs(policy) - before).abs().max() > 0.05


@torch.no_grad()
def test_a_refresh_makes_the_reference_the_policy_as_it_is_now():
    policy = tiny_policy()
    perturb(policy.model, seed=1)
    policy.refresh_reference()
    refreshed = log_probs(policy)
    assert torch.equal(log_probs(policy, reference=True), refreshed)
    perturb(policy.model, seed=2)
    assert torch.equal(log_probs(policy, reference=True), refreshed)
    assert not torch.equal(log_probs(policy), refreshed)


def test_a_refreshed_reference_equals_the_policy_until_a_weight_is_written_or_an_update_is_announced():
    policy = tiny_policy()
    assert not policy.reference_equals_policy()
    policy.refresh_reference()
    assert policy.reference_equals_policy()
    # Nobody announces this.
    perturb(policy.model)
    assert not policy.reference_equals_policy()
    policy.refresh_reference()
    policy.reference.announce_update()
    assert not policy.reference_equals_policy()


def test_the_frozen_copy_takes_no_gradient_and_no_training_mode():
    policy = tiny_policy().train()
    assert policy.model.training
    assert not any(module.training for module in policy.reference.model.modules())
    assert not log_probs(policy, reference=True).requires_grad
    policy.refresh_reference()
    assert not any(parameter.requires_grad for parameter in policy.reference.model.parameters())
    log_probs(policy).sum().backward()
    assert all(parameter.grad is None for parameter in policy.reference.model.parameters())
    assert all(parameter.grad is not None for parameter in policy.model.parameters())


def test_the_names_of_the_reference_are_those_of_the_copy():
    policy = tiny_policy()
    names = policy.reference.parameter_names(policy.model)
    assert sorted(names) == sorted(f"reference.model.{name}" for name, _ in policy.model.named_parameters())


def test_without_a_reference_asking_for_it_is_an_error():
    policy = tiny_policy(with_reference=False)
    assert policy.reference.model is None
    with pytest.raises(ValueError, match="with_reference=True"):
        log_probs(policy, reference=True)


# The reference: adapters off, or a frozen adapter ---------------------------------------------------------------------


@torch.no_grad()
def test_under_lora_the_reference_is_the_base_model():
    policy, base = lora_policy(), tiny_policy()
    assert policy.reference.model is None
    torch.testing.assert_close(log_probs(policy, reference=True), log_probs(base), atol=1e-6, rtol=1e-6)
    assert (log_probs(policy) - log_probs(base)).abs().max() > 0.05


@torch.no_grad()
def test_under_lora_the_reference_stays_while_the_adapters_move():
    policy = lora_policy()
    before = log_probs(policy, reference=True)
    perturb(policy.model)
    assert torch.equal(log_probs(policy, reference=True), before)


@torch.no_grad()
def test_under_lora_a_refresh_copies_the_adapter_as_it_is_now_each_time():
    policy = lora_policy()
    for seed in (1, 2):
        perturb(policy.model, seed=seed)
        policy.refresh_reference()
        refreshed = log_probs(policy)
        assert torch.equal(log_probs(policy, reference=True), refreshed)
        perturb(policy.model, seed=seed + 10)
        assert torch.equal(log_probs(policy, reference=True), refreshed)
        assert (log_probs(policy) - refreshed).abs().max() > 0.05


def trainable_names(policy: Policy) -> list[str]:
    return [name for name, parameter in policy.named_parameters() if parameter.requires_grad]


def test_under_lora_the_trained_adapter_stays_active_and_trainable():
    policy = lora_policy()
    trained = trainable_names(policy)
    assert len(trained) == 2 * 2 * 2
    log_probs(policy, reference=True)
    assert trainable_names(policy) == trained
    policy.refresh_reference()
    assert trainable_names(policy) == trained
    log_probs(policy, reference=True)
    assert trainable_names(policy) == trained
    assert policy.model.active_adapter == "default"


def test_under_lora_no_gradient_flows_into_a_refreshed_reference():
    policy = lora_policy()
    policy.refresh_reference()
    assert not log_probs(policy, reference=True).requires_grad
    log_probs(policy).sum().backward()
    reference = set(policy.reference.parameter_names(policy.model))
    assert len(reference) == 8
    parameters = dict(policy.named_parameters())
    assert all(parameters[name].grad is None and not parameters[name].requires_grad for name in reference)
    assert all(parameters[name].grad is not None for name in trainable_names(policy))


def test_under_lora_a_refresh_between_forward_and_backward_changes_no_gradient():
    gradients = []
    for refresh in (False, True):
        policy = lora_policy()
        loss = log_probs(policy).sum()
        if refresh:
            policy.refresh_reference()
            log_probs(policy, reference=True)
        loss.backward()
        gradients.append([dict(policy.named_parameters())[name].grad for name in trainable_names(policy)])
    torch.testing.assert_close(*gradients, atol=0, rtol=0)


def test_a_refresh_does_not_ask_the_hub_for_the_base_model(monkeypatch):
    policy, asked = lora_policy(), []
    policy.model.peft_config["default"].base_model_name_or_path = "GSAI-ML/LLaDA-8B-Instruct"
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda *args, **_: asked.append(args))
    policy.refresh_reference()
    assert asked == []


# Modes ----------------------------------------------------------------------------------------------------------------


def test_evaluating_restores_the_mode_of_every_submodule():
    policy = lora_policy(dropout=0.5).train()
    frozen_part = policy.model.base_model.model.model.transformer["blocks"][1].eval()
    modes = {name: module.training for name, module in policy.named_modules()}
    assert set(modes.values()) == {True, False}
    with evaluating(policy):
        assert not any(module.training for module in policy.modules())
        assert not torch.is_grad_enabled()
    assert {name: module.training for name, module in policy.named_modules()} == modes
    assert not frozen_part.training
    assert torch.is_grad_enabled()


def test_evaluating_restores_the_modes_after_an_error_too():
    module = nn.Dropout()
    with pytest.raises(KeyError), evaluating(module):
        raise KeyError
    assert module.training


def test_dropout_is_off_while_evaluating_and_on_otherwise():
    policy = lora_policy(dropout=0.5).train()
    torch.manual_seed(0)
    assert not torch.equal(log_probs(policy), log_probs(policy))
    with evaluating(policy):
        assert torch.equal(log_probs(policy), log_probs(policy))
        assert torch.equal(log_probs(policy), log_probs(policy.eval()))


def test_scoring_draws_nothing_from_the_global_generator():
    policy = tiny_policy()
    state = torch.get_rng_state()
    log_probs(policy)
    assert torch.equal(torch.get_rng_state(), state)


# Decoding -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "text", "length"),
    [
        ([9, 15, 16, 10, END_OF_TURN, 17], "<answer>12</answer>", 4),
        ([9, 15, 16, 10, END_OF_TEXT, END_OF_TURN], "<answer>12</answer>", 4),
        ([15, END_OF_TURN, 16, END_OF_TEXT, 17, 18], "1", 1),
        ([END_OF_TEXT, 15, 16, 17, 18, 19], "", 0),
        ([15, 16, 17, 18, 19, 20], "123456", 6),
        ([1, 15, 3, 16, END_OF_TEXT, 17], "12", 4),
    ],
    ids=["end of turn", "end of text", "the first of several", "at once", "no end", "special tokens left out"],
)
def test_a_completion_ends_before_its_first_end_token(ids, text, length):
    policy = tiny_policy(with_reference=False)
    assert policy.decode(torch.tensor([ids])) == [text]
    assert policy.effective_length(torch.tensor([ids])).tolist() == [length]


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([9, 15, 16, END_OF_TURN, END_OF_TEXT, 17], "<answer>12<|eot_id|>"),
        ([1, 15, 3, 16, END_OF_TEXT, 17], "<|startoftext|>1<|start_header_id|>2<|endoftext|>"),
        ([END_OF_TEXT, 15, 16, 17, 18, 19], "<|endoftext|>"),
        ([15, 16, 17, 18, 19, 20], "123456"),
    ],
    ids=["end of turn", "others are kept too", "at once", "no end"],
)
def test_with_special_tokens_the_first_end_token_is_the_last(ids, text):
    assert tiny_policy(with_reference=False).decode(torch.tensor([ids]), special_tokens=True) == [text]


def test_rows_are_decoded_one_by_one():
    policy = tiny_policy(with_reference=False)
    ids = torch.tensor([[15, END_OF_TEXT, 16], [15, 16, 17], [END_OF_TURN, 16, 17]])
    assert policy.decode(ids) == ["1", "123", ""]
    assert policy.effective_length(ids).tolist() == [1, 3, 0]


def test_without_end_tokens_no_completion_ends_early():
    policy = tiny_policy(with_reference=False)
    policy.facts = replace(policy.facts, end_token_ids=())
    assert policy.effective_length(torch.tensor([[0, 2, 3]])).tolist() == [3]


# Caches ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("model", [tiny_model, tiny_illada, tiny_dream])
def test_columns_that_are_computed_again_from_a_cache_are_what_they_were(model):
    """Whichever columns they are; a shifted model (Dream) needs the column before them too."""
    policy = tiny_policy(model=model().eval(), with_reference=False)
    prompts = prompt_batch(policy, ["12", "1234"])
    ids = torch.nn.functional.pad(prompts.prompt_ids, (0, LENGTH), value=MASK)
    mask, total = full_attention_mask(prompts.prompt_mask, LENGTH), ids.shape[1]
    whole = policy.logits(ids, mask, torch.arange(2 * total).view(2, total))
    cache = KeyValueCache(mask)
    policy.logits(
        ids, None, torch.zeros(2, 1, dtype=torch.long) + torch.tensor([[0], [total]]), cache=cache, columns=range(total)
    )
    for columns in (range(total - LENGTH, total), range(total - LENGTH, total - 2), range(total)):
        at = torch.tensor([[0], [total]]) + torch.tensor(list(columns))
        found = policy.logits(ids, None, at, cache=cache, columns=columns)
        torch.testing.assert_close(found, whole[:, columns], atol=1e-5, rtol=1e-5)


# Construction ---------------------------------------------------------------------------------------------------------


def test_the_policy_knows_how_long_its_model_reads():
    assert tiny_policy(with_reference=False).max_length == 64


def test_a_policy_without_a_mask_id_is_an_error():
    tokenizer = load_tokenizer("sudoku_tiny")
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="mask_token_id"):
        Policy(FixedLogits(torch.zeros(32), mask_token_id=None), tokenizer)


def test_the_mask_id_can_be_overridden():
    policy = tiny_policy(mask_token_id=31)
    assert policy.facts.mask_token_id == 31
    assert 31 in policy.facts.banned_token_ids


def test_the_attention_mask_covers_the_completion_and_not_the_padding():
    mask = full_attention_mask(torch.tensor([[False, True], [True, True]]), 2)
    assert mask.tolist() == [[False, True, True, True], [True, True, True, True]]
