"""Where the tests of this folder run: on a GPU, or on the CPU if `DMPO_GPU_TESTS_ON=cpu` says so."""

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU; skips where there is none. With ``DMPO_GPU_TESTS_ON=cpu`` the CPU, which tries the tests themselves."""
    asked = os.environ.get("DMPO_GPU_TESTS_ON", "")
    if asked not in ("", "cpu"):
        pytest.fail(f"DMPO_GPU_TESTS_ON must be cpu or not set, got {asked!r}")
    if asked == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU, torch sees no CUDA device; DMPO_GPU_TESTS_ON=cpu runs this on the CPU")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(autouse=True)
def _exact_products(device: torch.device) -> Iterator[None]:
    """Float32 products are not shortened to TF32, and global draws start over."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def one_rank() -> Iterator[None]:
    """Behind a test whose strategy makes a process group, the process is none of a job again."""
    before = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)
