"""What is shipped beside the package is there and works: configurations, job scripts, the wheel."""

import json
import os
import re
import shlex
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_runs import printed_config, status

from dmpo_lightning import load_tokenizer
from dmpo_lightning.commands.arguments import config_directory, resolve_config, shipped_configs
from dmpo_lightning.models.llada import LLaDAConfig, LLaDAForMaskedDiffusion
from dmpo_lightning.models.loading import EMBEDDED_MODELS

REPOSITORY = Path(__file__).parents[2]
TASKS = ["gsm8k", "math500", "countdown", "sudoku"]


def differing(part: Any, whole: Any, name: str = "") -> list[str]:
    """Where a configuration does not have what a part of it states."""
    if isinstance(part, dict) and isinstance(whole, dict):
        return [each for key, value in part.items() for each in differing(value, whole.get(key), f"{name}.{key}")]
    return [] if part == whole else [name]


def test_every_configuration_parses_and_states_what_an_overlay_says(capsys):
    for name in shipped_configs():
        if "/" in name:
            merged = printed_config(capsys, "--config", "gsm8k", "--config", name)
            assert differing(yaml.safe_load((config_directory() / name).read_text()), merged) == [], name
        else:
            assert printed_config(capsys, "--config", name)["model"]["class_path"].startswith("dmpo_lightning."), name


