"""Tables and figures of an ablation, from its table of runs: docs/results.md and docs/results_*.png.

python -m benchmarks.ablation.results
"""

import argparse
import csv
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from benchmarks.ablation.grid import Grid

ROOT = Path(__file__).parents[2]
Setting = tuple[str, float, str]
"""Method, learning rate and schedule."""


@dataclass(frozen=True)
class Curve:
    """The evaluations of one run, in the order of its steps. Rates are the better of sampled and greedy."""

    seed: int
    steps: tuple[int, ...]
    sampled: tuple[float, ...]
    greedy: tuple[float, ...]
    rollouts: int

    @property
    def base(self) -> float:
        """The better rate of the untrained base."""
        return max(self.sampled[0], self.greedy[0])

    @property
    def final(self) -> float:
        """The better rate at the end."""
        return max(self.sampled[-1], self.greedy[-1])

    @property
    def best(self) -> float:
        """The best rate of any evaluation after the first."""
        return max(*self.sampled[1:], *self.greedy[1:])


def curves(path: Path) -> dict[str, dict[Setting, list[Curve]]]:
    """All runs of a table, by problem and setting, both in the order in which they appear first."""
    rows: dict[tuple[str, ...], list[dict[str, str]]] = defaultdict(list)
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            rows[row["problem"], row["method"], row["lr"], row["schedule"], row["seed"]].append(row)
    found: dict[str, dict[Setting, list[Curve]]] = defaultdict(lambda: defaultdict(list))
    for (problem, method, lr, schedule, seed), run in rows.items():
        curve = Curve(
            seed=int(seed),
            steps=tuple(int(row["step"]) for row in run),
            sampled=tuple(float(row["sampled"]) for row in run),
            greedy=tuple(float(row["greedy"]) for row in run),
            rollouts=int(run[-1]["rollouts"]),
        )
        found[problem][method, float(lr), schedule].append(curve)
    return found


def band(values: Sequence[float]) -> str:
    """The mean, with the standard deviation where there are several values; nothing where there is none."""
    if not values:
        return ""
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def table(settings: Mapping[Setting, list[Curve]]) -> list[str]:
    """One line per method: final rates at each learning rate and schedule and over all of them, the best rate of any
    evaluation, and how many runs ended below their base.
    """
    columns = sorted({(lr, schedule) for _, lr, schedule in settings}, key=lambda each: (each[1], each[0]))
    rates = {method: _final_rates(settings, method, columns) for method in dict.fromkeys(key[0] for key in settings)}
    _add_means(rates)
    # No method is the best of one.
    filled = [list(filter(None, column)) for column in zip(*rates.values(), strict=True)]
    best = [max(map(mean, column)) if len(column) > 1 else None for column in filled]
    names = [f"{lr:g}, {schedule}" for lr, schedule in columns]
    lines = [f"| method | {' | '.join(names)} | all | best | below the base |", "|---|" + "---|" * (len(columns) + 3)]
    for method, of_method in rates.items():
        texts = [
            f"**{band(each)}**" if each and mean(each) == highest else band(each)
            for each, highest in zip(of_method, best, strict=True)
        ]
        runs = [run for setting, each in settings.items() if setting[0] == method for run in each]
        below = sum(run.final < run.base for run in runs)
        lines.append(
            f"| {method} | {' | '.join(texts)} | {max(run.best for run in runs):.2f} | {below} of {len(runs)} |"
        )
    return lines


def _final_rates(
    settings: Mapping[Setting, list[Curve]], method: str, columns: Sequence[tuple[float, str]]
) -> list[list[float]]:
    """Of the seeds in each column."""
    return [[run.final for run in settings.get((method, *column), [])] for column in columns]


def _add_means(rates: Mapping[str, list[list[float]]]) -> None:
    """A last column of all runs, for methods that miss none: other means would be over other runs."""
    most = [max(map(len, column)) for column in zip(*rates.values(), strict=True)]
    for of_method in rates.values():
        is_whole = list(map(len, of_method)) == most
        of_method.append([rate for column in of_method for rate in column] if is_whole else [])


def _seeds(settings: Mapping[Setting, list[Curve]]) -> list[int]:
    return sorted({run.seed for runs in settings.values() for run in runs})


def draw(settings: Mapping[Setting, list[Curve]], path: Path) -> None:
    """Sampled solve rates over optimizer steps: one panel per learning rate and schedule, one line per seed."""
    from matplotlib.figure import Figure

    columns = sorted({(lr, schedule) for _, lr, schedule in settings}, key=lambda each: (each[1], each[0]))
    methods = list(dict.fromkeys(method for method, _, _ in settings))
    figure = Figure(figsize=(4 * len(columns), 4), layout="constrained")
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for panel, (lr, schedule) in zip(panels, columns, strict=True):
        for number, method in enumerate(methods):
            for run in settings.get((method, lr, schedule), []):
                label = method if run is settings[method, lr, schedule][0] else None
                panel.plot(run.steps, run.sampled, color=f"C{number}", linewidth=1, label=label)
        panel.set(title=f"learning rate {lr:g}, {schedule}", xlabel="optimizer step", ylim=(0, 1))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("solve rate at temperature 1")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=100)


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page and its figures, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=Path(__file__).with_name("results.csv"))
    parser.add_argument("--grid", type=Path, default=Path(__file__).with_name("grid.yaml"), help="others are controls")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results.md")
    options = parser.parse_args(arguments)
    found = curves(options.table)
    text = [Path(__file__).with_name("preface.md").read_text(encoding="utf-8").rstrip()]
    of_grid = {run.method for run in Grid.read(options.grid).runs}
    for problem, settings in found.items():
        figure = options.output.with_name(f"results_{problem}.png")
        methods = {setting: each for setting, each in settings.items() if setting[0] in of_grid}
        controls = {setting: each for setting, each in settings.items() if setting[0] not in of_grid}
        if not methods:
            raise SystemExit(f"{options.table} has runs of {problem}, but none of a method of {options.grid}.")
        draw(methods, figure)
        runs = [run for each in methods.values() for run in each]
        text += [
            f"\n## {problem}\n",
            f"Base: {runs[0].sampled[0]:.2f} sampled, {runs[0].greedy[0]:.2f} greedy. {len(runs)} runs of "
            f"{max(run.rollouts for run in runs)} rollouts; seeds {_seeds(methods)}.\n",
            *table(methods),
            f"\n![Learning curves]({figure.name})",
        ]
        if controls:
            named = f"Controls and variants on {problem} (`variants.yaml`, `passes.yaml`), seeds {_seeds(controls)}:"
            text += [f"\n{named}\n", *table(controls)]
    options.output.write_text("\n".join(text) + "\n", encoding="utf-8")
    print(f"Written: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
