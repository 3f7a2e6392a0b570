"""The promise of `make demo`: the embedded base learns Sudoku, on puzzles whose solutions were never rewarded."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_lifts_the_solve_rate_of_held_out_puzzles(tmp_path):
    command = [sys.executable, "-m", "dmpo_lightning", "fit", "--config", "sudoku_tiny.yaml"]
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=True, timeout=1700)
    summary = json.loads((tmp_path / "runs" / "sudoku_tiny" / "latest" / "summary.json").read_text())
    assert summary["solve_rate_best_temperature_before"] <= 0.72
    assert summary["solve_rate_after"] >= 0.97
    assert summary["greedy_after"] >= 0.97
    assert summary["rollouts"] <= 6400
    record = (tmp_path / "runs" / "sudoku_tiny" / "latest" / "metrics.jsonl").read_text()
    assert '"kind":"guard"' not in record  # a healthy run


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("name", "configs", "least_times"),
    [
        ("sudoku_tiny", ["sudoku_tiny.yaml", "overlays/blocks_tiny.yaml"], 1.4),
        ("countdown_tiny", ["countdown_tiny.yaml"], 2.0),
    ],
)
def test_the_other_embedded_bases_learn_too(tmp_path, name, configs, least_times):
    options = [option for config in configs for option in ("--config", config)]
    command = [sys.executable, "-m", "dmpo_lightning", "fit", *options]
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=True, timeout=1700)
    summary = json.loads((tmp_path / "runs" / name / "latest" / "summary.json").read_text())
    assert summary["greedy_after"] >= least_times * summary["solve_rate_best_temperature_before"]
