"""Runs before any test module is imported: one thread, and shape annotations of the package checked at every call."""

import os
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

torch.set_num_threads(1)

CHECKED = ("functional", "models.layers", "models.loading", "objectives", "policy", "rewards", "rollout", "samplers")
install_import_hook([f"dmpo_lightning.{name}" for name in CHECKED], "beartype.beartype")


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real data that `DMPO_TEST_DATA` names; skips where there is none."""
    folder = os.environ.get("DMPO_TEST_DATA")
    if not folder:
        pytest.skip("needs real data: set DMPO_TEST_DATA to the folder that holds it (gsm8k, sudoku, ...)")
    if not Path(folder).is_dir():
        pytest.fail(f"DMPO_TEST_DATA={folder} is not a folder; unset it to skip the tests on real data")
    return Path(folder).resolve()
