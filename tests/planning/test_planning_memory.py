"""Sharding and the arithmetic of memory: constants worked out by hand."""

from dataclasses import replace

import pytest
from planning_runs import ROWS, predicted, small_config, small_settings

from dmpo_lightning.models.lora import LoRA
from dmpo_lightning.objectives import MaskedPass, ObjectiveFootprint, TrajectoryEstimator
from dmpo_lightning.planning import Precision, Sharding, sharding_of
from dmpo_lightning.planning.activations import Head
from dmpo_lightning.planning.precision import NF4_BYTES
from dmpo_lightning.samplers import ConfidenceSampler, RandomOrderSampler

CONFIG = small_config("small")
COUNT = 1_377_408
"""Its parameters: 2 x 2048 x 128 + 4 x (4 x 128 x 128 + 3 x 128 x 384 + 2 x 128) + 128."""


def resident(sharding: Sharding, **changes):
    settings = replace(small_settings(reference_copy=True), on_cpu=False, **changes)
    return predicted(CONFIG, settings, sharding).resident


def shares(strategy, *, devices=4, nodes=1) -> tuple[int, int, int]:
    sharding = sharding_of(strategy, devices=devices, nodes=nodes)
    return sharding.weights, sharding.gradients, sharding.optimizer


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("ddp", (1, 1, 1)),
        ("ddp_find_unused_parameters_true", (1, 1, 1)),
        ("auto", (1, 1, 1)),
        ("fsdp", (8, 8, 8)),
        ({"class_path": "lightning.pytorch.strategies.FSDPStrategy", "init_args": None}, (8, 8, 8)),
        ({"class_path": "FSDPStrategy", "init_args": {"sharding_strategy": "SHARD_GRAD_OP"}}, (1, 8, 8)),
        ({"class_path": "FSDPStrategy", "init_args": {"sharding_strategy": "NO_SHARD"}}, (1, 1, 1)),
        ({"class_path": "FSDPStrategy", "init_args": {"sharding_strategy": "HYBRID_SHARD"}}, (4, 4, 4)),
        # Lightning's auto is the number of machines.
        ({"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}, (2, 2, 2)),
        ({"class_path": "ModelParallelStrategy", "init_args": {"data_parallel_size": 8}}, (8, 8, 8)),
        ("deepspeed", (1, 8, 8)),
        ("deepspeed_stage_1", (1, 1, 8)),
        ("deepspeed_stage_2", (1, 8, 8)),
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


def test_full_fine_tuning_holds_weights_reference_gradients_and_two_states():
    held = resident(Sharding("single device"))
    assert held == {
        "weights": 4 * COUNT,
        "reference": 4 * COUNT,
        "gradients": 4 * COUNT,
        "optimizer": 8 * COUNT,
        "rollouts": 0,
    }


def test_ddp_holds_gradients_twice_because_of_its_buckets():
    assert resident(sharding_of("ddp", devices=2))["gradients"] == 2 * 4 * COUNT
    views = {"class_path": "DDPStrategy", "init_args": {"gradient_as_bucket_view": True}}
    assert resident(sharding_of(views, devices=2))["gradients"] == 4 * COUNT


def test_fsdp_divides_everything_that_stays():
    alone, sharded = resident(Sharding("single device")), resident(sharding_of("fsdp", devices=4))
    assert sharded == {name: size / 4 for name, size in alone.items()}


def test_fsdp_gathers_two_blocks_and_what_is_outside_them():
    block, outside = 4 * 128 * 128 + 3 * 128 * 384 + 2 * 128, 2 * 2048 * 128 + 128
    memory = predicted(CONFIG, small_settings(), sharding_of("fsdp", devices=4))
    assert memory.phases["training"].parts["gathered weights"] == 4 * (outside + 3 * block)
    lora = predicted(CONFIG, small_settings(adapter=LoRA(r=8)), sharding_of("fsdp", devices=4))
    assert lora.phases["training"].parts["gathered weights"] == 4 * (outside + 2 * block)


def test_weights_gathered_for_generation_are_whole_and_so_is_the_reference():
    work = replace(small_settings().workload, sampling=ConfidenceSampler().footprint(8))
    options = {"gather_for_generation": True, "workload": work}
    sharding = sharding_of("fsdp2", devices=4)
    memory = predicted(CONFIG, small_settings(reference_copy=True, **options), sharding)
    assert memory.phases["sampling"].parts["gathered weights"] == 2 * 4 * COUNT
    lora = predicted(CONFIG, small_settings(adapter=LoRA(r=8), **options), sharding)
    adapter = 8 * 4 * (4 * (128 + 128) + 3 * (128 + 384))
    assert lora.phases["sampling"].parts["gathered weights"] == 4 * (COUNT + adapter)


def test_a_merged_copy_takes_the_room_of_the_adapted_layers():
    memory = predicted(CONFIG, small_settings(adapter=LoRA(r=8), sample_merged=True))
    assert memory.resident["merged weights"] == 4 * 4 * (4 * 128 * 128 + 3 * 128 * 384)


def test_deepspeed_keeps_float32_master_weights_beside_half_precision():
    sharding = sharding_of("deepspeed_stage_2", devices=4)
    held = resident(sharding, dtype="bfloat16", precision="bf16-true")
    assert held["weights"] == 2 * COUNT
    assert held["gradients"] == 2 * COUNT / 4
    assert held["optimizer"] == 12 * COUNT / 4


def test_offloaded_optimizer_states_leave_the_gpu():
    memory = predicted(CONFIG, small_settings(), sharding_of("deepspeed_stage_3_offload", devices=4))
    assert memory.resident["optimizer"] == 0
    assert memory.phases["optimizer step"].peak == 0


def test_an_adapter_needs_no_reference_copy_until_it_is_refreshed():
    adapter = LoRA(r=8)
    count = 4 * 8 * (4 * (128 + 128) + 3 * (128 + 384))
    settings = small_settings(adapter=adapter, dtype="bfloat16")
    held = predicted(CONFIG, settings).resident
    assert held["weights"] == 2 * COUNT + 4 * count
    assert held["reference"] == 0
    assert (held["gradients"], held["optimizer"]) == (4 * count, 8 * count)
    refreshed = predicted(CONFIG, replace(settings, reference_refreshed=True)).resident
    assert refreshed["reference"] == 4 * count


def test_four_bits_hold_for_the_blocks_linear_layers_alone():
    adapter, linear = LoRA(r=8), 4 * (4 * 128 * 128 + 3 * 128 * 384)
    count = 4 * 8 * (4 * (128 + 128) + 3 * (128 + 384))
    settings = small_settings(adapter=adapter, dtype="bfloat16", quantization="nf4", precision="bf16-true")
    held = predicted(CONFIG, settings).resident
    assert held["weights"] == linear * NF4_BYTES + 2 * (COUNT - linear) + 2 * count
    assert 0.515 < NF4_BYTES < 0.517


@pytest.mark.parametrize(
    ("optimizer", "momentum", "states"),
    [
        ("torch.optim.AdamW", 0, 8),
        ("torch.optim.SGD", 0, 0),
        ("torch.optim.SGD", 0.9, 4),
        ("bnb.optim.AdamW8bit", 0, 2),
    ],
)
def test_optimizers_keep_as_many_states_as_they_do(optimizer, momentum, states):
    settings = small_settings(optimizer=optimizer, momentum=momentum)
    assert predicted(CONFIG, settings).resident["optimizer"] == states * COUNT


def test_half_of_the_completion_and_half_a_token_need_logits():
    training = MaskedPass.over(256, replicates=4)
    assert training == MaskedPass(maskings=4, positions=4 * 128.5)
    work = replace(small_settings().workload, completion_length=256, objective=ObjectiveFootprint(training))
    assert work.training_positions == ROWS * 4 * 128.5


def test_steps_of_a_trajectory_need_logits_where_they_reveal_a_token():
    sampler = RandomOrderSampler(denoising_steps=64)
    scored = TrajectoryEstimator(4).footprint(completion_length=256, sampler=sampler)
    assert scored == MaskedPass(maskings=4, positions=256 * 4 / 64, forwards=64 // 4)


def test_the_head_costs_the_same_whatever_the_vocabulary():
    precision = Precision.of(dtype="bfloat16", trainer=None)
    small, large = (Head(vocab_size, 4096, precision) for vocab_size in (32000, 126464))
    assert small.forward(4112) == large.forward(4112) < 4 * 4112 * 32000 / 4
    assert small.backward(4112) == large.backward(4112) == 4112 * 4096 * 6


def test_doubling_the_micro_batch_doubles_activations_and_not_the_head():
    one = small_settings()
    schedule = replace(one.workload.schedule, micro_batch_size=2 * ROWS)
    two = replace(one, workload=replace(one.workload, schedule=schedule))
    parts = [predicted(CONFIG, settings).phases["training"].parts for settings in (one, two)]
    heads = [part.pop("head") for part in parts]
    assert parts[1] == {name: 2 * size for name, size in parts[0].items()}
    assert heads[1] < 2 * heads[0]


@pytest.mark.parametrize(
    ("trainer", "weight", "compute", "adapter"),
    [(None, 2, 2, 4), ("bf16-mixed", 2, 2, 4), ("bf16-true", 2, 2, 2), ("64-true", 8, 8, 8)],
)
def test_precision_of_a_bfloat16_checkpoint(trainer, weight, compute, adapter):
    precision = Precision.of(dtype="bfloat16", trainer=trainer)
    assert (precision.weight, precision.compute, precision.adapter) == (weight, compute, adapter)


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match=r"`dtype` must be one of .* got 'int3'"):
        Precision.of(dtype="int3", trainer=None)
