"""The grid of an ablation, read from a file, and the command line of each of its runs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).parents[2] / "configs"
OF_RUN = ("problem", "method", "lr", "schedule", "seed", "steps")
"""The fields of a `Run` that tell it from all others."""


@dataclass(frozen=True)
class Run:
    """One training run. Its fields but the last tell it from all others, and are columns of the table."""

    problem: str
    method: str
    lr: float
    schedule: str
    seed: int
    steps: int
    arguments: tuple[str, ...]

    @property
    def identity(self) -> tuple[str, ...]:
        """As the table holds it, in text."""
        return tuple(str(getattr(self, name)) for name in OF_RUN)


@dataclass(frozen=True)
class Grid:
    """All runs of a file.

    ``runs`` come first. Of ``repeats``, which have other seeds, those follow whose learning rate and schedule were the
    best of their problem and method in ``runs``.
    """

    runs: tuple[Run, ...]
    repeats: tuple[Run, ...]
    collapsed: float
    table: Path

    @classmethod
    def read(cls, path: Path, *, problems: Sequence[str] = (), methods: Sequence[str] = ()) -> "Grid":
        """From YAML, see grid.yaml and side_by_side.yaml. ``problems`` and ``methods`` leave others out.

        Raises:
            ValueError: the grid has no problem or method of such a name.
        """
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
        options["methods"] = _methods(options["methods"])
        for kind, names in (("problems", problems), ("methods", methods)):
            if unknown := set(names) - set(options[kind]):
                raise ValueError(f"{path} has no {kind} {sorted(unknown)}; it has {', '.join(options[kind])}.")
            options[kind] = {name: each for name, each in options[kind].items() if not names or name in names}
        runs, repeats = (tuple(_runs(options, options.get(seeds, ()))) for seeds in ("seeds", "seeds_at_best"))
        return cls(runs, repeats, options["collapsed"], path.parent / options["table"])

    def missing(self, done: Mapping[tuple[str, ...], float]) -> list[Run]:
        """What is left to run before a table tells more. ``done`` has the final rate of each run that is in it."""
        wanted = self.runs if any(run.identity not in done for run in self.runs) else self.at_best(done)
        return [run for run in wanted if run.identity not in done]

    def at_best(self, done: Mapping[tuple[str, ...], float]) -> list[Run]:
        """The repeats at the setting that has the highest final rate, and of equal ones the lowest learning rate.

        A run that has collapsed counts like all others, with the rate that it had. A method whose first runs are not
        all ``done`` has no best one yet.
        """
        tuned: dict[tuple[str, str], list[Run]] = {}
        for run in self.runs:
            tuned.setdefault((run.problem, run.method), []).append(run)
        best = {
            key: max(runs, key=lambda run: (done[run.identity], -run.lr))
            for key, runs in tuned.items()
            if all(run.identity in done for run in runs)
        }
        settings = {(*key, run.lr, run.schedule) for key, run in best.items()}
        return [run for run in self.repeats if (run.problem, run.method, run.lr, run.schedule) in settings]


def _methods(given: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Methods by name. Those of a list are all combinations of one of each of its parts."""
    parts = [given] if isinstance(given, Mapping) else given
    return {
        ", ".join(name for name, _ in chosen): {key: each for _, own in chosen for key, each in own.items()}
        for chosen in product(*(part.items() for part in parts))
    }


def _runs(options: Mapping[str, Any], seeds: Sequence[int]) -> Iterator[Run]:
    steps, every = options["steps"], options["evaluate_every"]
    problems = options["problems"]
    # One seed of everything first, so that an unfinished grid is a whole grid of fewer seeds.
    for seed, problem in product(seeds, problems):
        for lr, schedule, method in product(options["learning_rates"], options["schedules"], options["methods"]):
            choices = _choices(options["common"], options["methods"][method], problem)
            passes = choices["model.num_iterations"]
            arguments = {
                "--config": problems[problem]["config"],
                "--seed_everything": seed,
                # Several passes over each buffer are more steps on the same rollouts.
                "--trainer.max_steps": steps * passes,
                "--trainer.val_check_interval": every * passes,
                "--model.optimizer.lr": lr,
                **_schedule(schedule, steps * passes),
                **{_option(name): "null" if value is None else value for name, value in choices.items()},
            }
            given = tuple(f"{name}={value}" for name, value in arguments.items())
            yield Run(problem, method, lr, schedule, seed, steps * passes, (*given, *problems[problem]["options"]))


def _choices(common: Mapping[str, Any], method: Mapping[str, Any], problem: str) -> dict[str, Any]:
    """The options of a method: those of the shipped overlay that it names, its own, and its own for a problem."""
    own = dict(method)
    overlay, by_problem = own.pop("overlay", None), own.pop("by_problem", {})
    published: dict[str, Any] = {}
    if overlay is not None:
        text = (CONFIGS / "objectives" / f"{overlay}.yaml").read_text(encoding="utf-8")
        objective = yaml.safe_load(text)["model"]["init_args"]["objective"]
        published = {"model.objective": objective["class_path"], **objective.get("init_args", {})}
    return {**common, **published, **own, **by_problem.get(problem, {})}


def _option(name: str) -> str:
    """Options of the objective need no more than their name."""
    return f"--{name}" if "." in name else f"--model.objective.{name}"


def _schedule(name: str, steps: int) -> dict[str, Any]:
    if name == "constant":
        return {"--model.lr_scheduler": "null"}
    if name == "decayed":
        return {"--model.lr_scheduler.total_iters": steps}
    raise ValueError(f"`schedules` must be of constant and decayed, got {name!r}.")
