"""The grid of an ablation, read from a file, and the command line of each of its runs."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

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
    """All runs of a file."""

    runs: tuple[Run, ...]
    collapsed: float

    @classmethod
    def read(cls, path: Path, *, problems: Sequence[str] = (), methods: Sequence[str] = ()) -> "Grid":
        """From YAML, see grid.yaml. ``problems`` and ``methods`` leave others out.

        Raises:
            ValueError: the grid has no problem or method of such a name.
        """
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
        for kind, names in (("problems", problems), ("methods", methods)):
            if unknown := set(names) - set(options[kind]):
                raise ValueError(f"{path} has no {kind} {sorted(unknown)}; it has {', '.join(options[kind])}.")
            options[kind] = {name: each for name, each in options[kind].items() if not names or name in names}
        return cls(tuple(_runs(options)), options["collapsed"])

    def missing(self, done: set[tuple[str, ...]]) -> list[Run]:
        """What is left to run."""
        return [run for run in self.runs if run.identity not in done]


def _runs(options: Mapping[str, Any]) -> Iterator[Run]:
    steps, every = options["steps"], options["evaluate_every"]
    problems = options["problems"]
    # One seed of everything first, so that an unfinished grid is a whole grid of fewer seeds.
    for seed, problem in product(options["seeds"], problems):
        for lr, schedule, method in product(options["learning_rates"], options["schedules"], options["methods"]):
            choices = options["common"] | options["methods"][method]
            passes = choices["model.num_iterations"]
            arguments = {
                "--config": problems[problem]["config"],
                "--seed_everything": seed,
                # Several passes over each buffer are more steps on the same rollouts.
                "--trainer.max_steps": steps * passes,
                "--trainer.val_check_interval": every * passes,
                "--model.optimizer.lr": lr,
                **_schedule(schedule, steps * passes),
                **{_option(name): value for name, value in choices.items()},
            }
            given = tuple(f"{name}={value}" for name, value in arguments.items())
            yield Run(problem, method, lr, schedule, seed, steps * passes, (*given, *problems[problem]["options"]))


def _option(name: str) -> str:
    """Options of the objective need no more than their name."""
    return f"--{name}" if "." in name else f"--model.objective.{name}"


def _schedule(name: str, steps: int) -> dict[str, Any]:
    if name == "constant":
        return {"--model.lr_scheduler": "null"}
    if name == "decayed":
        return {"--model.lr_scheduler.total_iters": steps}
    raise ValueError(f"`schedules` must be of constant and decayed, got {name!r}.")
