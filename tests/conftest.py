"""Runs before any test module is imported: threads wait without spinning, tests have one, and shape annotations of the
package are checked at every call.
"""

import os
import random
import signal
import threading
from pathlib import Path

# Before torch is imported. Tests share few cores, which threads that spin while they wait would take from each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from beartype._check.code import codemain
from jaxtyping import install_import_hook

from checked import CHECKED
from tiers import LATER

torch.set_num_threads(1)

# Of a list beartype checks one item, which it picks with python's global generator. Tests compare what runs draw from
# that generator, so the checks get one of their own.
assert hasattr(codemain, "getrandbits"), "beartype picks items in another way now"
codemain.getrandbits = random.Random(0).getrandbits
install_import_hook([f"dmpo_lightning.{name}" for name in CHECKED], "beartype.beartype")


def pytest_configure() -> None:
    """Has interrupts heard, to which a shell without job control makes what is in its background deaf."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves what is in `LATER` out of the core tier."""
    later = tuple(Path(__file__).parent / name for name in LATER)
    assert all(path.exists() for path in later)
    for item in items:
        if any(item.path == path or path in item.path.parents for path in later):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real data that `DMPO_TEST_DATA` names; skips where there is none."""
    folder = os.environ.get("DMPO_TEST_DATA")
    if not folder:
        pytest.skip("needs real data: set DMPO_TEST_DATA to the folder that holds it (gsm8k, sudoku, ...)")
    if not Path(folder).is_dir():
        pytest.fail(f"DMPO_TEST_DATA={folder} is not a folder; unset it to skip the tests on real data")
    return Path(folder).resolve()
