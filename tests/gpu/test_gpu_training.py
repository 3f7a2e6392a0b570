"""Training through the Trainer: every precision with every kind of weights, and float32 as on the CPU."""

import shutil

import jaxtyping
import pytest
import torch

from dmpo_lightning import WDCE, RandomOrderSampler
from gpu.runs import assert_finite, assert_same_run, fit, small_lora, small_module, trained

pytestmark = pytest.mark.gpu

WEIGHTS = {
    "full": lambda: {},
    "LoRA": lambda: {"adapter": small_lora()},
    "QLoRA": lambda: {"adapter": small_lora(), "quantization": "nf4"},
}
PRECISIONS = ["32-true", "bf16-true", "bf16-mixed"]


def options_of(weights: str) -> dict:
    if weights == "QLoRA":
        pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes: the `quantization` extra")
        pytest.importorskip("accelerate", reason="transformers loads 4-bit weights with accelerate")
    return WEIGHTS[weights]()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_run_is_finite_and_moves_what_it_trains(device, tmp_path, weights, precision):
    dmpo = small_module(**options_of(weights))
    before = trained(dmpo)
    frozen = {name: p.detach().cpu().clone() for name, p in dmpo.named_parameters() if not p.requires_grad}
    _, record = fit(dmpo, device, tmp_path, precision=precision)
    after = trained(dmpo)
    assert_finite([float(value.double().sum()) for value in after.values()], "sums of trained weights")
    still = [name for name in before if torch.equal(after[name].to(before[name].dtype), before[name])]
    assert not still, f"{len(still)} of {len(before)} trained tensors did not move: {still[:5]}"
    now = {name: value.detach().cpu() for name, value in dmpo.named_parameters() if name in frozen}
    wrong = [name for name in frozen if not torch.equal(now[name], frozen[name].to(now[name].dtype))]
    if weights != "QLoRA" or device.type == "cpu":  # 4-bit weights may be packed once they are on a GPU
        assert not wrong, f"{len(wrong)} of {len(frozen)} frozen tensors moved: {wrong[:5]}"
    assert_finite(record.gradient_norms, "gradient norms")
    assert min(record.gradient_norms) > 0, f"gradient norms by step: {record.gradient_norms}"


@pytest.mark.parametrize("weights", ["full", "LoRA"])
def test_float32_losses_are_those_of_the_cpu(device, tmp_path, weights):
    """Where this runs on the CPU, it is compared with float64, which shows that nothing hangs on rounding."""
    options = {} if weights == "full" else {"adapter": small_lora(dropout=0.0)}
    _, expected = fit(small_module(**options), torch.device("cpu"), tmp_path)
    precision = "32-true" if device.type == "cuda" else "64-true"
    _, found = fit(small_module(**options), device, tmp_path, precision=precision)
    assert_same_run(found, expected, "this device and the CPU", within=1e-4)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("weights", ["full", "LoRA"])
def test_gradient_checkpointing_changes_no_loss(device, tmp_path, weights, precision):
    """LoRA's dropout is drawn again for the backward pass."""
    runs = [
        fit(small_module(gradient_checkpointing=on, **WEIGHTS[weights]()), device, tmp_path, precision=precision)[1]
        for on in (False, True)
    ]
    assert_same_run(*runs[::-1], "checkpointing on and off", within=1e-6 if precision == "32-true" else 1e-3)


def compiler_is_missing(device: torch.device) -> str:
    if shutil.which("g++") is None and shutil.which("gcc") is None:
        return "torch.compile needs a compiler, here is neither g++ nor gcc"
    from torch.utils._triton import has_triton

    return "torch.compile needs triton on a GPU" if device.type == "cuda" and not has_triton() else ""


def test_compiled_blocks_give_the_losses_of_plain_ones(device, tmp_path, monkeypatch):
    if missing := compiler_is_missing(device):
        pytest.skip(missing)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # its checks cannot be compiled
    options = {  # few kinds of forwards: each is compiled anew
        "objective": WDCE(reward_temperature=0.1, replicates=2, baseline="none"),
        "sampler": RandomOrderSampler(denoising_steps=1),
        "reference_refresh_interval": 1,
    }
    runs = [fit(small_module(compile_blocks=on, **options), device, tmp_path, steps=3)[1] for on in (False, True)]
    torch._dynamo.reset()
    assert_same_run(*runs[::-1], "compiled and plain blocks", within=1e-3)
