"""Sharding, and what stays on a rank: constants worked out by hand."""

import functools

import pytest
import torch
from planning_runs import planned, small_config

from dmpo_lightning.models.lora import LoRA
from dmpo_lightning.planning.network import NF4_BYTES
from dmpo_lightning.planning.strategy import Sharding, sharding_of

CONFIG = small_config("small")
COUNT = 1_377_408
"""Its parameters: 2 x 2048 x 128 + 4 x (4 x 128 x 128 + 3 x 128 x 384 + 2 x 128) + 128."""
LINEAR = 4 * (4 * 128 * 128 + 3 * 128 * 384)
ADAPTER = 4 * 8 * (4 * (128 + 128) + 3 * (128 + 384))
"""Numbers of an adapter of rank 8 on all linear layers of the four layers."""


def resident(sharding: Sharding | None = None, **changes) -> dict[str, float]:
    held = planned(CONFIG, sharding=sharding, **changes).resident
    return {name: size for name, size in held.items() if name not in ("rollouts", "merged weights")}


def shares(strategy, *, devices=4, nodes=1) -> tuple[int, int, int]:
    sharding = sharding_of(strategy, devices=devices, nodes=nodes)
    return sharding.weights, sharding.gradients, sharding.optimizer


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("ddp", (1, 1, 1)),
        ("auto", (1, 1, 1)),
        ("fsdp", (8, 8, 8)),
        ({"class_path": "lightning.pytorch.strategies.FSDPStrategy", "init_args": None}, (8, 8, 8)),
        ({"class_path": "FSDPStrategy", "init_args": {"sharding_strategy": "SHARD_GRAD_OP"}}, (1, 8, 8)),
        ({"class_path": "FSDPStrategy", "init_args": {"sharding_strategy": "NO_SHARD"}}, (1, 1, 1)),
        ({"class_path": "FSDPStrategy", "init_args": {"sharding_strategy": "HYBRID_SHARD"}}, (4, 4, 4)),
        # Lightning's auto is the number of machines.
        ({"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}, (2, 2, 2)),
        ({"class_path": "ModelParallelStrategy", "init_args": {"data_parallel_size": 8}}, (8, 8, 8)),
        ({"class_path": "dmpo_lightning.distributed.strategies.FSDP2Strategy", "init_args": {}}, (8, 8, 8)),
        ("deepspeed", (1, 8, 8)),
        ("deepspeed_stage_1", (1, 1, 8)),
        ("deepspeed_stage_3", (8, 8, 8)),
        ({"class_path": "DeepSpeedStrategy", "init_args": {"stage": 3}}, (8, 8, 8)),
    ],
)
def test_strategies_divide_weights_gradients_and_states(strategy, expected):
    assert shares(strategy, devices=4, nodes=2) == expected


@pytest.mark.parametrize("strategy", ["fsdp", "ddp", "auto", {"class_path": "ModelParallelStrategy"}])
def test_one_rank_divides_nothing(strategy):
    assert shares(strategy, devices=1) == (1, 1, 1)


def test_an_unknown_strategy_is_refused_by_name():
    with pytest.raises(ValueError, match=r"knows the strategies .* got 'horovod'"):
        sharding_of("horovod", devices=2)


# Steps of the optimizer are counted too, each in four bytes.
STEPS = 4 * 39


def test_full_fine_tuning_holds_weights_reference_gradients_and_two_states():
    one = 4 * COUNT
    assert resident() == {"weights": one, "reference": one, "gradients": one, "optimizer": 2 * one + STEPS}


def test_ddp_holds_gradients_twice_because_of_its_buckets():
    assert resident(sharding_of("ddp", devices=2))["gradients"] == 2 * 4 * COUNT
    views = {"class_path": "DDPStrategy", "init_args": {"gradient_as_bucket_view": True}}
    assert not sharding_of(views, devices=2).bucketed


def gathered(phase: str, strategy: str, **changes) -> float:
    """What a phase takes beside what it takes where nothing is divided."""
    alone, divided = (planned(CONFIG, sharding=each, **changes) for each in (None, sharding_of(strategy, devices=4)))
    return divided.phases[phase].peak - alone.phases[phase].peak


def test_fsdp_divides_everything_that_stays_and_gathers_two_layers_and_what_is_outside_them():
    layer, outside = 4 * 128 * 128 + 3 * 128 * 384 + 2 * 128, 2 * 2048 * 128 + 128
    held = resident(sharding_of("fsdp", devices=4))
    assert held["weights"] == held["reference"] == COUNT
    assert gathered("training", "fsdp") == 4 * (outside + 3 * layer)
    own = 8 * (128 + 128)
    assert gathered("training", "fsdp", adapter=LoRA(r=8, targets=["q_proj"])) == 4 * (outside + 2 * (layer + own))


def test_weights_gathered_for_generation_are_whole_and_so_is_the_reference():
    assert gathered("sampling", "fsdp2", gather_for_generation=True) == 2 * 4 * COUNT


def test_a_merged_copy_takes_the_room_of_the_adapted_layers():
    assert planned(CONFIG, adapter=LoRA(r=8), sample_merged=True).resident["merged weights"] == 4 * LINEAR


def test_deepspeed_keeps_float32_master_weights_beside_half_precision():
    held = resident(sharding_of("deepspeed_stage_2", devices=4), dtype="bfloat16", precision="bf16-true")
    assert (held["weights"], held["gradients"]) == (2 * COUNT, 2 * COUNT / 4)
    assert held["optimizer"] == pytest.approx(12 * COUNT / 4, rel=1e-3)


def test_offloaded_optimizer_states_leave_the_gpu():
    memory = planned(CONFIG, sharding=sharding_of("deepspeed_stage_3_offload", devices=4))
    assert memory.resident["optimizer"] == memory.phases["optimizer step"].peak == 0


def test_an_adapter_needs_no_reference_copy_until_it_is_refreshed():
    held = resident(adapter=LoRA(r=8), dtype="bfloat16")
    assert held["weights"] == 2 * COUNT + 4 * ADAPTER
    assert (held["reference"], held["gradients"]) == (0, 4 * ADAPTER)
    assert resident(adapter=LoRA(r=8), reference_refresh_interval=1)["reference"] == 4 * ADAPTER


def test_four_bits_hold_for_the_layers_linear_weights_alone_and_the_rest_is_as_the_trainer_says():
    changes = {"dtype": "bfloat16", "quantization": "nf4", "precision": "bf16-true"}
    weights = resident(adapter=LoRA(r=8), **changes)["weights"]
    assert weights == pytest.approx(LINEAR * NF4_BYTES + 2 * (COUNT - LINEAR) + 2 * ADAPTER, rel=1e-5)
    assert 0.515 < NF4_BYTES < 0.517


def eight_bits(parameters):
    optimizer = torch.optim.AdamW(parameters)
    optimizer.__class__ = type("AdamW8bit", (torch.optim.AdamW,), {})
    return optimizer


@pytest.mark.parametrize(
    ("optimizer", "states"),
    [
        (functools.partial(torch.optim.SGD, lr=0.1), 0),
        (functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9), 4),
        (eight_bits, 2),
    ],
)
def test_optimizers_keep_as_many_states_as_they_do(optimizer, states):
    assert resident(optimizer=optimizer)["optimizer"] == states * COUNT


def test_activations_grow_with_the_micro_batch():
    four, eight, sixteen = (planned(CONFIG, rows=rows).phases["training"].peak for rows in (4, 8, 16))
    assert sixteen - eight == pytest.approx(2 * (eight - four), rel=0.01)
