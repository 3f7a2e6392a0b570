"""A name and a Backbone are merged across configurations and options, in whatever order they come."""

import json
from pathlib import Path

import pytest
import yaml

from dmpo_lightning.__main__ import main
from dmpo_lightning.commands.arguments import resolve_arguments

RECIPE = ["--config", "gsm8k.yaml"]
TINY = ["--config", "sudoku_tiny.yaml"]


def printed(capsys, *arguments: str) -> dict:
    """The configuration that would run."""
    with pytest.raises(SystemExit) as ended:
        main(["fit", *arguments, "--print_config"])
    assert ended.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]


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


def test_null_takes_an_option_of_an_object_back(capsys):
    null = [
        "--model.model.adapter",
        "null",
        "--model.sampler.denoising_steps=null",
        "--model.objective.target_ess=null",
    ]
    options = printed(capsys, *RECIPE, *null)
    assert options["model"]["adapter"] is None
    assert options["sampler"]["init_args"]["denoising_steps"] is None
    assert options["sampler"]["init_args"]["block_length"] == 32
    assert options["objective"]["init_args"]["target_ess"] is None


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


def test_a_configuration_that_is_no_yaml_is_refused_by_name(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("model: {init_args: [\n")
    with pytest.raises(ValueError, match=r"broken\.yaml' cannot be read"):
        resolve_arguments(["--config", str(path)])


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
    "--model.objective.target_ess",
    "--model.objective.estimator",
    "--model.objective.init_args.weight_tolerance",
    "--data.max_prompt_length",
    "--data.init_args.path",
    "--trainer.logger.version",
]
SPELLINGS = [(null, equals) for null in ("null", "~", "NULL") for equals in (True, False)]


@pytest.mark.parametrize(
    ("option", "null", "equals"),
    [*((option, "null", True) for option in NULLABLE), *((NULLABLE[0], *spelling) for spelling in SPELLINGS[1:])],
)
def test_null_is_a_value_of_every_option(capsys, option, null, equals):
    written = [f"{option}={null}"] if equals else [option, null]
    with pytest.raises(SystemExit) as ended:
        main(["fit", *RECIPE, *written, "--print_config"])
    assert ended.value.code == 0
    value = yaml.safe_load(capsys.readouterr().out)
    for name in option.removeprefix("--").split("."):
        inner = value if name in value else value["init_args"]
        value = inner[name]
    assert value is None
