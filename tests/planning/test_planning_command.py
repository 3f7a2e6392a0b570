"""``dmpo-lightning plan``, as a user calls it. Most runs are of a network of which only a config.json exists."""

import json
import os
import subprocess
import sys

import pytest
from planning_runs import small_config

from dmpo_lightning.__main__ import main
from dmpo_lightning.commands.arguments import resolve_config
from dmpo_lightning.commands.plan import make_plan, merged_configuration

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


@pytest.fixture
def small(tmp_path):
    """The recipe's schedule with a small network and 16 steps."""
    small_config("small", max_sequence_length=512).save_pretrained(tmp_path / "network")
    file = tmp_path / "small.yaml"
    text = RECIPE.replace("GSAI-ML/LLaDA-8B-Instruct", str(tmp_path / "network"))
    file.write_text(text.replace("denoising_steps: 128", "denoising_steps: 16"))
    return str(file)


def plan(capsys, *arguments):
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def text(capsys, *arguments):
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments) -> str:
    assert main(["plan", *arguments]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        "sudoku_tiny",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("countdown_tiny", "sudoku_tiny_sft", "sft")),
    ],
)
def test_shipped_configurations_plan_without_network(name, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    facts = plan(capsys, "--config", name)
    memory = facts["memory_per_gpu"]
    assert memory["required"] > memory["resident"]["weights"] > 0
    if name == "sudoku_tiny":
        assert facts["parameters"]["total"] == facts["parameters"]["trainable"] == 217_664
        # On a CPU it is held against no GPU.
        assert (memory["fits"], memory["gpu_memory_gb"], facts["warnings"]) == (None, None, [])


def test_a_run_on_a_cpu_speaks_of_no_gpu(capsys):
    output = text(capsys, "--config", "sudoku_tiny")
    assert "GPU" not in output
    assert "WARNING: does not fit" in text(capsys, "--config", "sudoku_tiny", "--gpu_memory_gb", "0.001")


def test_the_schedule_of_the_published_recipe(small, capsys):
    facts = plan(capsys, "--config", small, "--trainer.max_steps=4000")
    flops = facts["buffer_of_a_rank"].pop("flops")
    assert facts["buffer_of_a_rank"] == {
        "prompts": 1,
        "rollouts": 16,
        "sampling_forwards": 16,
        "scoring_forwards": 2 * 2,
        "training_forwards": 8 * 2,
        "optimizer_steps": 8,
    }
    assert facts["optimizer_step_of_all_ranks"] == {"prompts": 8, "rollouts": 128}
    run = facts["whole_run"]
    assert (run["optimizer_steps"], run["buffers"]) == (4000, 500)
    assert run["hours_at_300_TFLOP/s"] == pytest.approx(500 * flops / 300e12 / 3600)


@pytest.mark.parametrize(
    ("overrides", "sampling", "scoring"),
    [
        (["--model.rows_per_forward=4"], 4 * 16, 2 * 4),
        (["--model.reference_refresh_interval=1"], 16, 0),
        (["--model.objective.init_args.baseline=policy"], 16, 2 * 2 + 2 + 8 * 2),
        (
            [
                "--model.objective=dmpo_lightning.WDDO",
                "--model.objective.init_args.reward_temperature=0.04",
                "--model.objective.init_args.estimator=dmpo_lightning.TrajectoryEstimator",
                "--model.sampler=dmpo_lightning.RandomOrderSampler",
                "--model.sampler.init_args.denoising_steps=16",
            ],
            16,
            2 * 4 + 2,
        ),
    ],
    ids=["a few rows at a time", "fresh reference", "policy baseline", "WDDO along a trajectory"],
)
def test_forwards_of_a_buffer(overrides, sampling, scoring, small, capsys):
    """16 rollouts in two chunks of 8; a trajectory of 16 steps takes 4 of them at once."""
    schedule = plan(capsys, "--config", small, *overrides)["buffer_of_a_rank"]
    assert (schedule["sampling_forwards"], schedule["scoring_forwards"]) == (sampling, scoring)


def test_an_objective_and_a_sampler_of_somebody_else_are_run_as_they_are(small, capsys):
    objective, sampler = "--model.objective=planning_runs.ForeignObjective", "planning_runs.ForeignSampler"
    arguments = ["--config", small, objective, f"--model.sampler={sampler}", "--model.completion_length=64"]
    lines = [line.split() for line in text(capsys, *arguments).splitlines()]
    for name, count in (("sampling", "64"), ("scoring", "4"), ("training", "16")):
        assert [name, "forwards", count] in lines


def test_data_that_does_not_say_its_prompts_per_buffer_is_assumed_to_have_one(small):
    config = merged_configuration(["--config", small])
    stated = make_plan(config)
    del config["data"]["init_args"]["prompts_per_buffer"]
    assumed = make_plan(config)
    assert assumed.counts() == stated.counts()
    assert any("one prompt per buffer is assumed" in note for note in assumed.run.notes)


@pytest.mark.parametrize("missing", ["completion_length", "batch_size"])
def test_supervised_data_without_its_sizes_is_an_error_that_names_them(missing):
    config = merged_configuration(["--config", resolve_config("sudoku_tiny_sft")])
    del config["data"]["init_args"][missing]
    with pytest.raises(ValueError, match=r"needs `batch_size` and `completion_length` of the data, got .*None"):
        make_plan(config)


LORA = ["--model.model.adapter=dmpo_lightning.LoRA", "--model.model.gradient_checkpointing=true"]


@pytest.mark.slow
def test_full_fine_tuning_of_8b_on_one_gpu_does_not_fit_and_lora_does(recipe, capsys):
    output = text(capsys, "--config", recipe)
    assert "WARNING: does not fit" in output
    assert "8,015,581,184" in output
    assert "train an adapter" in output
    adapted = plan(capsys, "--config", recipe, *LORA)
    assert adapted["parameters"]["trainable"] == 335_544_320
    assert (adapted["memory_per_gpu"]["fits"], adapted["warnings"]) == (True, [])


@pytest.mark.slow
def test_the_arithmetic_of_the_published_recipe(recipe, capsys):
    """docs/performance.md: 933 888 tokens of sampling, 58 368 of scoring and 233 472 of training pass 6.98e9 weights.
    Training passes them three times in full fine-tuning. Attention adds 4 x 456 x 4096 per token and layer; the head's
    0.518e9 weights pass at 128 x 16 x 32 positions, 2 x 16 x 4 x 128.5 and 3 x 8 x 16 x 4 x 128.5. The first forward
    computes one row for all, the last layer of each other one the block alone, and the head's backward pass once more.
    """
    flops = plan(capsys, "--config", recipe)["buffer_of_a_rank"]["flops"]
    tokens = 933_888 + 58_368 + 3 * 233_472
    positions = 128 * 16 * 32 + 2 * 16 * 4 * 128.5 + 3 * 8 * 16 * 4 * 128.5
    layers = 32 * (4 * 4096**2 + 3 * 4096 * 12288)
    expected = tokens * (2 * layers + 4 * 456 * 4096 * 32) + positions * 2 * 126464 * 4096
    assert flops == pytest.approx(expected, rel=0.05)


def test_the_size_of_the_gpu_decides(small, capsys):
    required = plan(capsys, "--config", small, *LORA)["memory_per_gpu"]["required"] / 1024**3
    for size, fits in ((required * 1.01, True), (required * 0.99, False)):
        facts = plan(capsys, "--config", small, *LORA, "--gpu_memory_gb", str(size))
        assert facts["memory_per_gpu"]["fits"] is fits
        assert bool(facts["warnings"]) is not fits


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["--model.micro_batch_size=5"], "`micro_batch_size` must divide the buffer of 16 rollouts"),
        (["--trainer.accumulate_grad_batches=3"], "2 micro-batches"),
        (["--model.sampler.init_args.block_length=48"], "multiple of `block_length`, got 256 and 48"),
        (["--model.objective.init_args.estimator=dmpo_lightning.TrajectoryEstimator"], "order ignores the tokens"),
        (
            ["--model.completion_length=512", "--data.max_prompt_length=null"],
            "room for a prompt in the 512 tokens of the model",
        ),
        (
            [*LORA, "--model.model.quantization=nf4", "--trainer.strategy=fsdp"],
            "`quantization` needs whole layers on each rank",
        ),
    ],
)
def test_what_training_would_refuse_is_refused(overrides, said, small, capsys):
    assert said in refused(capsys, "--config", small, *overrides)


