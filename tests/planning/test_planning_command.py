"""``dmpo-lightning plan``, as a user calls it."""

import json
import os
import subprocess
import sys

import pytest

from dmpo_lightning.__main__ import main
from dmpo_lightning.commands.arguments import resolve_config, shipped_configs
from dmpo_lightning.commands.plan import make_plan, merged_configuration
from dmpo_lightning.planning.strategy import sharding_of

RECIPE = """
trainer: {accelerator: gpu, devices: 8, strategy: ddp, precision: bf16-true, accumulate_grad_batches: 2}
model:
  class_path: dmpo_lightning.DMPO
  init_args:
    model: GSAI-ML/LLaDA-8B-Instruct
    completion_length: 256
    group_size: 16
    micro_batch_size: 8
    num_iterations: 8
    sampler:
      class_path: dmpo_lightning.ConfidenceSampler
      init_args: {temperature: 0.2, block_length: 32, denoising_steps: 128}
    objective:
      class_path: dmpo_lightning.WDCE
      init_args: {reward_temperature: 0.04}
data:
  class_path: dmpo_lightning.SudokuDataModule
  init_args: {prompts_per_buffer: 1, max_prompt_length: 200}
"""
"""The published recipe (FACTS: 8 GPUs, 128 rollouts of 8 prompts per step) with full fine-tuning."""


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    return str(file)


