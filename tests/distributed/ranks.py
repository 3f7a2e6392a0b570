"""Runs a function as several ranks. A server process imports everything once and forks the ranks of each case, so that
a case costs no imports.

    facts = run_ranks("cases.train", 2, tmp_path, strategy="fsdp2")
"""

import atexit
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
PATHS = [HERE, HERE.parent, HERE.parent / "modules", HERE.parent.parent]


@dataclass
class Ended:
    """How the ranks of a case ended: exit statuses (negative: by a signal), and after how many seconds."""

    statuses: list[int]
    seconds: list[float]
    folder: Path

    def facts(self) -> list[dict]:
        return [json.loads((self.folder / f"rank{rank}.json").read_text()) for rank in range(len(self.statuses))]

    def log(self, rank: int) -> str:
        return (self.folder / f"rank{rank}.log").read_text()


def run_ranks(case: str, ranks: int, folder: Path, *, timeout: float = 120, **options) -> list[dict]:
    """What each rank of ``case`` (module.function) returned; fails with the log of one that did not end well."""
    ended = end_ranks(case, ranks, folder, timeout=timeout, **options)
    for rank, status in enumerate(ended.statuses):
        assert status == 0, (
            f"rank {rank} ended with {status} after {ended.seconds[rank]:.0f} s\n{ended.log(rank)[-6000:]}"
        )
    return ended.facts()


def end_ranks(
    case: str,
    ranks: int,
    folder: Path,
    *,
    timeout: float = 120,
    grace: float = 20,
    environment: str = "torchrun",
    **options,
) -> Ended:
    """As `run_ranks`, however the ranks end; they are killed at the time-out, or ``grace`` seconds after one failed."""
    folder.mkdir(parents=True, exist_ok=True)
    server = _server()
    limits = {"timeout": timeout, "grace": grace, "environment": environment}
    request = {"case": case, "ranks": ranks, "folder": str(folder), "options": options} | limits
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    answer = json.loads(server.stdout.readline())
    return Ended(answer["statuses"], answer["seconds"], folder)


@cache
def _server() -> subprocess.Popen:
    own = filter(None, [os.environ.get("PYTHONPATH")])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([*map(str, PATHS), *own]),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
    }
    command = [sys.executable, str(HERE / "ranks.py")]
    server = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.kill)
    return server


LATER = ("bitsandbytes", "deepspeed", "peft", "torch._dynamo", "torch.distributed.checkpoint", "xml.etree.ElementTree")
"""What cases import on the way, which took most of the time of short ones when each rank did it."""


def serve() -> None:
    for name in ("cases", *LATER):
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed by libraries is no answer
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(_run(request)) + "\n")
        answers.flush()


def _run(request: dict) -> dict:
    started, port = time.monotonic(), free_port()
    processes = [_fork(request, rank, port) for rank in range(request["ranks"])]
    statuses: dict[int, int] = {}
    seconds: dict[int, float] = {}
    while len(statuses) < len(processes):
        failures = [seconds[process] + request["grace"] for process, status in statuses.items() if status]
        for process in set(processes) - set(statuses):
            if time.monotonic() - started > min([request["timeout"], *failures]):
                os.kill(process, signal.SIGKILL)
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                statuses[process], seconds[process] = os.waitstatus_to_exitcode(status), time.monotonic() - started
        time.sleep(0.02)
    return {"statuses": [statuses[each] for each in processes], "seconds": [seconds[each] for each in processes]}


def _fork(request: dict, rank: int, port: int) -> int:
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        folder, ranks = Path(request["folder"]), request["ranks"]
        log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(folder)
        os.environ.update(ENVIRONMENTS[request["environment"]](rank, ranks, port))
        module, _, name = request["case"].rpartition(".")
        facts = getattr(importlib.import_module(module), name)(**request["options"])
        (folder / f"rank{rank}.json").write_text(json.dumps(facts))
        status = 0
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def torchrun(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun sets for the processes of one node."""
    sizes = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0, "RANK": rank, "LOCAL_RANK": rank}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "none"}
    return where | {name: str(value) for name, value in sizes.items()}


def torchrun_nodes(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun sets for nodes of one process each."""
    return torchrun(rank, ranks, port) | {"LOCAL_WORLD_SIZE": "1", "GROUP_RANK": str(rank), "LOCAL_RANK": "0"}


def slurm_nodes(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What SLURM sets for nodes of one task each; Lightning takes the address from the list of nodes."""
    facts = {"NTASKS": ranks, "NNODES": ranks, "PROCID": rank, "NODEID": rank, "LOCALID": 0, "NTASKS_PER_NODE": 1}
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "dmpo", "SLURM_NODELIST": "127.0.0.1", "MASTER_PORT": str(port)}
    return job | {f"SLURM_{name}": str(value) for name, value in facts.items()}


def slurm_array(rank: int, ranks: int, port: int) -> dict[str, str]:
    """As `slurm_nodes`, of a task of a job array."""
    return slurm_nodes(rank, ranks, port) | {"SLURM_ARRAY_JOB_ID": "16", "SLURM_ARRAY_TASK_ID": "2"}


ENVIRONMENTS = {
    "torchrun": torchrun,
    "torchrun nodes": torchrun_nodes,
    "slurm nodes": slurm_nodes,
    "slurm array": slurm_array,
}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


if __name__ == "__main__":
    serve()
