"""Functions of a user that score: which of them are taken, and what they say of a completion.

Imports no torch, so that worker processes start fast.
"""

import functools
import inspect
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

from dmpo_lightning.tasks.base import Example, Verdict

TAKES = ("an example", "a completion")
"""What a score function is called with."""
LARGEST = 1e30
"""The largest score. Training computes in single precision, which ends at 3.4e38, with scores that are added up over a
group and divided by the reward temperature."""
STOPPING = (signal.SIGINT, signal.SIGTERM)
"""Signals by which people and schedulers end a run."""
PROMISED = "neither `async def` nor `yield` is run here; return the result, of `asyncio.run(...)` if need be"
_PROMISES = (inspect.iscoroutinefunction, inspect.isasyncgenfunction, inspect.isgeneratorfunction)
ScoreFunction = Callable[[Example, str], "float | Mapping[str, float]"]
BatchScoreFunction = Callable[[Sequence[Example], Sequence[str]], "Sequence[float | Mapping[str, float]]"]
Check = Callable[[Example, str], Any]
"""Returns a `Verdict`. A return type here would refuse functions without annotations on the command line."""


class CombinedScore:
    """Several score functions as one, whose components carry their names.

    Args:
        functions: by name. One that returns named components itself gives ``name/component``.

    Raises:
        ValueError: no functions, or something else than a function of an example and a completion.

    Example:
        >>> from dmpo_lightning import CombinedScore
        >>> right = lambda example, completion: float(completion == example["answer"])
        >>> brief = lambda example, completion: 1 - len(completion) / 100
        >>> CombinedScore({"right": right, "brief": brief})({"answer": "4"}, "4")
        {'right': 1.0, 'brief': 0.99}

        ```yaml
        reward:
          class_path: dmpo_lightning.Reward
          init_args:
            score:
              class_path: dmpo_lightning.CombinedScore
              init_args:
                functions: {right: my_rewards.is_right, short: my_rewards.is_short}
            weights: {right: 1.0, short: 0.1}
        ```
    """

    def __init__(self, functions: Mapping[str, ScoreFunction]) -> None:
        if not functions:
            raise ValueError("`functions` must name at least one score function.")
        for name, function in functions.items():
            check_function(f"functions.{name}", function, TAKES)
        self.functions = dict(functions)

    def __call__(self, example: Example, completion: str) -> dict[str, float]:
        """The components of every function. An exception of one is an exception of all."""
        return {
            f"{name}/{part}" if isinstance(value, Mapping) else name: number
            for name, function in self.functions.items()
            for value in [function(example, completion)]
            for part, number in named_numbers(value).items()
        }


class ScoreError(RuntimeError):
    """A completion could not be scored. The message is what was raised, and so is the cause in the same process."""

    @classmethod
    def of(cls, error: BaseException) -> "ScoreError":
        """The same for every exception, so that it can be pickled, whatever that exception is made of."""
        if isinstance(error, PromiseError):
            return error
        try:
            failure = cls(repr(error))
        # Whoever raises it may have got its words wrong too.
        except BaseException:
            failure = cls(type(error).__name__)
        failure.__cause__ = error
        return failure


class PromiseError(ScoreError):
    """A function gave something that has yet to be run, for one completion as for any other."""


@dataclass(frozen=True)
class Judgement:
    """What is said of one completion."""

    numbers: dict[str, float]
    """The components of the score function."""
    verdict: Verdict | None
    """Of the check, where there is one."""

    @property
    def components(self) -> dict[str, float]:
        """All components. Those of the verdict take the place of others of the same names."""
        return self.numbers if self.verdict is None else self.numbers | self.verdict.components


@dataclass(frozen=True)
class Judge:
    """Calls a score function and a check on one completion."""

    score: ScoreFunction
    check: Check | None

    def __call__(self, example: Example, completion: str, raw: str) -> Judgement | ScoreError:
        """Scores the completion and checks its text with special tokens.

        Whatever these functions raise is a failure of the completion, because one bad completion must not end a long
        run, and a library may take itself for a program and exit.
        """
        try:
            numbers = named_numbers(self.score(example, completion))
            verdict = None if self.check is None else _value("check", self.check(example, raw))
            if self.check is not None and not isinstance(verdict, Verdict):
                raise TypeError(f"the check must return a Verdict, got {verdict!r}")
            return Judgement(numbers, verdict)
        except BaseException as error:
            return ScoreError.of(error)


