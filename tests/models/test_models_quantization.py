"""QLoRA on the CPU: a 4-bit base under trainable adapters."""

from functools import partial

import pytest
import torch
from dmpo_runs import Recorder, loader, module, trainer

from dmpo_lightning.models.backbone import Backbone
from dmpo_lightning.models.loading import load_model
from dmpo_lightning.models.lora import LoRA
from dmpo_lightning.policy import evaluating
from helpers import perturb, prompt_batch, tiny_model, tiny_policy
from small_models import tiny_dream, tiny_illada, tiny_sdar

bitsandbytes = pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes: the `quantization` extra")
WIDE = {"d_model": 64, "mlp_hidden_size": 128, "initializer_range": 0.1}
"""NF4 works in blocks of 64 weights."""


def test_quantization_without_an_adapter_is_an_error():
    with pytest.raises(ValueError, match=r"`quantization` freezes the model.*set `adapter`"):
        Backbone("sudoku_tiny", adapter=None, quantization="nf4").build()


@pytest.fixture(params=["LLaDA", "iLLaDA", "Dream", "SDAR"])
def folder(request, tmp_path):
    if request.param == "LLaDA":
        tiny_model(**WIDE).to(torch.bfloat16).save_pretrained(tmp_path)
    else:
        shape = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1}
        build = {"Dream": tiny_dream, "iLLaDA": tiny_illada, "SDAR": partial(tiny_sdar, head_dim=16)}[request.param]
        build(**shape).to(torch.bfloat16).save_pretrained(tmp_path)
    return str(tmp_path)


def test_the_linears_of_the_blocks_are_four_bit_and_the_head_is_not(folder):
    model = load_model(folder, quantization="nf4")
    linears = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    four_bit = {name for name, m in linears.items() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    head = next(name for name, m in linears.items() if m is model.get_output_embeddings())
    assert len(linears) == 2 * 7 + 1
    assert four_bit == set(linears) - {head}
    assert {linears[name].weight.quant_type for name in four_bit} == {"nf4"}
    assert all(linears[name].weight.dtype == torch.uint8 for name in four_bit)
    assert linears[head].weight.is_floating_point()
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_four_bits_change_the_logits_a_little_and_not_more(folder):
    ids = torch.tensor([[3, 9, 14, 5, 20, 21]])
    with torch.no_grad():
        whole = load_model(folder, dtype="float32").eval()(ids).logits
        quantised = load_model(folder, quantization="nf4").eval()(ids).logits.float()
    assert not torch.equal(whole, quantised)
    assert torch.nn.functional.cosine_similarity(whole.flatten(), quantised.flatten(), dim=0) > 0.9


def test_lora_on_four_bits_adapts_the_seven_linears(folder):
    adapted = Backbone(folder, adapter=LoRA(r=2), quantization="nf4").build()
    plain = Backbone(folder, adapter=LoRA(r=2)).build()
    names = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert names == [name for name, p in plain.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 7 * 2


def test_gradient_checkpointing_gives_the_same_gradients(folder):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        network = Backbone(folder, adapter=LoRA(r=2), quantization="nf4", gradient_checkpointing=checkpointing).build()
        policy = tiny_policy(model=network.train())
        prompts = prompt_batch(policy, ["12"])
        masks = torch.ones(1, 1, 4, dtype=torch.bool)
        completion = torch.tensor([[6, 7, 8, 9]])
        torch.manual_seed(1)
        policy.completion_log_probs(prompts.prompt_ids, prompts.prompt_mask, completion, masks).sum().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.requires_grad})
    plain, checkpointed = gradients
    assert any(gradient.abs().sum() > 0 for gradient in plain.values())
    torch.testing.assert_close(checkpointed, plain, atol=1e-6, rtol=1e-4)


def score(policy) -> torch.Tensor:
    prompts = prompt_batch(policy, ["12"])
    masks = torch.ones(1, 1, 4, dtype=torch.bool)
    completion = torch.tensor([[6, 7, 8, 9]])
    return policy.completion_log_probs(prompts.prompt_ids, prompts.prompt_mask, completion, masks)


def gradient(policy) -> torch.Tensor:
    policy.zero_grad()
    score(policy.train()).sum().backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad])


@pytest.fixture
def four_bit_policy(folder):
    network = Backbone(folder, adapter=LoRA(r=2, dropout=0.0), quantization="nf4").build()
    perturb(network, 0.02)
    return tiny_policy(model=network)


def test_scoring_in_between_changes_no_gradient(four_bit_policy):
    """bitsandbytes repacks 4-bit weights for inference on some CPUs; training after that gave wrong gradients."""
    before = gradient(four_bit_policy)
    with evaluating(four_bit_policy):
        score(four_bit_policy)
    assert torch.equal(gradient(four_bit_policy), before)


def test_gradients_are_those_of_the_dequantised_base(folder, four_bit_policy):
    whole = Backbone(folder, adapter=LoRA(r=2, dropout=0.0), dtype="float32").build()
    modules = dict(whole.named_modules())
    perturb(whole, 0.02)
    with torch.no_grad():
        for name, module in four_bit_policy.model.named_modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit) and not hasattr(module, "base_layer"):
                weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                modules[name].weight.copy_(weight.float())
    expected, found = gradient(tiny_policy(model=whole)), gradient(four_bit_policy)
    assert torch.nn.functional.cosine_similarity(expected, found, dim=0) > 0.99


@pytest.fixture
def qlora():
    return lambda: module(random_weights=False, quantization="nf4", adapter=LoRA(r=2, dropout=0.0), micro_batch_size=8)


def test_a_run_of_dmpo_trains_the_adapters_and_nothing_else(tmp_path, qlora):
    dmpo, record = qlora(), Recorder()
    frozen = {name: p.detach().clone() for name, p in dmpo.policy.named_parameters() if not p.requires_grad}
    trainable = {name: p.detach().clone() for name, p in dmpo.policy.named_parameters() if p.requires_grad}
    run = trainer(tmp_path, max_steps=2, callbacks=[record])
    run.fit(dmpo, loader())
    now = dict(dmpo.policy.named_parameters())
    assert all(torch.isfinite(torch.tensor(record.losses)))
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    assert all(not torch.equal(now[name], value) for name, value in trainable.items() if ".lora_B." in name)

    run.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == {f"policy.{name}" for name in trainable}


def test_a_resumed_run_of_qlora_equals_the_uninterrupted_one(tmp_path, qlora):
    whole = qlora()
    trainer(tmp_path, max_steps=3).fit(whole, loader())
    first = qlora()
    run = trainer(tmp_path, max_steps=1)
    run.fit(first, loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    resumed = qlora()
    trainer(tmp_path, max_steps=3).fit(resumed, loader(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    for (name, value), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(value, other), name


def test_under_qlora_the_reference_is_the_quantised_base(qlora):
    policy = qlora().policy
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".lora_B." in name:
                parameter.fill_(0.1)
    prompts = prompt_batch(policy, ["0400020000200040"])
    places = torch.tensor([0, 1])
    base = load_model("sudoku_tiny", quantization="nf4").eval()
    with evaluating(policy):
        reference = policy.logits(prompts.prompt_ids, prompts.prompt_mask, places, reference=True)
        current = policy.logits(prompts.prompt_ids, prompts.prompt_mask, places)
        expected = tiny_policy(model=base, with_reference=False).logits(prompts.prompt_ids, prompts.prompt_mask, places)
    assert torch.equal(reference, expected)
    assert not torch.equal(reference, current)