def test_a_bare_name_is_found_with_and_without_ending_and_a_file_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = str(config_directory() / "sudoku_tiny.yaml")
    assert resolve_config("sudoku_tiny") == resolve_config("sudoku_tiny.yaml") == shipped
    Path("sudoku_tiny.yaml").write_text("{}")
    assert resolve_config("sudoku_tiny.yaml") == "sudoku_tiny.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_the_published_recipe_plans_for_40_gb(name, capsys):
    assert status("plan", "--config", name, "--trainer.devices=8", "--gpu_memory_gb=40", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert "335544320" in json.dumps(plan)  # LoRA r 128 on the seven linear layers of 32 blocks
    assert not plan.get("warnings")


def test_without_the_weights_one_error_says_what_to_download(capsys, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert status("fit", "--config", "gsm8k", "--trainer.accelerator=cpu", "--trainer.devices=1") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "hf download GSAI-ML/LLaDA-8B-Instruct" in error
    assert "sudoku_tiny.yaml" in error


def test_gsm8k_trains_validates_checkpoints_and_resumes_on_a_small_model(test_data, tmp_path, monkeypatch):
    import torch

    monkeypatch.chdir(tmp_path)
    config = LLaDAConfig(
        d_model=32, n_layers=2, n_heads=2, mlp_hidden_size=32, vocab_size=32, mask_token_id=5, eos_token_id=0
    )
    LLaDAForMaskedDiffusion(config).save_pretrained("small")
    load_tokenizer("sudoku_tiny").save_pretrained("small")
    trainer = {
        **{"precision": "32-true", "accelerator": "cpu", "devices": 1, "val_check_interval": 4},
        **{"limit_val_batches": 1, "num_sanity_val_steps": 0, "enable_progress_bar": False},
    }
    model = {
        **{"completion_length": 32, "group_size": 2, "micro_batch_size": 1, "num_iterations": 2},
        **{"model": {"model": "small", "dtype": "float32", "adapter": {"init_args": {"r": 2}}}},
        "sampler": {"init_args": {"denoising_steps": 4}},
    }
    data = {
        **{"evaluation_batch_size": 2, "path": str(test_data / "gsm8k")},
        "sizes": {"train": 200, "validation": 100, "test": 100},
    }
    small = {"trainer": trainer, "model": {"init_args": model}, "data": {"init_args": data}}
    Path("small.yaml").write_text(yaml.safe_dump(small))
    run = ["fit", "--config", "gsm8k", "--config", "small.yaml"]
    assert status(*run, "--trainer.max_steps=3") == 0
    checkpoint = next(tmp_path.rglob("last.ckpt"))
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 3  # the end, not the last validation
    assert status(*run, "--trainer.max_steps=5", f"--ckpt_path={checkpoint}") == 0
    assert len(list(tmp_path.rglob("events*"))) == 2


# Job scripts ----------------------------------------------------------------------------------------------------------

SCRIPTS = sorted((REPOSITORY / "examples" / "slurm").iterdir())
VARIABLES = {"SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8", "MODEL": "sudoku_tiny", "RUNS": "runs", "DATA": "data"}


def command_in(script: Path) -> list[str]:
    """What ``dmpo-lightning`` is called with."""
    text = script.read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^.*dmpo[-_]lightning (fit .*)$", text, flags=re.MULTILINE)
    return shlex.split(re.sub(r"\$\{?(\w+)(?::[-?]([^}]*))?\}?", lambda m: VARIABLES.get(m[1]) or m[2], line))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_job_script_asks_for_all_ranks_finds_its_environment_and_asks_no_hub(script, capsys):
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    command, *arguments = command_in(script)
    assert arguments[arguments.index("--data.path") + 1] == "data"
    config = printed_config(capsys, *(each for each in arguments if each not in ("last", "--ckpt_path")))
    assert (command, int(config["trainer"]["devices"])) == ("fit", 8)
    assert config["trainer"]["num_nodes"] in (1, 2)
    assert "dmpo_lightning.Preemption" in [each["class_path"] for each in config["trainer"]["callbacks"]]
    before = re.split(r"^(?:srun|torchrun)", script.read_text(), flags=re.MULTILINE)[0]
    assert re.search(r'^source "\$\{ENVIRONMENT:', before, flags=re.MULTILINE)
    assert re.search(r"^export HF_HUB_OFFLINE=1", before, flags=re.MULTILINE)


@pytest.mark.parametrize("script", [path for path in SCRIPTS if path.suffix == ".sbatch"], ids=lambda path: path.name)
def test_a_job_is_told_before_its_end_continues_and_has_its_cores(script):
    text = script.read_text()
    assert re.search(r"#SBATCH --signal=SIGUSR1@\d+", text)
    assert "#SBATCH --requeue" in text
    assert "--ckpt_path last" in text
    # srun takes --cpus-per-task from sbatch no longer.
    (command,) = re.findall(r"^srun .*", text, flags=re.MULTILINE)
    assert '--cpus-per-task="$SLURM_CPUS_PER_TASK"' in command
    assert re.search(r"#SBATCH --cpus-per-task=\d+", text)


# The wheel ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # By way of the source archive, which has to hold all that a wheel is made of.
    build = [sys.executable, "-m", "build", "--outdir", str(folder), str(REPOSITORY)]
    subprocess.run(build, check=True, timeout=280)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_configs_and_the_embedded_models_and_stays_small(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for model in EMBEDDED_MODELS:
        assert f"dmpo_lightning/assets/{model}/model.safetensors" in names
    for config in ("sudoku_tiny.yaml", "countdown_tiny.yaml", "overlays/blocks_tiny.yaml"):
        assert f"dmpo_lightning/shipped_configs/{config}" in names
    assert "dmpo_lightning/py.typed" in names
    # What the report says beside its plots.
    assert "dmpo_lightning/reports/metrics.md" in names
    assert wheel.stat().st_size < 3_500_000


@pytest.mark.slow
def test_an_installed_wheel_trains_from_any_directory(wheel, tmp_path):
    """A new environment with the wheel installed by pip; its dependencies come from this one through a path file."""
    venv.create(tmp_path / "env", with_pip=True)
    programs = tmp_path / "env" / "bin"
    site = next((tmp_path / "env" / "lib").glob("python*")) / "site-packages"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }

    def run(*command):
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(programs / "pip", "install", "--quiet", "--no-deps", wheel)
    dependencies = Path(next(path for path in sys.path if path.endswith("site-packages")))
    (site / "dependencies.pth").write_text(f"{dependencies}\n")
    assert run(programs / "python", "-c", "import dmpo_lightning; print(dmpo_lightning.__file__)").startswith(str(site))
    options = ["--trainer.max_steps=4", "--trainer.val_check_interval=4", "--model.micro_batch_size=8"]
    options += ["--data.prompts_per_buffer=2", "--data.sizes={train: 64, validation: 16, test: 16}"]
    run(programs / "dmpo-lightning", "fit", "--config", "sudoku_tiny.yaml", *options)
    assert (tmp_path / "runs" / "sudoku_tiny" / "latest" / "summary.json").is_file()
