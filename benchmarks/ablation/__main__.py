"""Runs what is missing of the grid, on one thread a run, and appends each finished run to the table.

    python -m benchmarks.ablation --workers 2        # goes on where an earlier call stopped
    python -m benchmarks.ablation --grid benchmarks/ablation/side_by_side.yaml
    python -m benchmarks.ablation --smoke --output smoke.csv    # four steps of one run per problem
    python -m benchmarks.ablation.results            # figures and docs/results.md from the table

A run is in the table with all of its evaluations or not at all.
"""

import argparse
import csv
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.ablation.grid import OF_RUN, Grid, Run
from benchmarks.ablation.training import execute

HERE = Path(__file__).parent
COLUMNS = (
    *OF_RUN,
    *("step", "rollouts", "seconds", "sampled", "sampled_se", "greedy", "greedy_se"),
    *("reward", "ess", "informative", "entropy", "distinct_correct", "pass_at_group"),
    *("tokens_forward", "tokens_trained"),
    *("torch", "lightning", "dmpo_lightning"),
)


def finished(path: Path) -> dict[tuple[str, ...], float]:
    """The runs that a table holds, each with the mean of its final sampled and greedy rates."""
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        # The last row of a run stays.
        return {
            tuple(row[name] for name in OF_RUN): (float(row["sampled"]) + float(row["greedy"])) / 2
            for row in csv.DictReader(file)
        }


def append(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Adds the rows of one run, and the header where there is none. A table keeps the columns that it began with."""
    columns: Sequence[str] = COLUMNS
    is_new = not path.exists()
    if not is_new:
        with path.open(encoding="utf-8", newline="") as file:
            columns = next(csv.reader(file))
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n", extrasaction="ignore")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the grid and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=Path, default=HERE / "grid.yaml")
    parser.add_argument("--output", type=Path, help="the table; that of the grid by default")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--problems", nargs="*", default=(), help="of the grid; all by default")
    parser.add_argument("--methods", nargs="*", default=(), help="of the grid; all by default")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="ends after so long; what runs is lost")
    parser.add_argument("--smoke", action="store_true", help="four steps of the last run per problem")
    options = parser.parse_args(arguments)
    if options.smoke and options.output is None:
        parser.error("`--smoke` needs an `--output` of its own: its runs are no results.")
    grid = Grid.read(options.grid, problems=options.problems, methods=options.methods)
    table = options.output or grid.table
    ends = time.monotonic() + options.seconds
    # One thread each: two small runs side by side are faster than one after the other on two threads.
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    for runs in _rounds(grid, table, smoke=options.smoke):
        with multiprocessing.get_context("spawn").Pool(options.workers, maxtasksperchild=16) as pool:
            tasks = ((run, grid.collapsed) for run in runs)
            for done, rows in enumerate(pool.imap_unordered(execute, tasks), 1):
                append(table, rows)
                print(f"{done}/{len(runs)} {_described(rows[-1])}", flush=True)
                if time.monotonic() > ends:
                    pool.terminate()
                    return 0
    return 0


def _rounds(grid: Grid, table: Path, *, smoke: bool) -> Iterator[list[Run]]:
    """What is missing, and then what is missing of the repeats that the runs before have chosen."""
    if smoke:
        missing = grid.missing(finished(table))
        yield [_shortened(run) for run in {run.problem: run for run in missing}.values()]
        return
    while missing := grid.missing(finished(table)):
        yield missing


def _described(last: dict[str, Any]) -> str:
    run = f"{last['problem']}, {last['method']}, lr {last['lr']:g} {last['schedule']}, seed {last['seed']}"
    return f"{run}: {last['sampled']:.3f} {last['greedy']:.3f} after {last['step']} steps, {last['seconds']:.0f} s"


def _shortened(run: Run) -> Run:
    """Its first four steps on little data, under another number of steps than the run itself has."""
    sizes = "{train: 512, validation: 16, test: 16}"
    shorter = ("--trainer.max_steps=4", "--trainer.val_check_interval=4", f"--data.sizes={sizes}")
    return replace(run, steps=4, arguments=(*run.arguments, *shorter))


if __name__ == "__main__":
    sys.exit(main())
