"""The ablation: which runs a grid has, what is left of it, and what the page says of the table."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from benchmarks.ablation.__main__ import COLUMNS, append, finished
from benchmarks.ablation.__main__ import main as run_grid
from benchmarks.ablation.comparison import regime, side_by_side
from benchmarks.ablation.grid import Grid
from benchmarks.ablation.results import curves, differences, main, table

ABLATION = Path(__file__).parents[2] / "benchmarks" / "ablation"
METHODS = ("plain", "twice")
GRID = """
table: table.csv
steps: 8
evaluate_every: 4
collapsed: 0.02
problems:
  one: {config: one.yaml, options: [--model.group_size=2]}
  two: {config: two.yaml, options: []}
common: {prompt_weight: equal, model.num_iterations: 1}
methods:
  plain: {baseline: none}
  twice: {baseline: group, model.num_iterations: 2}
learning_rates: [0.1, 0.2]
schedules: [constant, decayed]
seeds: [0, 1]
"""


@pytest.fixture
def grid(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(GRID)
    return Grid.read(path)


def rows(run, *rates):
    own = dict.fromkeys(COLUMNS, "0") | {name: getattr(run, name) for name in COLUMNS[:6]}
    errors = {"sampled_se": 0.03, "greedy_se": 0.04}
    return [own | errors | {"step": 4 * at, "sampled": rate, "greedy": rate / 2} for at, rate in enumerate(rates)]


def test_a_grid_is_every_combination_seed_by_seed(grid):
    assert len(grid.runs) == len({run.identity for run in grid.runs}) == 32
    assert [run.seed for run in grid.runs] == [0] * 16 + [1] * 16


def test_several_passes_are_more_steps_and_evaluations_at_the_same_rollouts(grid):
    plain, twice = grid.runs[0], grid.runs[1]
    assert (plain.steps, twice.steps) == (8, 16)
    assert "--trainer.val_check_interval=8" in twice.arguments
    assert {"--model.num_iterations=2", "--model.objective.baseline=group"} <= set(twice.arguments)
    common = {"--model.num_iterations=1", "--model.objective.prompt_weight=equal"}
    assert {"--model.lr_scheduler=null", *common} <= set(plain.arguments)


def test_other_seeds_follow_at_the_best_setting_of_each_method_and_no_sooner(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(GRID.replace("seeds: [0, 1]", "seeds: [0]\nseeds_at_best: [1, 2]"))
    grid = Grid.read(path)
    rates = {run.identity: 0.1 * (run.schedule == "decayed") + (run.lr == 0.1) for run in grid.runs}
    first = grid.runs[0].identity
    assert [run.identity for run in grid.missing({key: rate for key, rate in rates.items() if key != first})] == [first]
    repeats = grid.missing(rates)
    assert [(run.lr, run.schedule) for run in repeats] == [(0.1, "decayed")] * 8
    assert {(run.problem, run.method, run.seed) for run in repeats} == set(product(("one", "two"), METHODS, (1, 2)))
    assert grid.missing(rates | {run.identity: 0.0 for run in repeats}) == []


def test_methods_are_shipped_overlays_and_combinations_of_parts(tmp_path):
    path = tmp_path / "grid.yaml"
    methods = """methods:
  - mine: {overlay: wd1}
    none: {baseline: none, by_problem: {two: {baseline: group}}}
  - fixed: {model.reference_refresh_interval: null}
