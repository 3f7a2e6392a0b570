"""One device under the strategies of many: DDP, FSDP2 and FSDP1 train as a single device does."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from dmpo_lightning.distributed.sharding import whole_weights
from dmpo_lightning.distributed.strategies import FSDP1Strategy, FSDP2Strategy
from gpu.runs import assert_same, assert_same_run, fit, small_lora, small_module, trained

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_rank")]
STRATEGIES = {"DDP": DDPStrategy, "FSDP2": FSDP2Strategy}
WEIGHTS = {"full": lambda: {}, "LoRA": lambda: {"adapter": small_lora(dropout=0.0)}}


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_one_rank_trains_as_a_single_device(device, tmp_path, name, weights):
    single = small_module(**WEIGHTS[weights]())
    _, expected = fit(single, device, tmp_path)
    dmpo = small_module(**WEIGHTS[weights]())
    _, found = fit(dmpo, device, tmp_path, strategy=STRATEGIES[name]())
    assert_same_run(found, expected, f"{name} and a single device", within=1e-5)
    whole = whole_weights(dmpo.policy.model)
    for parameter, value in trained(single.policy.model).items():
        assert_same(whole[parameter], value, f"weight {parameter} of {name}", within=1e-4)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_half_precision_is_finite(device, tmp_path, name, precision):
    flags = {"precision": precision, "gradient_clip_val": 0.5}
    fit(small_module(), device, tmp_path, strategy=STRATEGIES[name](), **flags)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_fsdp2_gathers_all_weights_for_sampling(device, tmp_path, weights):
    runs = [
        fit(
            small_module(gather_for_generation=gather, **WEIGHTS[weights]()), device, tmp_path, strategy=FSDP2Strategy()
        )[1]
        for gather in (False, True)
    ]
    assert_same_run(*runs[::-1], "weights gathered once and in each forward", within=1e-5)


@pytest.mark.parametrize("distributed", [True, False], ids=["folder", "file"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_fsdp2_resumes_where_it_stopped(device, tmp_path, weights, distributed):
    saves = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    flags = {"steps": 6, "strategy": FSDP2Strategy(save_distributed_checkpoint=distributed)}
    _, expected = fit(
        small_module(**WEIGHTS[weights]()), device, tmp_path, callbacks=[saves], enable_checkpointing=True, **flags
    )
    flags["strategy"] = FSDP2Strategy(save_distributed_checkpoint=distributed)
    _, found = fit(small_module(**WEIGHTS[weights]()), device, tmp_path, ckpt_path=tmp_path / "step=3.ckpt", **flags)
    expected.losses, expected.completions = expected.losses[3:], expected.completions[3:]
    assert_same_run(found, expected, "resumed and uninterrupted", within=1e-6)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("offload", [False, True], ids=["on the device", "offloaded"])
def test_fsdp1_trains_as_a_single_device(device, tmp_path, weights, offload):
    if device.type != "cuda":
        pytest.skip("FSDP1 refuses processors")
    _, expected = fit(small_module(**WEIGHTS[weights]()), device, tmp_path)
    dmpo = small_module(**WEIGHTS[weights]())
    _, found = fit(dmpo, device, tmp_path, strategy=FSDP1Strategy(cpu_offload=offload))
    assert_same_run(found, expected, "FSDP1 and a single device", within=1e-5)
    if offload:
        places = {parameter.device.type for parameter in dmpo.policy.parameters()}
        assert places == {"cpu"}, f"weights lie on {places}"


def test_the_process_group_is_that_of_the_device(device, tmp_path):
    run, _ = fit(small_module(), device, tmp_path, steps=1, strategy=DDPStrategy())
    assert torch.distributed.get_backend() == {"cuda": "nccl", "cpu": "gloo"}[device.type]
    assert run.strategy.root_device.type == device.type