def test_a_prompt_length_that_nothing_states_is_assumed_and_said_to_be(small, capsys):
    unstated = plan(capsys, "--config", small, "--data.max_prompt_length=null")
    assert (unstated["tokens"]["prompt"], len(unstated["notes"])) == (200, 1)
    stated = plan(capsys, "--config", small, "--prompt_length", "250")
    assert (stated["tokens"]["prompt"], stated["notes"]) == (250, [])


def test_a_folder_with_an_adapter_stands_for_its_base_and_is_where_the_run_starts(small, tmp_path, capsys):
    """Adapters of d1 name Llama's layers, of which LLaDA has some. PEFT leaves the others out as well."""
    names = {"base_model_name_or_path": str(tmp_path / "network"), "target_modules": ["q_proj", "o_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(names | {"peft_type": "LORA", "r": 16}))
    facts = plan(capsys, "--config", small, f"--model.model={tmp_path}")
    numbers = 4 * 16 * (128 + 128)
    assert facts["parameters"]["trainable"] == numbers
    # The reference is the adapter as it was loaded, frozen.
    assert facts["memory_per_gpu"]["resident"]["reference"] == 2 * numbers


def test_a_checkpoint_holds_what_is_trained_and_the_states_of_the_optimizer(small, capsys):
    """bf16-true: weights of an adapter of 2 bytes, two states of 2 bytes each, and 8 ranks' rollouts."""
    run = plan(capsys, "--config", small, *LORA)["whole_run"]
    numbers = 4 * 128 * (4 * (128 + 128) + 3 * (128 + 384))
    rollouts = 8 * (16 * 256 * (8 + 8 + 4) + 200 * 9)
    assert run["checkpoint_GiB"] * 2**30 == numbers * (2 + 2 * 2) + 4 * 7 * 2 * 4 + rollouts
    assert (run["optimizer_steps"], run["buffers"], run["hours_at_300_TFLOP/s"]) == (None, None, None)
    refreshed = plan(capsys, "--config", small, *LORA, "--model.reference_refresh_interval=1")["whole_run"]
    assert (refreshed["checkpoint_GiB"] - run["checkpoint_GiB"]) * 2**30 == numbers * 2


@pytest.mark.slow
def test_deepspeed_says_nothing_on_standard_output(small, tmp_path):
    """In a process of its own, where DeepSpeed is imported for the first time."""
    arguments = ["plan", "--config", small, "--config", "strategies/deepspeed_zero3.yaml", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "dmpo_lightning", *arguments],
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["strategy"] == "deepspeed stage 3"


def test_an_unknown_configuration_is_one_line_and_status_2(capsys):
    assert "No configuration 'nonesuch'" in refused(capsys, "--config", "nonesuch")


def test_a_misspelt_key_is_refused_as_fit_would(capsys):
    assert main(["plan", "--config", "sudoku_tiny.yaml", "--model.group_sise=4"]) == 2
    assert "Did you mean group_size?" in capsys.readouterr().err


def test_help_says_what_the_command_adds(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--help"])
    assert stop.value.code == 0
    assert "--gpu_memory_gb" in capsys.readouterr().out