"""
    path.write_text(GRID[: GRID.index("methods:")] + methods + GRID[GRID.index("learning_rates:") :])
    grid = Grid.read(path)
    by_name = {(run.problem, run.method): set(run.arguments) for run in grid.runs}
    assert {"--model.objective=dmpo_lightning.objectives.WD1", "--model.reference_refresh_interval=null"} <= by_name[
        "one", "mine, fixed"
    ]
    assert "--model.objective.baseline=none" in by_name["one", "none, fixed"]
    assert "--model.objective.baseline=group" in by_name["two", "none, fixed"]


@pytest.mark.parametrize("name", ["grid", "side_by_side", "regime"])
def test_shipped_grids_are_read(name):
    assert Grid.read(ABLATION / f"{name}.yaml").runs


def test_what_the_table_holds_is_not_run_again(grid, tmp_path):
    path = tmp_path / "table.csv"
    assert grid.missing(finished(path)) == list(grid.runs)
    append(path, rows(grid.runs[0], 0.5, 0.6))
    append(path, rows(grid.runs[3], 0.5, 0.6))
    assert grid.missing(finished(path)) == [run for run in grid.runs if run not in (grid.runs[0], grid.runs[3])]


def test_the_page_counts_runs_below_the_base_and_marks_the_best(grid, tmp_path):
    path = tmp_path / "table.csv"
    by_method = {
        method: [run for run in grid.runs if run.method == method and run.problem == "one"]
        for method in ("plain", "twice")
    }
    for run in by_method["plain"]:
        append(path, rows(run, 0.5, 0.9, 0.4 if run.seed else 0.6))
    for run in by_method["twice"]:
        append(path, rows(run, 0.5, 0.7))
    append(path, rows(replace(by_method["plain"][0], method="control"), 0.5, 0.45))
    found = curves(path)["one"]
    grid_columns = [(lr, schedule) for schedule in ("constant", "decayed") for lr in (0.1, 0.2)]
    lines = table(found, ["plain", "twice", "control"], grid_columns)
    assert lines[0].startswith("| method | 0.1, constant | 0.2, constant | 0.1, decayed")
    assert lines[0].endswith("| all | all, T = 1 | all, greedy | best | below the base |")
    assert lines[2].startswith("| plain | 0.50 ± 0.14 |")
    assert lines[2].endswith("| 0.50 ± 0.11 | 0.50 ± 0.11 | 0.25 ± 0.05 | **0.90 ± 0.00** | 4 of 8 (4) |")
    assert lines[3].startswith("| twice | " + " | ".join(["**0.70 ± 0.00**"] * 6) + " | **0.35 ± 0.00** | 0.70")
    assert lines[4] == "| control | 0.45 |  |  |  |  |  |  |  | 1 of 1 (0) |"
    found["twice", 0.1, "constant"].pop()
    without = table(found, ["plain", "twice"], grid_columns)[3]
    assert without == "| twice | **0.70** | " + " | ".join(["**0.70 ± 0.00**"] * 3) + " |  |  |  |  | 0 of 7 (0) |"
    found["twice", 0.1, "constant"].append(found["twice", 0.2, "constant"][0])
    assert differences(found, ["plain", "twice", "control"], "plain") == []  # one run of `twice` is of another seed
    main(["--table", str(path), "--grid", str(tmp_path / "grid.yaml"), "--output", str(tmp_path / "results.md")])
    page = (tmp_path / "results.md").read_text()
    assert "Base: 0.50 sampled, 0.25 greedy. 16 runs" in page
    assert page.index("| twice |") < page.index("Controls and variants, seeds") < page.index("| control |")
    assert (tmp_path / "results_one.png").stat().st_size > 1000


def test_methods_are_compared_pair_by_pair(grid, tmp_path):
    path = tmp_path / "table.csv"
    runs = {method: [run for run in grid.runs if run.method == method and run.problem == "one"] for method in METHODS}
    for number, (plain, twice) in enumerate(zip(runs["plain"], runs["twice"], strict=True)):
        append(path, rows(plain, 0.5, 0.4 + 0.05 * number))
        append(path, rows(twice, 0.5, 0.5 + 0.05 * number + (0.02 if number % 2 else -0.02)))
    lines = differences(curves(path)["one"], METHODS, "plain")
    # Settings differ by much more than the methods do at each of them.
    error = 0.02 * (8 / 7) ** 0.5 / 8**0.5
    assert lines[2:] == [f"| twice | +0.100 ± {error:.3f} | +0.100 ± {error:.3f} | +0.050 ± {error / 2:.3f} |"]


def test_a_shortened_run_is_no_part_of_another_ones_curve(grid, tmp_path):
    path = tmp_path / "table.csv"
    append(path, rows(grid.runs[0], 0.5, 0.6, 0.7))
    append(path, rows(replace(grid.runs[0], steps=4), 0.5, 0.1))
    found = curves(path)["one"]["plain", 0.1, "constant"]
    assert [run.final for run in found] == [0.7, 0.1]


def test_a_smoke_run_has_a_table_of_its_own(capsys):
    with pytest.raises(SystemExit):
        run_grid(["--smoke"])
    assert "needs an `--output` of its own" in capsys.readouterr().err


def test_methods_are_chosen_by_name_and_an_unknown_one_is_an_error(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(GRID)
    assert {run.method for run in Grid.read(path, methods=["twice"]).runs} == {"twice"}
    with pytest.raises(ValueError, match=r"has no methods \['thrice'\]; it has plain, twice"):
        Grid.read(path, methods=["thrice"])


def test_methods_side_by_side_are_their_repeats_at_the_best_learning_rate(tmp_path):
    grid = Grid.read(ABLATION / "side_by_side.yaml", problems=["countdown_tiny"], methods=["DMPO", "wd1"])
    path = tmp_path / "side_by_side.csv"
    steps = {"DMPO": 0.4, "wd1": 0.2}
    for run in grid.runs:  # the lowest learning rate ends below the base
        append(path, rows(run, 0.2, *((0.1,) if run.lr == 3e-5 else (0.4, 0.6))))
    for run in grid.repeats:
        if run.lr == 1e-3:
            change = 0.01 * (run.seed - 2)
            own = rows(run, 0.2, *(0.2 + steps[run.method] * at + change for at in (1, 2)))
            append(path, [each | {"rollouts": 100 * at, "tokens_trained": 1e6 * at} for at, each in enumerate(own)])
    lines = list(side_by_side(path, tmp_path))
    header, _, first, second = [line for line in lines if line.startswith("|")]
    assert header.startswith("| method | T = 1 | greedy | mean | best | lr | rollouts to 0.450 | forwards to 0.450 |")
    # Student's t of two degrees of freedom at 97.5 %, by the square root of three; 0.45 is half between 0.45 and 0.75.
    half = 4.302653 * 0.01 / 3**0.5
    assert first.startswith(
        f"| DMPO | **1.000 ± {half:.3f}** | **0.500 ± {half / 2:.3f}** | **0.750 ± {half * 0.75:.3f}** |"
    )
    assert first.split(" | ")[5:9] == ["0.001", "**100**", "**3**", "6"]
    assert second.split(" | ")[5:10] == ["0.001", "200", "6", "6", "**4 of 5**"]
    assert (tmp_path / "side_by_side_countdown_tiny.png").stat().st_size > 1000


def test_the_papers_regime_has_a_line_for_each_baseline_and_form(tmp_path):
    grid = Grid.read(ABLATION / "regime.yaml")
    path = tmp_path / "regime.csv"
    for run in grid.runs:
        rate = 0.53 + 0.2 * ("bounded" in run.method) + 0.1 * (run.lr == 3e-4) - 0.4 * ("alpha 1" in run.method)
        append(path, rows(run, 0.5, rate))
    lines = list(regime(path, tmp_path))
    assert lines[0].endswith("| renewed, alpha 0.2 | renewed, alpha 1 | below the base |")
    assert lines[2] == f"| none, published |{' 0.47 / 0.40 | 0.47 / 0.40 | 0.17 / 0.10 |' * 2} 4 of 12 |"
    assert lines[3].startswith("| none, bounded | **0.62** / 0.55 |")
    assert len(lines) == 10