@dataclass(frozen=True)
class BatchJudge:
    """Calls a batched score function once for all completions, and a check on each."""

    score: BatchScoreFunction
    check: Check | None

    def __call__(
        self, examples: Sequence[Example], completions: Sequence[str], raw: Sequence[str]
    ) -> "list[Judgement | ScoreError]":
        """As `Judge` does it. If the score function raises, or miscounts, all of them fail."""
        try:
            value = self.score(examples, completions)
            # It may yield one result after the other.
            values = list(value if inspect.isgenerator(value) else _value("score", value))
            if len(values) != len(completions):
                raise ValueError(f"batched scoring must return {len(completions)} results, got {len(values)}")
        except BaseException as error:
            return [ScoreError.of(error)] * len(completions)
        rows = zip(values, examples, completions, raw, strict=True)
        return [Judge(lambda *_, v=value: v, self.check)(*row) for value, *row in rows]  # type: ignore[arg-type]


def call_each(judge: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    """What a judge gives for each tuple of arguments, in this process.

    A judge makes a failure of whatever is raised under it, an interrupt too. One that a signal from outside has raised
    is the user's, and is raised here, even where a score function has caught it.
    """
    received: list[BaseException] = []
    # Only there handlers run, and can be set.
    is_main = threading.current_thread() is threading.main_thread()
    handlers: dict[int, Any] = {
        each: handler for each in STOPPING if is_main and callable(handler := signal.getsignal(each))
    }

    def handle(number: int, frame: FrameType | None) -> None:
        try:
            handlers[number](number, frame)
        except BaseException as error:
            received.append(error)
            raise

    results = []
    try:
        for each in handlers:
            signal.signal(each, handle)
        for call in calls:
            results.append(judge(*call))
            if received:
                raise received[0]
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)
    return results


def _value(option: str, value: Any) -> Any:
    """What a function returned. Raises PromiseError for what has yet to be run."""
    if inspect.isawaitable(value) or inspect.isgenerator(value) or inspect.isasyncgen(value):
        # Else Python warns that it was never awaited.
        if inspect.iscoroutine(value):
            value.close()
        raise PromiseError(f"`{option}` returned a {type(value).__name__}: {PROMISED}")
    return value


def named_numbers(value: Any) -> dict[str, float]:
    """Named numbers. A bare number is called ``reward``.

    Raises:
        ValueError: a number that is not finite, or too large for what is computed with it.
        TypeError: what is no number, a text of digits included.
        PromiseError: what has yet to be run.
    """
    value = _value("score", value)
    components = value.items() if isinstance(value, Mapping) else [("reward", value)]
    if any(isinstance(number, str | bytes) for _, number in components):
        raise TypeError(f"the score must be a number, got {value!r:.200}")
    numbers = {str(name): float(_value(str(name), number)) for name, number in components}
    if not numbers:
        raise ValueError("the score must hold at least one component, got none")
    # A NaN is not smaller either.
    if not all(abs(number) <= LARGEST for number in numbers.values()):
        raise ValueError(f"the score must be finite, and at most {LARGEST:g}, got {numbers}")
    return numbers


def check_function(
    option: str, function: Callable[..., Any], takes: tuple[str, ...], *, may_yield: bool = False
) -> None:
    """Refuses what cannot be meant: a function of Python itself, or one that does not take what it will be given.

    A configuration names functions by dotted path. One that names ``os.system`` would hand it what a model wrote.

    Raises:
        ValueError: named by the option.
    """
    bare = function
    while isinstance(bare, functools.partial):
        bare = bare.func
    module = str(getattr(bare, "__module__", None) or type(bare).__module__)
    name = f"{module}.{getattr(function, '__qualname__', type(function).__name__)}"
    wanted = f"`{option}` must be a function of {' and '.join(takes) if len(takes) < 3 else ', '.join(takes)}"
    if module.partition(".")[0] in sys.stdlib_module_names:
        raise ValueError(f"{wanted} of your own, got {name} of Python itself.")
    if isinstance(function, type):
        raise ValueError(f"{wanted}, got {name}, which is a class.")
    # An object is called by the method of its class.
    promises = _PROMISES[:2] if may_yield else _PROMISES
    if any(is_promise(each) for each in (bare, type(bare).__call__) for is_promise in promises):
        raise ValueError(f"{wanted} that returns its result, got {name}: {PROMISED}.")
    try:
        inspect.signature(function).bind(*takes)
    except TypeError as error:
        raise ValueError(f"{wanted}, got {name}: {error}.") from error
    # Some functions of C extensions do not say what they take.
    except ValueError:
        pass
