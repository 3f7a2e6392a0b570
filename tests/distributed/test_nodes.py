"""Two nodes of one process each, on the loopback, are two processes of one node."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from ranks import end_ranks, free_port, run_ranks
from small_run import ARGUMENTS, write_small

from dmpo_lightning.checkpoints.reading import newest_readable

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
FLAGS = {"num_nodes": 2, "devices": 1}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "kind"), [("slurm nodes", "ddp"), ("torchrun nodes", "fsdp2"), ("slurm nodes", "zero2")]
)
def test_two_nodes_have_the_losses_of_two_local_ranks(tmp_path, environment, kind):
    case = {"kind": kind, "adapter": "lora", "steps": 3}
    local = run_ranks("cases.one_run", 2, tmp_path / "local", **case)
    nodes = run_ranks("cases.one_run", 2, tmp_path / "nodes", environment=environment, flags=FLAGS, **case)
    for near, far in zip(local, nodes, strict=True):
        assert far["losses"] == near["losses"]
        assert far["weights"] == near["weights"]


QUEUES = [("slurm nodes", "4711"), ("slurm array", "16_2")]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "ranks"), [("auto", 1), ("ddp", 1), ("ddp", 2)])
@pytest.mark.parametrize(("environment", "job"), QUEUES)
@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_a_job_of_slurm_is_put_back_into_the_queue_after_its_requeue_signal(
    tmp_path, kind, ranks, environment, job, name
):
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (tmp_path / "scontrol").chmod(0o755)
    flags = FLAGS | {"num_nodes": ranks}
    case = {"kind": kind, "adapter": "lora", "name": name, "flags": flags, "path": str(tmp_path)}
    ended = end_ranks("cases.preempted", ranks, tmp_path / "job", environment=environment, **case)
    assert ended.statuses == [128 + signal.Signals[name]] * ranks
    assert newest_readable(tmp_path / "job") is not None
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else "") == (f"requeue {job}\n" if name == "SIGUSR1" else "")


DDP = "lightning.pytorch.strategies.DDPStrategy"


@pytest.mark.slow
def test_torchrun_starts_two_nodes_and_the_command_line_continues_them_with_ranks_that_it_starts_itself(tmp_path):
    write_small(tmp_path, strategy=DDP, nodes=2)
    for status, said in torchrun_on_two_nodes([*ARGUMENTS, "--trainer.max_steps=1"], tmp_path):
        assert status == 0, said[-3000:]
    assert_saved_by_two_ranks(tmp_path, 1)
    write_small(tmp_path, strategy=DDP, devices=2)
    command = [sys.executable, "-m", "dmpo_lightning", *ARGUMENTS, "--trainer.max_steps=2"]
    done = subprocess.run(
        command, check=False, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_saved_by_two_ranks(tmp_path, 2)


def assert_saved_by_two_ranks(folder, steps: int) -> None:
    checkpoint = newest_readable(folder / "runs")
    assert checkpoint is not None
    saved = torch.load(checkpoint, weights_only=True)
    assert (saved["global_step"], len(saved["dmpo"]["ranks"])) == (steps, 2)


def torchrun_on_two_nodes(arguments, folder) -> list[tuple[int, str]]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    launcher += ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    nodes = [
        subprocess.Popen(
            [*launcher, f"--node_rank={node}", "-m", "dmpo_lightning", *arguments],
            cwd=folder,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in (0, 1)
    ]
    return [(node.wait(), said) for node in nodes for said in [node.communicate(timeout=400)[0]]]