def plan(capsys, *arguments):
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def text(capsys, *arguments):
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in shipped_configs() if "/" not in name])
def test_every_shipped_configuration_plans(name, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    facts = plan(capsys, "--config", name)
    assert facts["parameters"]["total"] > 0
    assert facts["memory_per_gpu"]["tensors_at_peak"] > facts["memory_per_gpu"]["resident"]["weights"]


def test_sudoku_tiny_is_the_embedded_model_and_fits(capsys):
    facts = plan(capsys, "--config", "sudoku_tiny")
    assert facts["parameters"]["total"] == facts["parameters"]["trainable"] == 217_664
    assert facts["warnings"] == []


def test_a_run_on_a_processor_is_held_against_no_gpu(capsys):
    memory = plan(capsys, "--config", "sudoku_tiny")["memory_per_gpu"]
    assert (memory["fits"], memory["gpu_memory_gb"]) == (None, None)
    output = text(capsys, "--config", "sudoku_tiny")
    assert "80 GiB" not in output
    assert "GPU" not in output
    assert plan(capsys, "--config", "sudoku_tiny", "--gpu_memory_gb", "0.001")["memory_per_gpu"]["fits"] is False


def test_the_schedule_of_the_published_recipe(recipe, capsys):
    schedule = plan(capsys, "--config", recipe)["schedule"]
    assert schedule == {
        "rollouts_per_buffer": 16,
        "prompts_per_buffer": 1,
        "sampling_forwards": 128,
        "scoring_forwards": 2 * 2,
        "training_forwards": 8 * 2,
        "optimizer_steps_per_buffer": 8,
        "step_rollouts": 128,
        "step_prompts": 8,
    }


def test_smaller_sampling_batches_mean_more_forwards(recipe, capsys):
    schedule = plan(capsys, "--config", recipe, "--model.rows_per_forward=4")["schedule"]
    assert (schedule["sampling_forwards"], schedule["scoring_forwards"]) == (4 * 128, 2 * 4)


@pytest.mark.parametrize(
    ("override", "forwards"),
    [
        ("--model.reference_refresh_interval=1", 0),
        ("--model.objective.init_args.baseline=policy", 2 * 2 + 2 + 8 * 2),
        ("--model.objective=dmpo_lightning.WDDO", 2 * 2 + 2),
        ("--model.objective.init_args.estimator=dmpo_lightning.TrajectoryEstimator", 2 * 32),
    ],
    ids=["fresh reference", "policy baseline", "WDDO", "trajectory"],
)
def test_what_an_objective_scores(override, forwards, recipe, capsys):
    """Forwards without gradient per buffer; 2 passes over 16 rollouts in two chunks of 8 are the default, and a
    trajectory of 128 steps takes 4 of them at once.
    """
    more = ["--model.objective.init_args.reward_temperature=0.04"] if "WDDO" in override else []
    assert plan(capsys, "--config", recipe, override, *more)["schedule"]["scoring_forwards"] == forwards


TRAJECTORY = "--model.objective.init_args.estimator=dmpo_lightning.TrajectoryEstimator"


def test_wddo_scores_its_own_maskings_beside_those_of_the_estimator(recipe, capsys):
    """16 rollouts in two chunks: the reference along 128 steps, 4 at once, and 8 maskings of WDDO in one forward."""
    wddo = ["--model.objective=dmpo_lightning.WDDO", "--model.objective.init_args.reward_temperature=0.04"]
    wddo += ["--model.objective.init_args.replicates=8", TRAJECTORY]
    arguments = ["--config", recipe, *wddo, "--model.sampler=dmpo_lightning.RandomOrderSampler"]
    arguments += ["--model.sampler.init_args.denoising_steps=128"]
    assert plan(capsys, *arguments)["schedule"]["scoring_forwards"] == 2 * 32 + 2
    assert "log_rnd 66 of 64 rows" in text(capsys, *arguments)


def test_an_objective_that_does_not_state_its_footprint_is_refused_with_a_remedy(recipe, capsys):
    assert main(["plan", "--config", recipe, "--model.objective=planning_runs.UnstatedObjective"]) == 2
    error = capsys.readouterr().err
    assert "UnstatedObjective" in error
    assert "`footprint(self, *, completion_length, sampler, reference_is_current=False)`" in error


def test_an_estimator_that_does_not_state_its_footprint_is_refused_with_a_remedy(recipe, capsys):
    estimator = "--model.objective.init_args.estimator=planning_runs.UnstatedEstimator"
    assert main(["plan", "--config", recipe, estimator]) == 2
    error = capsys.readouterr().err
    assert "UnstatedEstimator" in error
    assert "`footprint(self, *, completion_length, sampler)`" in error


def test_an_objective_of_somebody_else_is_planned_by_what_it_states(recipe, capsys):
    arguments = ["--config", recipe, "--model.objective=planning_runs.StatedObjective"]
    schedule = plan(capsys, *arguments)["schedule"]
    assert (schedule["scoring_forwards"], schedule["training_forwards"]) == (2 * 2, 8 * 2)
    assert "log_rnd 4 of 24 rows, training 16 of 16 rows" in text(capsys, *arguments)


def test_a_sampler_of_somebody_else_is_bounded_by_asking_for_everything(recipe, capsys):
    sampler = ["--model.sampler=planning_runs.UnstatedSampler", "--model.sampler.init_args.denoising_steps=64"]
    facts = plan(capsys, "--config", recipe, *sampler)
    assert facts["schedule"]["sampling_forwards"] == 64
    logits = facts["memory_per_gpu"]["phases"]["sampling"]["logits"]
    assert logits == pytest.approx(16 * 256 * 126464 * 4 * (3 + 512 / 126464))


def test_data_that_does_not_say_its_prompts_per_buffer_is_assumed_to_have_one(recipe):
    config = merged_configuration(["--config", recipe])
    stated = make_plan(config)
    del config["data"]["init_args"]["prompts_per_buffer"]
    assumed = make_plan(config)
    assert assumed.to_dict()["schedule"] == stated.to_dict()["schedule"]
    assert any("one prompt per buffer is assumed" in note for note in assumed.settings.notes)


def test_options_of_the_model_may_stand_in_a_value_of_their_own(recipe):
    lora = {"class_path": "dmpo_lightning.LoRA", "init_args": {"r": 16}}
    backbone = {"dtype": "float16", "adapter": lora, "quantization": "nf4", "gradient_checkpointing": True}
    config = merged_configuration(["--config", recipe])
    options = config["model"]["init_args"]
    backbone["model"] = options["model"]
    plan = make_plan(config | {"model": config["model"] | {"init_args": options | {"model": backbone}}}).to_dict()
    assert (plan["model"], plan["dtype"]) == ("GSAI-ML/LLaDA-8B-Instruct", "float16")
    assert plan["parameters"]["trainable"] == 335_544_320 / 8
    alone = make_plan(config | {"model": config["model"] | {"init_args": options | {"model": backbone["model"]}}})
    assert (alone.settings.dtype, alone.settings.adapter) == ("bfloat16", None)


@pytest.mark.parametrize("missing", ["completion_length", "batch_size"])
def test_supervised_data_without_its_sizes_is_an_error_that_names_them(missing):
    config = merged_configuration(["--config", resolve_config("sudoku_tiny_sft")])
    del config["data"]["init_args"][missing]
    with pytest.raises(ValueError, match=f"needs `data.init_args.{missing}`"):
        make_plan(config)


def test_full_fine_tuning_of_8b_on_one_gpu_is_warned_about_with_a_remedy(recipe, capsys):
    output = text(capsys, "--config", recipe)
    assert "WARNING: does not fit" in output
    assert "8,015,581,184" in output
    assert "train an adapter" in output


def test_lora_with_checkpointing_fits_where_full_fine_tuning_does_not(recipe, capsys):
    lora = ["--model.model.adapter=dmpo_lightning.models.lora.LoRA", "--model.model.gradient_checkpointing=true"]
    full = plan(capsys, "--config", recipe, "--model.model.gradient_checkpointing=true")
    adapted = plan(capsys, "--config", recipe, *lora)
    assert not full["memory_per_gpu"]["fits"]
    assert adapted["memory_per_gpu"]["fits"]
    assert adapted["parameters"]["trainable"] == 335_544_320
    assert adapted["warnings"] == []


def test_the_size_of_the_gpu_decides(recipe, capsys):
    lora = ["--model.model.adapter=dmpo_lightning.models.lora.LoRA", "--model.model.gradient_checkpointing=true"]
    required = plan(capsys, "--config", recipe, *lora)["memory_per_gpu"]["required"] / 1024**3
    for size, fits in ((required * 1.01, True), (required * 0.99, False)):
        facts = plan(capsys, "--config", recipe, *lora, "--gpu_memory_gb", str(size))
        assert facts["memory_per_gpu"]["fits"] is fits
        assert bool(facts["warnings"]) is not fits


def test_more_gpus_shard_full_fine_tuning_until_it_fits(recipe, capsys):
    sharded = ["--trainer.strategy=fsdp", "--model.model.gradient_checkpointing=true"]
    alone = plan(capsys, "--config", recipe, *sharded, "--trainer.devices=1")["memory_per_gpu"]
    many = plan(capsys, "--config", recipe, *sharded, "--trainer.num_nodes=2")
    assert not alone["fits"]
    assert many["memory_per_gpu"]["fits"]
    assert many["ranks"] == 16
    assert many["memory_per_gpu"]["resident"]["weights"] == pytest.approx(alone["resident"]["weights"] / 16, abs=1)


def test_sizes_that_dmpo_would_refuse_are_warned_about(recipe, capsys):
    odd = plan(capsys, "--config", recipe, "--model.micro_batch_size=5")["warnings"]
    assert any("`micro_batch_size` must divide the buffer of 16 rollouts" in warning for warning in odd)
    accumulated = plan(capsys, "--config", recipe, "--trainer.accumulate_grad_batches=3")["warnings"]
    assert any("2 micro-batches" in each and "accumulate_grad_batches, got 3" in each for each in accumulated)
    blocks = plan(capsys, "--config", recipe, "--model.sampler.init_args.block_length=48")["warnings"]
    assert any("multiple of `block_length`, got 256 and 48" in warning for warning in blocks)
    assert any(
        "order ignores the tokens" in warning for warning in plan(capsys, "--config", recipe, TRAJECTORY)["warnings"]
    )


def test_a_prompt_length_that_nothing_states_is_assumed_and_said_to_be(recipe, capsys):
    assert plan(capsys, "--config", recipe)["notes"] == []
    unstated = plan(capsys, "--config", recipe, "--data.max_prompt_length=null")
    assert (unstated["tokens"]["prompt"], len(unstated["notes"])) == (200, 1)
    stated = plan(capsys, "--config", recipe, "--prompt_length", "300")
    assert (stated["tokens"]["prompt"], stated["notes"]) == (300, [])


def test_a_folder_with_an_adapter_stands_for_its_base(recipe, tmp_path, capsys):
    stored = {
        "base_model_name_or_path": "GSAI-ML/LLaDA-8B-Base",
        "r": 16,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj"],
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(stored))
    facts = plan(capsys, "--config", recipe, f"--model.model={tmp_path}")
    assert facts["parameters"]["trainable"] == 32 * 16 * (4096 + 4096)
    assert facts["memory_per_gpu"]["resident"]["reference"] == 0


def test_an_adapter_that_names_layers_of_another_family_counts_those_that_exist(recipe, tmp_path, capsys):
    """Adapters of d1 name Llama's layers, of which LLaDA has some; PEFT leaves the others out as well."""
    stored = {"base_model_name_or_path": "GSAI-ML/LLaDA-8B-Base", "r": 16, "target_modules": ["q_proj", "o_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(stored))
    facts = plan(capsys, "--config", recipe, f"--model.model={tmp_path}")
    assert facts["parameters"]["trainable"] == 32 * 16 * (4096 + 4096)


QUANTIZED = ["--config", "gsm8k.yaml", "--config", "overlays/qlora_24gb.yaml", "--trainer.devices=8"]


@pytest.mark.parametrize(
    ("strategy", "refused"),
    [("ddp", False), ("deepspeed_zero2", False), ("fsdp", True), ("fsdp2", True), ("deepspeed_zero3", True)],
)
def test_quantised_weights_are_refused_where_training_refuses_them(strategy, refused, capsys):
    warnings = plan(capsys, *QUANTIZED, "--config", f"strategies/{strategy}.yaml")["warnings"]
    assert any("`quantization` needs whole layers on each rank" in warning for warning in warnings) is refused


def test_a_completion_without_room_for_a_prompt_is_warned_about(capsys):
    facts = plan(capsys, "--config", "sudoku_tiny", "--model.completion_length=200")
    assert facts["tokens"]["prompt"] == 1
    assert any("`completion_length` 200 leaves no room for a prompt in the 128 tokens" in w for w in facts["warnings"])


@pytest.mark.parametrize(("nodes", "shards"), [(1, 1), (2, 2), (4, 4)])
def test_lightnings_own_strategy_divides_over_the_machines_alone(nodes, shards):
    """Lightning's documentation: auto sets the data-parallel size to the number of nodes."""
    own = {"class_path": "lightning.pytorch.strategies.ModelParallelStrategy", "init_args": {}}
    sharding = sharding_of(own, devices=8, nodes=nodes)
    assert (sharding.weights, sharding.gradients, sharding.optimizer) == (shards, shards, shards)
    assert "strategies/fsdp2.yaml" in sharding.note
    ours = {"class_path": "dmpo_lightning.distributed.strategies.FSDP2Strategy", "init_args": {}}
    assert sharding_of(ours, devices=8, nodes=nodes).weights == 8 * nodes


@pytest.mark.slow
def test_deepspeed_says_nothing_on_standard_output(tmp_path):
    """In a process of its own, where DeepSpeed is imported for the first time."""
    arguments = ["plan", "--config", "gsm8k.yaml", "--config", "strategies/deepspeed_zero3.yaml", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "dmpo_lightning", *arguments],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["strategy"] == "deepspeed stage 3"


def test_the_arithmetic_of_the_published_recipe(recipe, capsys):
    """docs/performance.md: 933 888 tokens of sampling, 58 368 of scoring and 233 472 of training pass 6.98e9 weights.
    Training passes them three times in full fine-tuning. Attention adds 4 x 456 x 4096 per token and block; the head's
    0.518e9 weights pass at 128 x 16 x 32 places, 2 x 16 x 4 x 128.5 and 3 x 8 x 16 x 4 x 128.5.
    """
    run = plan(capsys, "--config", recipe, "--trainer.max_steps=4000", "--tflops=400")["whole_run"]
    tokens = 933_888 + 58_368 + 3 * 233_472
    places = 128 * 16 * 32 + 2 * 16 * 4 * 128.5 + 3 * 8 * 16 * 4 * 128.5
    blocks = 32 * (4 * 4096**2 + 3 * 4096 * 12288 + 2 * 4096)
    expected = tokens * (2 * blocks + 4 * 456 * 4096 * 32) + places * 2 * 126464 * 4096
    assert run["flops_per_buffer_and_rank"] == pytest.approx(expected, rel=1e-6)
    assert (run["optimizer_steps"], run["buffers"], run["assumed_tflops"]) == (4000, 500, 400)
    assert run["hours"] == pytest.approx(500 * expected / 400e12 / 3600)
    assert "500 buffers" in text(capsys, "--config", recipe, "--trainer.max_steps=4000")
    assert "at 300 TFLOP/s per GPU" in text(capsys, "--config", recipe, "--trainer.max_steps=4000")


def test_a_checkpoint_holds_what_is_trained_and_the_states_of_the_optimizer(recipe, capsys):
    """bf16-true: 335 544 320 weights of an adapter of 2 bytes, two states of 2 bytes each, and 8 ranks' rollouts."""
    adapter = ["--model.model.adapter=dmpo_lightning.LoRA"]
    run = plan(capsys, "--config", recipe, *adapter)["whole_run"]
    rollouts = 8 * (16 * 256 * (8 + 8 + 4) + 200 * 9)
    assert run["checkpoint_bytes"] == 335_544_320 * (2 + 2 * 2) + rollouts
    assert run["hours"] is None
    renewed = plan(capsys, "--config", recipe, *adapter, "--model.reference_refresh_interval=1")["whole_run"]
    assert renewed["checkpoint_bytes"] - run["checkpoint_bytes"] == 335_544_320 * 2


def test_an_unknown_configuration_is_one_line_and_status_2(capsys):
    assert main(["plan", "--config", "nonesuch"]) == 2
    assert "No configuration 'nonesuch'" in capsys.readouterr().err


def test_a_misspelt_key_is_refused_as_fit_would(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--config", "sudoku_tiny", "--model.group_sise=4"])
    assert stop.value.code == 2
    assert "group_size" in capsys.readouterr().err


def test_help_says_what_the_command_adds(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--help"])
    assert stop.value.code == 0
    assert "--gpu_memory_gb" in capsys.readouterr().out
