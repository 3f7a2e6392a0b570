"""A name and a Backbone are merged across configurations and options, in whatever order they come."""

import json
from pathlib import Path

import pytest
from cli_runs import printed_config

from dmpo_lightning.commands.arguments import resolve_arguments

RECIPE = ["--config", "gsm8k.yaml"]
TINY = ["--config", "sudoku_tiny.yaml"]


def printed(capsys, *arguments: str) -> dict:
    """The model that would be trained."""
    return printed_config(capsys, *arguments)["model"]["init_args"]


@pytest.fixture
def name_file(tmp_path):
    """A configuration of one's own that says where the model lies, and nothing else."""
    path = tmp_path / "paths.yaml"
    path.write_text("model: {init_args: {model: /models/llada}}\ndata: {init_args: {path: /data}}\n")
    return ["--config", str(path)]


@pytest.mark.parametrize("written", [["--model.model", "DIR"], ["--model.model=DIR"], ["--model.init_args.model=DIR"]])
def test_a_name_on_the_command_line_replaces_the_name_alone(capsys, written):
    model = printed(capsys, *RECIPE, *written)["model"]
    assert (model["model"], model["dtype"], model["adapter"]["init_args"]["r"]) == ("DIR", "bfloat16", 128)


def test_a_name_in_a_configuration_replaces_the_name_alone(capsys, name_file):
    model = printed(capsys, *RECIPE, *name_file)["model"]
    assert (model["model"], model["dtype"], model["adapter"]["init_args"]["r"]) == ("/models/llada", "bfloat16", 128)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["--config", "sudoku_tiny.yaml"], "sudoku_tiny"),
        (["--config", "sudoku_tiny.yaml", "--model.model", "DIR"], "DIR"),
        (["--config=sudoku_tiny.yaml", "--model.model=other", "--model.model=DIR"], "DIR"),
    ],
)
def test_options_of_a_backbone_keep_a_plain_name(capsys, arguments, name):
    lora = ["--model.model.adapter", "dmpo_lightning.LoRA", "--model.model.adapter.r", "4"]
    model = printed(capsys, *arguments, "--model.model.dtype", "bfloat16", *lora)["model"]
    assert (model["model"], model["dtype"], model["adapter"]["init_args"]["r"]) == (name, "bfloat16", 4)


def test_a_configuration_with_options_of_a_backbone_keeps_a_plain_name(capsys):
    overlay = ["--config", "overlays/full_finetuning.yaml"]
    model = printed(capsys, "--config", "sudoku_tiny.yaml", *overlay)["model"]
    assert (model["model"], model["dtype"], model["adapter"]) == ("sudoku_tiny", "float32", None)


def test_a_plain_name_is_one_of_a_backbone_with_the_default_of_all_else(capsys):
    model = printed(capsys, "--config", "sudoku_tiny.yaml", "--model.model", "DIR")["model"]
    assert (model["model"], model["dtype"], model["adapter"]) == ("DIR", "auto", None)


