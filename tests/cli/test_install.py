"""The wheel, installed elsewhere, is complete."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from dmpo_lightning.models.loading import EMBEDDED_MODELS

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(REPOSITORY)]
    subprocess.run(build, check=True, timeout=280)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_configs_and_the_embedded_models_and_stays_small(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for model in EMBEDDED_MODELS:
        assert f"dmpo_lightning/assets/{model}/model.safetensors" in names
    for config in ("sudoku_tiny.yaml", "countdown_tiny.yaml", "overlays/blocks_tiny.yaml"):
        assert f"dmpo_lightning/shipped_configs/{config}" in names
    assert "dmpo_lightning/py.typed" in names
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
