"""Weak scaling on processors: rollouts per second of whole DMPO training on one rank and on two.

    python -m benchmarks.scaling --json

Each rank has the same number of prompts and one thread. Each setup has its own processes, with the environment that
torchrun gives them, in a gloo process group. All setups start first and then take turns buffer by buffer, so that they
see the same load on the machine; the first buffer of each is not timed. A buffer is sampling, scoring and all optimizer
steps. Efficiency is the rate on n ranks over n times that of one process without a strategy. Rank 0 counts, in the last
buffer, the all-gathers of weights and the bytes that it receives by them.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import IO, Any

import torch
import torch.distributed
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from tokenizers.pre_tokenizers import WhitespaceSplit

from benchmarks.options import at_least_three
from benchmarks.samplers import Size, random_policy
from dmpo_lightning import DMPO, WDCE, Backbone, ConfidenceSampler, ElboEstimator, LoRA, PromptLoader
from dmpo_lightning.distributed.strategies import FSDP2Strategy


@dataclass(frozen=True)
class Setup:
    """One line of the table."""

    strategy: str
    adapter: str
    gather: bool
    ranks: int


SETUPS = (
    Setup("single", "lora", gather=False, ranks=1),
    Setup("single", "full", gather=False, ranks=1),
    Setup("ddp", "lora", gather=False, ranks=2),
    Setup("ddp", "full", gather=False, ranks=2),
    Setup("fsdp2", "lora", gather=False, ranks=2),
    Setup("fsdp2", "lora", gather=True, ranks=2),
    Setup("fsdp2", "full", gather=False, ranks=2),
    Setup("fsdp2", "full", gather=True, ranks=2),
)


@dataclass(frozen=True)
class Work:
    """One rank's buffer: one prompt. The model has four layers of width 256."""

    vocab_size: int = 2048
    prompt_length: int = 100
    completion_length: int = 64
    group_size: int = 4
    denoising_steps: int = 16
    micro_batch_size: int = 2
    num_iterations: int = 2
    replicates: int = 2
    elbo_samples: int = 2

    @property
    def micro_batches(self) -> int:
        """Of one pass; they are one optimizer step."""
        return self.group_size // self.micro_batch_size


