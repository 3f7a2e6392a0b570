"""Sections of docs/results.md: methods side by side at their best learning rates, and the paper's regime."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
from scipy.stats import t

from benchmarks.ablation.grid import OF_RUN, Grid

OURS = "DMPO"
"""Its variants' names begin with it."""
SAMPLED, GREEDY, MEAN = "T = 1", "greedy", "mean"
FORWARDS = "forwards"
"""Millions of tokens: one with a gradient costs as much as three without."""


def evaluations(path: Path) -> pd.DataFrame:
    """All rows of a table, with what is derived of each."""
    rows = pd.read_csv(path).rename(columns={"sampled": SAMPLED, "greedy": GREEDY})
    rows[MEAN] = (rows[SAMPLED] + rows[GREEDY]) / 2
    rows[FORWARDS] = (rows["tokens_forward"] + 3 * rows["tokens_trained"]) / 1e6
    return rows


def last(rows: pd.DataFrame) -> pd.DataFrame:
    """The last evaluation of each run, the best of those behind the first, and what it gained on its base."""
    runs = rows.groupby(list(OF_RUN), sort=False)
    ended = runs.last()
    trained = rows[rows["step"] > 0].groupby(list(OF_RUN), sort=False)
    ended["best"] = trained[MEAN].max()
    ended["gain"] = ended[MEAN] - runs[MEAN].first()
    return ended.reset_index()


def bold(text: str, is_best: bool) -> str:
    """The best of a column in the pages' way."""
    return f"**{text}**" if is_best else text


def band(values: Sequence[float]) -> str:
    """The mean, and the half width of its 95 % band by Student's t where there are several values."""
    each = pd.Series(values)
    if len(each) < 2:
        return f"{each.mean():.3f}"
    return f"{each.mean():.3f} ± {t.ppf(0.975, len(each) - 1) * each.sem():.3f}"


def reached(curve: pd.DataFrame, rate: float, cost: str) -> float:
    """What a method has spent when the mean of its runs comes to a rate, between evaluations on a straight line."""
    before: tuple[float, float] | None = None
    for at, value in zip(curve[cost], curve[MEAN], strict=True):
        if value >= rate:
            if before is None:
                return 0.0
            share = (rate - before[1]) / (value - before[1])
            return float(before[0] + share * (at - before[0]))
        before = (at, value)
    return float("nan")


def side_by_side(table: Path, figures: Path) -> Iterator[str]:
    """The lines of the section, problem by problem, of those whose repeats have been made."""
    rows = evaluations(table)
    seeds = {run.seed for run in Grid.read(Path(__file__).with_name("side_by_side.yaml")).repeats}
    for problem, of_problem in rows.groupby("problem", sort=False):
        repeats = of_problem[of_problem["seed"].isin(seeds)]
        if repeats.empty:
            continue
        yield f"\n### {problem}\n"
        base = of_problem[of_problem["step"] == 0].iloc[0]
        yield f"Base: {base[SAMPLED]:.3f} sampled, {base[GREEDY]:.3f} greedy.\n"
        curves, ended = _curves(repeats), last(of_problem)
        yield from _lines(_of_methods(ended[~ended["seed"].isin(seeds)], ended[ended["seed"].isin(seeds)], curves))
        figure = figures / f"side_by_side_{problem}.png"
        draw(curves, figure)
        yield f"\n![Mean of the two rates against rollouts and against forwards]({figure.name})"


def _curves(repeats: pd.DataFrame) -> pd.DataFrame:
    """The mean and the spread of the repeats of each method at each evaluation that all of them reached."""
    by_step = repeats.groupby(["method", "step"], sort=False)
    curves = by_step[["rollouts", FORWARDS, MEAN]].mean()
    curves["error"] = by_step[MEAN].sem() * t.ppf(0.975, by_step.size() - 1)
    whole = by_step.size() == repeats.groupby("method")["seed"].nunique().reindex(curves.index, level="method")
    return curves[whole].reset_index("step", drop=True)


