"""Proves and measures the project on a GPU, within a time budget.

    python -m benchmarks.gpu --output results            # LLaDA-8B's shape on the card, in nine minutes
    python -m benchmarks.gpu --output results --size tiny    # the same code in small; needs no GPU

Sections run one after the other, the most valuable first, each within a time limit of its own. Figures are appended to
results.jsonl as they come, so that an abort loses nothing. A section that fails is recorded with its traceback, one
that takes too long is ended, and the next is begun. At the end stands a table, with the card and the versions.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

NAMES = ("machine", "tests", "forward", "buffer", "sampling", "plain", "blocks", "scoring", "training", "qlora", "full")
DEFAULT_LIMIT = 60.0


def main(arguments: list[str] | None = None) -> int:
    """Runs what was asked for; the status is 1 if any section failed."""
    options = parsed(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    results = options.output / "results.jsonl"
    results.write_text("", encoding="utf-8")
    watch(options, results)
    records = read(results)
    print(table(records))
    return int(any("error" in record for record in records))


def watch(options: argparse.Namespace, results: Path) -> None:
    """Keeps a worker at work on what is left, until all is done or the time is up.

    A worker is another process, because a kernel that hangs and a card that is lost end with their process alone.
    """
    end, left = time.monotonic() + options.budget, list(options.only or NAMES)
    while left and time.monotonic() < end:
        command = [sys.executable, "-m", "benchmarks.gpu.worker", "--size", options.size, "--output"]
        command += [str(options.output), "--sections", *left, "--plant", *options.plant]
        worker = subprocess.Popen(command, start_new_session=True)
        running = _attended(worker, results, end, options.limit)
        done = {record["section"] for record in read(results) if record.get("event") == "end"}
        left = [name for name in left if name not in done and name != running]
    for name in left:
        add(results, section=name, error=f"not begun: the budget of {options.budget:.0f} s was used up")


def _attended(worker: "subprocess.Popen[bytes]", results: Path, end: float, limit: float | None) -> str | None:
    """Waits for a worker; the section that it did not survive, if any."""
    section, since, limits = None, time.monotonic(), section_limits(limit)
    while worker.poll() is None:
        time.sleep(0.2)
        now = running_section(read(results))
        if now != section:
            section, since = now, time.monotonic()
        allowed = limits.get(section or "", DEFAULT_LIMIT if limit is None else limit)
        late = section is not None and time.monotonic() - since > allowed
        if late or time.monotonic() > end:
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
            if section is None:
                return None
            why = f"ended after {allowed:.0f} s" if late else "ended with the budget"
            add(results, section=section, error=why, event="end")
            return section
    lost = running_section(read(results))
    if lost is not None:
        add(results, section=lost, error=f"the worker ended with status {worker.returncode}", event="end")
    elif worker.returncode:
        # It could not even begin: a new one would fail alike.
        add(results, section="worker", error=f"the worker ended with status {worker.returncode}")
        raise SystemExit(f"benchmarks.gpu: no worker can start, status {worker.returncode}; see above.")
    return lost


def section_limits(limit: float | None) -> dict[str, float]:
    """Seconds of each section that has more than the others."""
    return {} if limit is not None else {"machine": 40, "tests": 170, "buffer": 100, "sampling": 110, "training": 120}


def running_section(records: list[dict[str, Any]]) -> str | None:
    """The section that has begun last and not ended."""
    running = None
    for record in records:
        if record.get("event") == "start":
            running = record["section"]
        elif record.get("event") == "end":
            running = None
    return running


def read(results: Path) -> list[dict[str, Any]]:
    """Whole lines; the last may be half written."""
    lines = results.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]


def add(results: Path, **record: Any) -> None:
    """One more line."""
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def table(records: list[dict[str, Any]]) -> str:
    """Figures beside their floors, section by section, and what failed."""
    versions = next((record["versions"] for record in records if "versions" in record), {})
    lines = ["", ", ".join(f"{name} {value}" for name, value in versions.items()), ""]
    lines.append(f"{'section':10} {'':46} {'measured':>10} {'floor':>9} {'ratio':>6}  unit")
    for record in records:
        if "error" in record:
            lines.append(f"{record['section']:10} FAILED: {record['error'].strip().splitlines()[-1]}")
        elif "value" in record:
            floor = record["floor"]
            beside = f"{floor:9.4g} {record['value'] / floor:6.2f}" if floor else f"{'':9} {'':6}"
            note = f"  {record['note']}" if record["note"] else ""
            name = f"{record['section']:10} {record['name'][:46]:46}"
            lines.append(f"{name} {record['value']:10.4g} {beside}  {record['unit']}{note}")
    return "\n".join(lines)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--output", type=Path, default=Path("gpu_results"), help="folder of results.jsonl and tests.log"
    )
    parser.add_argument("--budget", type=float, default=530.0, metavar="SECONDS", help="for all of it (530)")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="for each section, in place of its own")
    parser.add_argument("--only", nargs="+", choices=NAMES, help="these sections, in this order")
    parser.add_argument("--size", choices=("tiny", "8b"), default="8b")
    parser.add_argument("--plant", nargs="*", default=[], help="sections that shall fail, to see that others go on")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