@dataclass
class Gathers:
    """All-gathers of weights since they were last read, and the bytes that this rank received from others by them."""

    count: int = 0
    received: int = 0

    def patch(self) -> None:
        """FSDP2 gathers by one function of torch, which has a new name since 2.13."""
        for name in ("all_gather_into_tensor", "all_gather_single"):
            if hasattr(torch.distributed, name):
                setattr(torch.distributed, name, self._counting(getattr(torch.distributed, name)))

    def _counting(self, gather: Callable[..., Any]) -> Callable[..., Any]:
        def counted(output_tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            ranks = torch.distributed.get_world_size()
            self.count += 1
            self.received += received_bytes(output_tensor.numel() * output_tensor.element_size(), ranks)
            return gather(output_tensor, *arguments, **options)

        return counted

    def read(self) -> dict[str, int]:
        """The counts, which start again."""
        found = {"gathers_per_buffer": self.count, "bytes_received_per_buffer": self.received}
        self.count = self.received = 0
        return found


def received_bytes(whole: int, ranks: int) -> int:
    """Of a gathered tensor, what a rank did not hold itself."""
    return whole * (ranks - 1) // ranks


def efficiency(rate: float, ranks: int, rate_of_one: float) -> float:
    """1 where ranks do not slow each other down."""
    return rate / (ranks * rate_of_one)


class Turns(Callback):
    """Says on ``answers`` that a buffer is done, and waits on the standard input for the word to begin the next one."""

    def __init__(self, work: Work, answers: IO[str]) -> None:
        self.batches = work.micro_batches * work.num_iterations
        self.answers, self.gathers = answers, Gathers()
        self.gathers.patch()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.batches == 0:
            self.say()
            sys.stdin.readline()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.say()

    def say(self) -> None:
        self.answers.write(json.dumps(self.gathers.read()) + "\n")
        self.answers.flush()


def reward(example: dict[str, str], completion: str) -> float:
    """Differs between completions, so that no rollout is left out."""
    return sum(map(ord, completion)) % 97 / 97


def trained(setup: Setup, work: Work, buffers: int) -> tuple[DMPO, PromptLoader]:
    """The module with random weights, and random prompts, of which each rank takes one per buffer."""
    size = Size(work.vocab_size, work.prompt_length, work.completion_length, work.group_size, work.denoising_steps)
    policy = random_policy(size)
    policy.tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    module = DMPO(
        Backbone(
            policy.model,
            tokenizer=policy.tokenizer,
            adapter=LoRA(r=16, alpha=32, dropout=0.0) if setup.adapter == "lora" else None,
            gradient_checkpointing=True,
        ),
        objective=WDCE(
            reward_temperature=1.0,
            baseline="group",
            replicates=work.replicates,
            estimator=ElboEstimator(work.elbo_samples),
        ),
        sampler=ConfidenceSampler(block_length=16, denoising_steps=work.denoising_steps),
        completion_length=work.completion_length,
        group_size=work.group_size,
        micro_batch_size=work.micro_batch_size,
        num_iterations=work.num_iterations,
        rows_per_forward=work.group_size,
        gather_for_generation=setup.gather,
        reward=reward,
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(work.vocab_size - 1, (setup.ranks * buffers, work.prompt_length), generator=generator)
    prompts = [{"prompt": " ".join(f"w{each}" for each in row)} for row in ids.tolist()]
    return module, PromptLoader(prompts, policy.tokenizer, batch_size=1)


def strategy_of(setup: Setup) -> Any:
    if setup.strategy == "single":
        return "auto"
    return {"ddp": DDPStrategy, "fsdp2": FSDP2Strategy}[setup.strategy](process_group_backend="gloo")


def run_rank(setup: Setup, work: Work, buffers: int) -> None:
    """What each process does; whatever libraries print goes to the standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    module, loader = trained(setup, work, buffers)
    trainer = Trainer(
        accelerator="cpu",
        devices=setup.ranks,
        strategy=strategy_of(setup),
        max_steps=buffers * work.num_iterations,
        accumulate_grad_batches=work.micro_batches,
        gradient_clip_val=0.2,
        callbacks=[Turns(work, answers)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)


@dataclass
class Job:
    """A setup's processes."""

    setup: Setup
    ranks: list["subprocess.Popen[str]"]
    logs: Path
    seconds: list[float] = field(default_factory=list)
    gathers: dict[str, int] = field(default_factory=dict)

    def wait(self) -> None:
        """Until every rank has answered.

        Raises:
            RuntimeError: one has ended instead; with the end of what it printed.
        """
        for rank, process in enumerate(self.ranks):
            assert process.stdout is not None
            answer = process.stdout.readline()
            if not answer:
                log = (self.logs / f"{rank}.log").read_text()
                raise RuntimeError(f"Rank {rank} of {self.setup} ended without an answer:\n{log[-4000:]}")
            if rank == 0:
                self.gathers = json.loads(answer)

    def run_buffer(self) -> None:
        """One buffer on all ranks; notes how long it took."""
        start = time.perf_counter()
        for process in self.ranks:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        self.wait()
        self.seconds.append(time.perf_counter() - start)


@contextmanager
def started(setup: Setup, work: Work, buffers: int, folder: Path, port: int) -> Iterator[Job]:
    """A job whose processes start; they are ended on the way out."""
    folder.mkdir()
    root = Path(__file__).parents[1]
    paths = [str(root), str(root / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    shared = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    task = json.dumps({"setup": asdict(setup), "work": asdict(work), "buffers": buffers})
    command = [sys.executable, "-m", "benchmarks.scaling", "--rank_of", task]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": folder}
    job = Job(setup, [], folder)
    try:
        for rank in range(setup.ranks):
            environment = os.environ | shared | torchrun(rank, setup.ranks, port)
            with (folder / f"{rank}.log").open("w") as log:
                job.ranks.append(subprocess.Popen(command, env=environment, stderr=log, **pipes))
        yield job
    finally:
        for process in job.ranks:
            process.kill()
            process.communicate()


def torchrun(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun sets for the processes of one node."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "none"}
    return where | {name: str(number) for name, number in numbers.items()}


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def measure(setups: Sequence[Setup], work: Work, repeats: int) -> list[dict[str, Any]]:
    """A line for each setup; ``setups`` holds a single process for each adapter."""
    buffers = 1 + repeats
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        jobs = [
            stack.enter_context(started(setup, work, buffers, Path(folder) / str(number), port))
            for number, (setup, port) in enumerate(zip(setups, free_ports(len(setups)), strict=True))
        ]
        for job in jobs:
            job.wait()
        for _ in range(buffers):
            for job in jobs:
                job.run_buffer()
    rates = [job.setup.ranks * work.group_size / median(job.seconds[1:]) for job in jobs]
    return summary(setups, rates, [job.gathers for job in jobs])


def summary(setups: Sequence[Setup], rates: Sequence[float], gathers: Sequence[dict[str, int]]) -> list[dict[str, Any]]:
    """Lines with the efficiency against the single process of the same adapter."""
    ones = {each.adapter: rate for each, rate in zip(setups, rates, strict=True) if each.ranks == 1}
    return [
        asdict(each)
        | {
            "rollouts_per_second": round(rate, 3),
            "efficiency": round(efficiency(rate, each.ranks, ones[each.adapter]), 3),
        }
        | counts
        for each, rate, counts in zip(setups, rates, gathers, strict=True)
    ]


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Of the lines, in columns."""
    rows = [list(lines[0]), *([str(value) for value in line.values()] for line in lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.scaling", description=__doc__.partition("\n\n")[0])
    for name in Work.__annotations__:
        parser.add_argument(f"--{name}", type=int, default=getattr(Work, name))
    parser.add_argument("--repeats", type=at_least_three, default=3)
    parser.add_argument("--json", action="store_true", help="a line of JSON for each setup")
    parser.add_argument("--rank_of", type=json.loads, help=argparse.SUPPRESS)
    options = vars(parser.parse_args(arguments))
    as_json, repeats, task = options.pop("json"), options.pop("repeats"), options.pop("rank_of")
    if task is not None:
        run_rank(Setup(**task["setup"]), Work(**task["work"]), task["buffers"])
        return
    lines = measure(SETUPS, Work(**options), repeats)
    print("\n".join(map(json.dumps, lines)) if as_json else table(lines))


if __name__ == "__main__":
    main()