def _of_methods(tuned: pd.DataFrame, repeats: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """A line a method, the highest mean rate first. Columns hold lists of the seeds' values, or numbers."""
    of_seed = repeats.groupby("method", sort=False)
    lines = of_seed[[SAMPLED, GREEDY, MEAN, "best"]].agg(list)
    lines["lr"] = of_seed["lr"].first()
    target = max(each for name, each in of_seed[MEAN].mean().items() if not name.startswith(OURS))
    for cost in ("rollouts", FORWARDS):
        lines[f"{cost} to {target:.3f}"] = [reached(curves.loc[[name]], target, cost) for name in lines.index]
    lines[FORWARDS] = of_seed[FORWARDS].mean()
    first = tuned.groupby("method")["gain"]
    lines["rates above the base"] = [
        f"{(first.get_group(name) > 0).sum()} of {first.size()[name]}" for name in lines.index
    ]
    for name in ("distinct_correct", "entropy", "pass_at_group"):
        lines[name.replace("_", " ")] = of_seed[name].mean()
    return lines.sort_values(MEAN, key=lambda column: column.map(lambda each: -sum(each) / len(each)))


def _lines(table: pd.DataFrame) -> Iterator[str]:
    yield f"| method | {' | '.join(table)} |"
    yield "|---" * (len(table.columns) + 1) + "|"
    cells = {name: _cells(name, column) for name, column in table.items()}
    for at, method in enumerate(table.index):
        yield f"| {method} | {' | '.join(column[at] for column in cells.values())} |"


def _cells(name: str, column: pd.Series) -> list[str]:
    """A column in text, with its best in bold: the lowest cost, the highest of all others. Of settings none is best."""
    if name == "lr":
        return [f"{each:g}" for each in column]
    if name == "rates above the base":
        most = column.max()
        return [bold(each, each == most) for each in column]
    values = column.map(lambda each: pd.Series(each).mean())
    is_cost = name.startswith(("rollouts", FORWARDS))
    best = values.min() if is_cost else values.max()
    if name == FORWARDS:
        best = None  # a run that collapsed was stopped, which is cheap
    digits = 0 if is_cost else 3
    texts = [band(each) if isinstance(each, list) else f"{each:.{digits}f}" for each in column]
    return ["" if pd.isna(each) else bold(text, each == best) for each, text in zip(values, texts, strict=True)]


def draw(curves: pd.DataFrame, path: Path) -> None:
    """The mean rate of each method against both costs: ours and the three best others in colours, with their bands."""
    from matplotlib.figure import Figure

    final = curves.groupby(level="method")[MEAN].last()
    named = [OURS, *final[~final.index.str.startswith(OURS)].nlargest(3).index]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for panel, cost in zip(figure.subplots(1, 2, sharey=True), ("rollouts", FORWARDS), strict=True):
        for method, curve in curves.groupby(level="method", sort=False):
            if method not in named:
                panel.plot(curve[cost], curve[MEAN], color="0.75", linewidth=0.8)
                continue
            color = f"C{named.index(method)}"
            panel.plot(curve[cost], curve[MEAN], color=color, linewidth=2, label=method)
            low, high = curve[MEAN] - curve["error"], curve[MEAN] + curve["error"]
            panel.fill_between(curve[cost], low, high, color=color, alpha=0.15, linewidth=0)
        panel.set(xlabel="rollouts" if cost == "rollouts" else "tokens, those with a gradient thrice (millions)")
        panel.grid(alpha=0.2)
    figure.axes[0].set_ylabel("mean of T = 1 and greedy")
    figure.axes[0].legend(loc="best", fontsize="small")
    figure.savefig(path, dpi=100)


def regime(table: Path, _: Path) -> Iterator[str]:
    """A line for each baseline and form, a column for each reference and alpha: final rates at all learning rates."""
    runs = last(evaluations(table))
    runs[["line", "setting"]] = runs["method"].str.extract(r"(\w+, \w+), (.*)").to_numpy()
    settings = runs["setting"].unique()
    highest = runs.groupby("setting")[MEAN].max()
    yield f"| baseline, form | {' | '.join(settings)} | below the base |"
    yield "|---" * (len(settings) + 2) + "|"
    for line, own in runs.sort_values("lr", kind="stable").groupby("line", sort=False):
        cells = (
            " / ".join(
                bold(f"{value:.2f}", value == highest[setting]) for value in own[own["setting"] == setting][MEAN]
            )
            for setting in settings
        )
        yield f"| {line} | {' | '.join(cells)} | {(own['gain'] < 0).sum()} of {len(own)} |"
