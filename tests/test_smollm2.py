"""The way from a published causal model to what DMPO makes of it: examples/smollm2 in small, from the package on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dmpo_lightning.models.loading import load_model, load_tokenizer

SCRIPT = Path(__file__).parents[1] / "examples/smollm2/run.sh"
SIZES = ["--data.task.sizes", "{train: 128, validation: 8, test: 8}"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_example_goes_from_the_package_to_a_trained_model_and_continues_where_it_was(tmp_path):
    program = {"DMPO": str(Path(sys.executable).with_name("dmpo-lightning")), "PYTHON": sys.executable}
    for end in ("1", "2"):
        command = ["sh", SCRIPT, "--trainer.max_steps", end, *SIZES]
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | program, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    # The second call found all stages but the last one done, and continued that.
    assert "adapt.yaml" not in done.stderr
    [trained] = [path for path in (tmp_path / "runs").glob("smollm2_0/*/summary.json") if not path.parent.is_symlink()]
    summary = json.loads(trained.read_text())
    assert summary["rollouts"] == 512
    folder = str(tmp_path / "runs/smollm2/fine_tuned")
    model = load_model(folder)
    assert (model.block_size, model.lookback, model.num_parameters()) == (4, 1, 134_515_584)
    assert load_tokenizer(folder).chat_template.startswith("{% for message in messages %}")
