"""Tables and figures of an ablation, from its table of runs: docs/results.md and docs/results_*.png.

python -m benchmarks.ablation.results
"""

import argparse
import csv
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import hypot, sqrt
from pathlib import Path
from statistics import mean, median, stdev

from benchmarks.ablation.comparison import bold, regime, side_by_side
from benchmarks.ablation.grid import OF_RUN, Grid

ROOT = Path(__file__).parents[2]
RATES = ("sampled", "greedy")
IDEAS = {
    "as published": "as published",
    "informative": "as published, without equal groups",
    "likelihood": "bounded: p instead of log p",
}
"""Names of figures for the forms of the loss, by the second half of a method's name."""
Setting = tuple[str, float, str]
"""Method, learning rate and schedule."""


@dataclass(frozen=True)
class Curve:
    """The evaluations of one run, in the order of its steps."""

    seed: int
    steps: tuple[int, ...]
    sampled: tuple[float, ...]
    greedy: tuple[float, ...]
    errors: tuple[float, ...]
    """The standard error of the better of the two rates."""
    rollouts: int

    @property
    def better(self) -> tuple[float, ...]:
        """The better of sampled and greedy, as the problems are solved by whichever decoding is best."""
        return tuple(map(max, self.sampled, self.greedy))

    @property
    def final(self) -> float:
        """The better rate at the end."""
        return self.better[-1]

    @property
    def best(self) -> float:
        """The best rate of any evaluation after the first."""
        return max(self.better[1:])

    def is_below(self, errors: float = 0.0) -> bool:
        """Whether it ended below its untrained base, by more than so many standard errors of the difference."""
        return self.better[0] - self.final > errors * hypot(self.errors[0], self.errors[-1])


def curves(path: Path) -> dict[str, dict[Setting, list[Curve]]]:
    """All runs of a table, by problem and setting, both in the order in which they appear first."""
    rows: dict[tuple[str, ...], list[dict[str, str]]] = defaultdict(list)
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            rows[tuple(row[name] for name in OF_RUN)].append(row)
    found: dict[str, dict[Setting, list[Curve]]] = defaultdict(lambda: defaultdict(list))
    for run in rows.values():
        first = run[0]
        found[first["problem"]][first["method"], float(first["lr"]), first["schedule"]].append(_curve(run))
    return found


def _curve(rows: Sequence[Mapping[str, str]]) -> Curve:
    pairs = [sorted(((float(row[name]), float(row[f"{name}_se"])) for name in RATES), reverse=True) for row in rows]
    sampled, greedy = (tuple(float(row[name]) for row in rows) for name in RATES)
    return Curve(
        seed=int(rows[0]["seed"]),
        steps=tuple(int(row["step"]) for row in rows),
        sampled=sampled,
        greedy=greedy,
        errors=tuple(better[1] for better, _ in pairs),
        rollouts=int(rows[-1]["rollouts"]),
    )


def band(values: Sequence[float]) -> str:
    """The mean, with the standard deviation where there are several values; nothing where there is none."""
    if not values:
        return ""
    return f"{mean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def table(
    settings: Mapping[Setting, list[Curve]], methods: Sequence[str], grid: Sequence[tuple[float, str]]
) -> list[str]:
    """One line per method: final rates at each learning rate and schedule and over all of them, sampled and greedy by
    themselves, the best rate of any evaluation, and how many runs ended below their base.

    ``grid`` has the learning rates and schedules that means over all runs need.
    """
    columns = _columns(settings)
    cells = {method: _cells(settings, method, columns, grid) for method in methods}
    # No method is the best of one.
    filled = [list(filter(None, column)) for column in zip(*cells.values(), strict=True)]
    highest = [max(map(mean, column)) if len(column) > 1 else None for column in filled]
    names = [f"{lr:g}, {schedule}" for lr, schedule in columns] + ["all", "all, T = 1", "all, greedy", "best"]
    lines = [f"| method | {' | '.join(names)} | below the base |", "|---|" + "---|" * (len(names) + 1)]
    for method, of_method in cells.items():
        texts = [
            bold(band(each), bool(each) and mean(each) == most) for each, most in zip(of_method, highest, strict=True)
        ]
        runs = _runs(settings, method)
        below, clearly = sum(run.is_below() for run in runs), sum(run.is_below(2) for run in runs)
        lines.append(f"| {method} | {' | '.join(texts)} | {below} of {len(runs)} ({clearly}) |")
    return lines


