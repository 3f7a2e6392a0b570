"""On the device too, a resumed run equals the uninterrupted one bit for bit."""

import pytest
import torch
from dmpo_runs import weights
from lightning.pytorch.callbacks import ModelCheckpoint

from dmpo_lightning import ConfidenceSampler
from gpu.runs import Recorded, assert_same, assert_same_run, fit, small_lora, small_module, trained

pytestmark = pytest.mark.gpu
STEPS, MID_BUFFER = 10, 3
MODULES = {
    "LoRA with dropout": lambda: small_module(adapter=small_lora(dropout=0.3), reference_refresh_interval=1),
    "full": small_module,
    "drawn by confidence": lambda: small_module(
        adapter=small_lora(dropout=0.3), sampler=ConfidenceSampler(denoising_steps=4)
    ),
}


def rest_of(record: Recorded, start: int) -> Recorded:
    rest = Recorded()
    rest.losses, rest.completions = record.losses[start:], record.completions[start:]
    return rest


@pytest.mark.parametrize("name", ["LoRA with dropout", "full"])
def test_a_run_repeats_itself(device, tmp_path, name):
    """If it does not, a resumed run cannot be expected to."""
    runs = [fit(MODULES[name](), device, tmp_path)[1] for _ in range(2)]
    assert_same_run(*runs, "the second and the first run")


@pytest.mark.parametrize(
    ("name", "precision"), [*((name, "32-true") for name in MODULES), ("LoRA with dropout", "bf16-mixed")]
)
def test_resumed_equals_uninterrupted(device, tmp_path, name, precision):
    whole, resumed = MODULES[name](), MODULES[name]()
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=MID_BUFFER, save_top_k=-1)
    flags = {"steps": STEPS, "precision": precision}
    _, expected = fit(whole, device, tmp_path, callbacks=[saves], enable_checkpointing=True, **flags)
    torch.randn(3, device=device)  # a new process would stand elsewhere too
    checkpoint = tmp_path / f"step={MID_BUFFER}.ckpt"
    _, found = fit(resumed, device, tmp_path, ckpt_path=checkpoint, weights_only=True, **flags)
    assert found.prompts == expected.prompts[MID_BUFFER:]
    assert_same_run(found, rest_of(expected, MID_BUFFER), f"resumed at step {MID_BUFFER} and uninterrupted")
    own = trained(resumed)
    for parameter, value in trained(whole).items():
        assert_same(own[parameter], value, f"weight {parameter}")
    assert len(weights(resumed)) == len(weights(whole))


def test_the_generator_of_the_device_is_saved(device, tmp_path):
    if device.type != "cuda":
        pytest.skip("only a GPU has a generator beside the CPU's")
    run, _ = fit(MODULES["LoRA with dropout"](), device, tmp_path, steps=1)
    run.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["dmpo"]["ranks"][0]["generators"]
    assert "cuda" in saved, f"generators in the checkpoint: {sorted(saved)}"
    assert_same(saved["cuda"], torch.cuda.get_rng_state(), "state of the GPU's generator")