def test_a_module_of_ones_own_is_no_backbone(capsys, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("model: {init_args: {model: {model: {class_path: torch.nn.Identity}, tokenizer: sudoku_tiny}}}\n")
    model = printed(capsys, "--config", "sudoku_tiny.yaml", "--config", str(path))["model"]
    assert (model["model"]["class_path"], model["tokenizer"]) == ("torch.nn.Identity", "sudoku_tiny")


@pytest.mark.parametrize("before", ["name", "backbone"])
def test_a_date_is_read_alike_whether_the_model_is_a_name_or_a_backbone(capsys, tmp_path, before):
    own = {
        "backbone": "model: {init_args: {model: {dtype: float32}}}",
        "name": "model: {init_args: {model: DIR}}",
        "date": "trainer: {logger: {init_args: {version: 2026-11-30}}}\nmodel: {init_args: {model: 2026-11-30}}",
    }
    for name, text in own.items():
        (tmp_path / name).write_text(text)
    config = printed_config(capsys, *TINY, "--config", str(tmp_path / before), "--config", str(tmp_path / "date"))
    assert config["trainer"]["logger"]["init_args"]["version"] == "2026-11-30"
    assert config["model"]["init_args"]["model"]["model"] == "2026-11-30"


def test_a_configuration_that_names_a_model_names_others_that_lie_beside_it(capsys, tmp_path):
    (tmp_path / "data.yaml").write_text("class_path: dmpo_lightning.SudokuDataModule\ninit_args: {blanks: [3, 5]}\n")
    (tmp_path / "own.yaml").write_text("data: data.yaml\nmodel: {init_args: {model: ~/DIR}}\n")
    config = printed_config(capsys, *TINY, "--config", str(tmp_path / "own.yaml"))
    assert config["data"]["init_args"]["blanks"] == [3, 5]


def test_null_takes_an_option_of_an_object_back(capsys):
    null = [
        "--model.model.adapter",
        "null",
        "--model.sampler.denoising_steps=null",
        "--model.objective.uninformative_groups=null",
    ]
    options = printed(capsys, *RECIPE, *null)
    assert options["model"]["adapter"] is None
    assert options["sampler"]["init_args"]["denoising_steps"] is None
    assert options["sampler"]["init_args"]["block_length"] == 32
    assert options["objective"]["init_args"]["uninformative_groups"] is None


def test_the_later_of_two_values_wins(capsys):
    options = ["--model.sampler.denoising_steps=null", "--model.sampler.denoising_steps=64"]
    assert printed(capsys, *RECIPE, *options)["sampler"]["init_args"]["denoising_steps"] == 64


def test_other_arguments_stay_as_they_were_written():
    other = [
        "fit",
        "--trainer.callbacks+=dmpo_lightning.Preemption",
        "--trainer.devices",
        "2",
        "--json",
        "-x",
        "--y=a=b",
    ]
    assert resolve_arguments(other) == other


def test_the_text_of_a_configuration_is_taken_as_one(capsys):
    text = json.dumps({"model": {"init_args": {"model": {"dtype": "float32"}}}})
    model = printed(capsys, *RECIPE, f"--config={text}")["model"]
    assert (model["model"], model["dtype"]) == ("GSAI-ML/LLaDA-8B-Instruct", "float32")


@pytest.mark.parametrize("written", ["plain", "annotated", "with_axes", "Scaled"])
def test_a_baseline_of_ones_own_is_named_by_its_path(capsys, tmp_path, monkeypatch, written):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    path = f"user_functions.{written}"
    on_the_line = printed(capsys, *TINY, f"--model.objective.baseline={path}")
    (tmp_path / "a.yaml").write_text(f"model: {{init_args: {{objective: {{init_args: {{baseline: {path}}}}}}}}}\n")
    in_a_file = printed(capsys, *TINY, "--config", str(tmp_path / "a.yaml"))
    for options in (on_the_line, in_a_file):
        baseline = options["objective"]["init_args"]["baseline"]
        assert (baseline["class_path"] if written == "Scaled" else baseline) == path


NULLABLE = [
    "--model.sampler.denoising_steps",
    "--model.sampler.init_args.block_length",
    "--model.objective.uninformative_groups",
    "--model.objective.estimator",
    "--model.sampler.init_args.top_p",
    "--data.max_prompt_length",
    "--data.init_args.path",
    "--trainer.logger.version",
]


@pytest.mark.parametrize("null", ["null", "~", "NULL"])
def test_null_is_a_value_of_every_option_that_may_have_none(capsys, null):
    written = [part for option in NULLABLE[::2] for part in (option, null)]
    written += [f"{option}={null}" for option in NULLABLE[1::2]]
    config = printed_config(capsys, *RECIPE, *written)
    for option in NULLABLE:
        value = config
        for name in option.removeprefix("--").split("."):
            value = value[name] if name in value else value["init_args"][name]
        assert value is None, option


def test_several_configs_merge_in_order_and_the_command_line_wins(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("model:\n  init_args:\n    group_size: 4\n    num_iterations: 2\n")
    (tmp_path / "b.yaml").write_text("model:\n  init_args:\n    num_iterations: 3\n")
    files = [*TINY, "--config", str(tmp_path / "a.yaml"), f"--config={tmp_path / 'b.yaml'}"]
    merged = printed(capsys, *files, "--model.completion_length=24")
    assert (merged["group_size"], merged["num_iterations"], merged["completion_length"]) == (4, 3, 24)
