"""Runs sections one after the other in one process, and appends what they find to a file as it comes."""

import argparse
import time
import traceback
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.gpu.__main__ import add
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.sections import LIMITS, SECTIONS, machine, tests, versions
from benchmarks.gpu.sizes import SIZES


def run(options: argparse.Namespace) -> None:
    """All sections that were asked for; a failure is recorded and the next section is begun."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    bench, results = Bench(SIZES[options.size], device, dtype), options.output / "results.jsonl"
    add(results, versions=versions(device), size=options.size)
    if "machine" not in options.sections:  # a worker that takes over needs the card's measure too
        list(machine(bench))
    for name in options.sections:
        add(results, section=name, event="start", time=time.time())
        started = time.perf_counter()
        try:
            if name in options.plant:
                raise RuntimeError("a planted failure")
            extra = (options.output, LIMITS["tests"] - 10) if SECTIONS[name] is tests else ()
            for figure in SECTIONS[name](bench, *extra):
                add(results, section=name, **asdict(figure))
        except Exception:  # whatever a card, a driver or a library raises; the next section may still work
            add(results, section=name, error=traceback.format_exc())
            if device.type == "cuda" and _is_lost():
                raise
        finally:
            bench_seconds = time.perf_counter() - started
            add(results, section=name, event="end", seconds=round(bench_seconds, 1))


def _is_lost() -> bool:
    """Whether the device answers no more, as after an illegal access; a new process can use it again."""
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except RuntimeError:
        return True
    return False


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="benchmarks.gpu.worker")
    found.add_argument("--size", choices=SIZES, required=True)
    found.add_argument("--output", type=Path, required=True)
    found.add_argument("--sections", nargs="+", choices=list(SECTIONS), required=True)
    found.add_argument("--plant", nargs="*", default=[])
    return found


if __name__ == "__main__":
    run(parser().parse_args())