def _columns(settings: Mapping[Setting, list[Curve]]) -> list[tuple[float, str]]:
    """Learning rates and schedules."""
    return sorted({(lr, schedule) for _, lr, schedule in settings}, key=lambda each: (each[1], each[0]))


def _runs(settings: Mapping[Setting, list[Curve]], method: str) -> list[Curve]:
    return [run for setting, each in settings.items() if setting[0] == method for run in each]


def _cells(
    settings: Mapping[Setting, list[Curve]],
    method: str,
    columns: Sequence[tuple[float, str]],
    grid: Sequence[tuple[float, str]],
) -> list[list[float]]:
    """The rates of each cell of a line. Those over all runs need a method that has equally many in every column of the
    grid: means over other runs would not compare.
    """
    final = [[run.final for run in settings.get((method, *column), [])] for column in columns]
    by_column = [settings.get((method, *column), []) for column in grid]
    whole = [run for each in by_column for run in each] if len({len(each) for each in by_column}) == 1 else []
    over_all = zip(*((run.final, run.sampled[-1], run.greedy[-1], run.best) for run in whole), strict=True)
    return final + ([list(each) for each in over_all] if whole else [[], [], [], []])


def differences(settings: Mapping[Setting, list[Curve]], methods: Sequence[str], reference: str) -> list[str]:
    """One line per method: final rates minus those of ``reference`` at the same settings and seeds, with the standard
    error of their mean. Methods that lack one of its runs are left out.
    """
    lines = [f"| method minus `{reference}` | better of both | T = 1 | greedy |", "|---|---|---|---|"]
    of_reference = _finals(settings, reference)
    for method in methods:
        found = _finals(settings, method)
        if method == reference or not found.keys() >= of_reference.keys() or len(of_reference) < 2:
            continue
        pairs = [(found[each], of_reference[each]) for each in of_reference]
        columns = zip(*([a - b for a, b in zip(*pair, strict=True)] for pair in pairs), strict=True)
        cells = (f"{mean(each):+.3f} ± {stdev(each) / sqrt(len(each)):.3f}" for each in columns)
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines if len(lines) > 2 else []


def _finals(settings: Mapping[Setting, list[Curve]], method: str) -> dict[tuple[float, str, int], tuple[float, ...]]:
    """The better rate at the end, and the two, by learning rate, schedule and seed."""
    return {
        (lr, schedule, run.seed): (run.final, run.sampled[-1], run.greedy[-1])
        for (name, lr, schedule), runs in settings.items()
        if name == method
        for run in runs
    }


def _seeds(settings: Mapping[Setting, list[Curve]]) -> list[int]:
    return sorted({run.seed for runs in settings.values() for run in runs})


