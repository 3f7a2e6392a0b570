"""Sharded training under LoRA, on two processes: what it must carry before it is offered."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCRIPT = HERE / "fsdp2_lora_run.py"


def launch(kind: str, folder: Path, *, sampler: str = "static", refresh: int = 0) -> list[dict]:
    """Two processes of `fsdp2_lora_run.py`; what each of them saw."""
    own = filter(None, [os.environ.get("PYTHONPATH")])
    paths = os.pathsep.join([str(HERE.parent), str(HERE.parent / "modules"), *own])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    output = folder / f"{kind}-{sampler}-{refresh}"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, str(SCRIPT), kind, sampler, str(refresh), str(output)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return [json.loads(Path(f"{output}.{rank}").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, list[dict]]:
    folder = tmp_path_factory.mktemp("fsdp2")
    return {kind: launch(kind, folder) for kind in ("ddp", "fsdp2")}


@pytest.mark.slow
def test_fsdp2_shards_every_parameter_and_ddp_none(runs):
    for rank in (0, 1):
        assert runs["fsdp2"][rank]["sharded"] == runs["fsdp2"][rank]["parameters"] > 0
        assert runs["ddp"][rank]["sharded"] == 0


@pytest.mark.slow
def test_the_losses_of_fsdp2_are_those_of_ddp(runs):
    """The later losses depend on the rollouts, the reference and the gradients of the earlier steps."""
    for rank in (0, 1):
        assert len(runs["ddp"][rank]["losses"]) == 3
        assert runs["fsdp2"][rank]["losses"] == pytest.approx(runs["ddp"][rank]["losses"], abs=1e-5)
    assert runs["ddp"][0]["losses"] != pytest.approx(runs["ddp"][1]["losses"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("of", ["policy", "reference"])
def test_policy_and_reference_after_three_steps_are_those_of_ddp(runs, of):
    for rank in (0, 1):
        assert runs["fsdp2"][rank][of] == pytest.approx(runs["ddp"][rank][of], abs=1e-4)
    assert runs["fsdp2"][0][of] == pytest.approx(runs["fsdp2"][1][of], abs=1e-6)
    assert runs["ddp"][0]["policy"] != pytest.approx(runs["ddp"][0]["reference"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["threshold", "early exit", "wino"])
def test_samplers_that_end_early_on_one_rank_do_not_hang_and_train_as_ddp_does(tmp_path, sampler):
    found, expected = (launch(kind, tmp_path, sampler=sampler) for kind in ("fsdp2", "ddp"))
    for rank in (0, 1):
        assert found[rank]["losses"] == pytest.approx(expected[rank]["losses"], abs=1e-5)


@pytest.mark.slow
def test_a_renewed_reference_is_sharded_and_equals_that_of_ddp(tmp_path):
    found, expected = (launch(kind, tmp_path, refresh=1) for kind in ("fsdp2", "ddp"))
    for rank in (0, 1):
        assert found[rank]["losses"] == pytest.approx(expected[rank]["losses"], abs=1e-5)
        assert found[rank]["sharded"] == found[rank]["parameters"]
        assert found[rank]["reference"] == pytest.approx(expected[rank]["reference"], abs=1e-4)