def draw(settings: Mapping[Setting, list[Curve]], methods: Sequence[str], path: Path) -> None:
    """Rates over optimizer steps: a panel and a colour per idea, with each of its runs, their median, and how many
    of them ended below the base.
    """
    from matplotlib.figure import Figure

    ideas: dict[str, list[str]] = defaultdict(list)
    for method in methods:
        ideas[_idea(method)].append(method)
    figure = Figure(figsize=(9, 3.1 * -(-len(ideas) // 2)), layout="constrained")
    panels = list(figure.subplots(-(-len(ideas) // 2), 2, sharex=True, sharey=True, squeeze=False).flat)
    for panel in panels[len(ideas) :]:
        panel.set_axis_off()
    for number, ((idea, own), panel) in enumerate(zip(ideas.items(), panels, strict=False)):
        runs = [run for method in own for run in _runs(settings, method)]
        steps = max((run.steps for run in runs), key=len)
        rates = [_held(run, len(steps)) for run in runs]
        panel.axhline(runs[0].better[0], color="0.4", linestyle="--", linewidth=1)
        panel.annotate("base", (steps[-1], runs[0].better[0]), (4, 3), textcoords="offset points", color="0.4")
        panel.plot(steps, list(zip(*rates, strict=True)), color=f"C{number}", linewidth=0.7, alpha=0.4)
        panel.plot(steps, list(map(median, zip(*rates, strict=True))), color=f"C{number}", linewidth=3)
        panel.set_title(idea, loc="left", fontsize="medium", color=f"C{number}")
        below = f"{sum(run.is_below() for run in runs)} of {len(runs)} runs end below the base"
        panel.text(0.02, 0.04, below, transform=panel.transAxes, fontsize="small")
        panel.set(xlim=(0, steps[-1] * 1.12), ylim=(0, 1))
        panel.grid(alpha=0.2)
    figure.supxlabel("optimizer step")
    figure.supylabel("solve rate, the better of T = 1 and greedy")
    figure.savefig(path, dpi=100)


def _idea(method: str) -> str:
    """What methods of one panel share: their form of the loss. One without a form is called by its whole name."""
    return IDEAS.get(method.partition(", ")[2], method)


def _held(run: Curve, count: int) -> list[float]:
    """Its rates, of which the last stays for the evaluations that a collapsed run did not reach."""
    return [*run.better, *[run.final] * (count - len(run.better))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page and its figures, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=Path(__file__).with_name("results.csv"))
    parser.add_argument("--grid", type=Path, default=Path(__file__).with_name("grid.yaml"), help="others are controls")
    parser.add_argument("--reference", default="none, informative", help="the method that others are compared with")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results.md")
    options = parser.parse_args(arguments)
    found = curves(options.table)
    text = [Path(__file__).with_name("preface.md").read_text(encoding="utf-8").rstrip()]
    of_grid = list(dict.fromkeys(run.method for run in Grid.read(options.grid).runs))
    for problem, settings in found.items():
        figure = options.output.with_name(f"results_{problem}.png")
        present = list(dict.fromkeys(method for method, _, _ in settings))
        methods = [method for method in of_grid if method in present]
        if not methods:
            raise SystemExit(f"{options.table} has runs of {problem}, but none of a method of {options.grid}.")
        main_part = {setting: each for setting, each in settings.items() if setting[0] in of_grid}
        draw(main_part, methods, figure)
        runs = [run for each in main_part.values() for run in each]
        text += [
            f"\n## {problem}\n",
            f"Base: {runs[0].sampled[0]:.2f} sampled, {runs[0].greedy[0]:.2f} greedy. {len(runs)} runs of "
            f"{max(run.rollouts for run in runs)} rollouts; seeds {_seeds(main_part)}.\n",
            *table(main_part, methods, _columns(main_part)),
            f"\n![Learning curves]({figure.name})",
        ]
        if compared := differences(main_part, methods, options.reference):
            text += ["\nAt the same settings and seeds, mean and its standard error:\n", *compared]
        if controls := [method for method in present if method not in of_grid]:
            others = {setting: each for setting, each in settings.items() if setting[0] in controls}
            text += [
                f"\nControls and variants, seeds {_seeds(others)}:\n",
                *table(others, controls, _columns(main_part)),
            ]
    for name, section in (("side_by_side", side_by_side), ("regime", regime)):
        if (others := options.table.with_name(f"{name}.csv")).is_file():
            text.append("\n" + Path(__file__).with_name(f"{name}.md").read_text(encoding="utf-8").rstrip())
            text.append("\n" + "\n".join(section(others, options.output.parent)))
    options.output.write_text("\n".join(text) + "\n", encoding="utf-8")
    print(f"Written: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
