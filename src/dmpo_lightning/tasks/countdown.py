r"""Countdown: reach a target with given numbers, each used exactly once."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from dmpo_lightning.tasks.answers import final_answer, first_block, last_block, last_boxed, unbox
from dmpo_lightning.tasks.arithmetic import ExpressionError, exact_value, integers, operands, python_value
from dmpo_lightning.tasks.base import Example, Verdict
from dmpo_lightning.tasks.benchmark import EVAL_FORMAT, TRAIN_FORMAT, Benchmark
from dmpo_lightning.tasks.numbers import OPERATORS, plain

TOLERANCE = 1e-5
_PUBLISHED_OPERATORS = {"\\div": "/", "\\times": "*", "\\cdot": "*"}
# A command ends where no letter follows it: `\leftarrow` is another one than `\left`.
_NOISE = re.compile(r"\\(?:left|right|[Bb]igg?[lr]?|displaystyle|q?quad)(?![a-z])|\\[()\[\] ]|\$")
_PART = r"\s*(?:\{([^{}]*)\}|([0-9]))"
_FRACTION = re.compile(rf"\\[dtc]?frac(?![a-z]){_PART}{_PART}")
_BRACKETS = str.maketrans("{}[]", "()()")
_SYMBOLS = "0123456789+-*/() "
_EQUATION = re.compile(r"[0-9+\-*/() ]=[0-9. ]")
MAX_TEXT = 1000
_EVAL_REQUEST = (
    "Using only the provided numbers, create an arithmetic expression that evaluates to exactly the provided target "
    "number. You may use the operations +, -, *, and / as needed, but each number must be used exactly once. Think "
    "step-by-step. After reasoning, provide only your final expression inside \\boxed{} tags without including an "
    "equals sign or the target number. For example: \\boxed{a + b * c}"
)
_TRAIN_QUESTION = (
    "Using only the numbers {numbers}, create an arithmetic expression that evaluates to exactly {target}. You must "
    "use all numbers from the list, and each number must be used exactly once. You may use the operations +, -, *, "
    "and / as needed. After reasoning, provide only your final expression inside <answer></answer> tags without "
    "including an equals sign or the target number. For example, if the numbers are [2, 3, 4] and the target is 5, a "
    "valid answer is: <answer>\n2*4-3\n</answer>"
)
_QUESTIONS = {"train": _TRAIN_QUESTION, "eval": "Numbers: {numbers}\nTarget: {target}"}


class Countdown(Benchmark):
    r"""Arithmetic puzzles. An example holds ``numbers`` and ``target``.

    Rewards ``published`` have one component, ``equation``. It is 1.0 for an answer tag with an expression that uses the
    numbers once each and is within 1e-5 of the target, and 0.1 for any other answer tag. Values are those of Python for
    the characters ``0-9 + - * / ( ) .``, so ``**`` and ``//`` count too.

    Rewards ``verified`` are ``format``, 0.1 for reasoning and answer in tags, and ``correctness``, 1.0 for an
    expression of ``+ - * /`` and parentheses that reaches the target in exact rational arithmetic.

    Example:
        >>> from dmpo_lightning import Countdown
        >>> Countdown().score({"numbers": [3, 5, 7], "target": 22}, "<answer>3 * 5 + 7</answer>")
        {'format': 0.0, 'correctness': 1.0}
    """

    verified_rewards = (0.1, 1.0)
    columns = ()
    fields = ("numbers", "target")
    instructions = {"train": TRAIN_FORMAT.removesuffix("\n"), "eval": _EVAL_REQUEST + EVAL_FORMAT}

    def task_text(self, example: Example) -> str:
        return _QUESTIONS[self.prompt_style].format(numbers=list(example["numbers"]), target=example["target"])

    def published_components(self, example: Example, completion: str) -> dict[str, float]:
        block = last_block(completion)
        if block is None:
            return {"equation": 0.0}
        return {"equation": 1.0 if published_hit(example, block.strip()) else 0.1}

    def published_check(self, example: Example, completion: str) -> Verdict:
        """As d1 evaluates: the last box, a text without boxes as a whole, else the first answer tag."""
        answer = unbox(last_boxed(completion))
        if answer is None:
            block = first_block(completion)
            answer = completion if block is None else block.strip()
        answer = published_expression(answer)
        # Numbers are read from the whole text, but the value is that of the stripped one.
        return Verdict(answer, published_hit(example, answer.strip()))

    def verified_check(self, example: Example, completion: str) -> Verdict:
        """Exact: the given numbers once each, ``+ - * /`` and parentheses, equal to the target.

        An equation counts by its left side, if all that follows its equals signs is the target.
        """
        answer = final_answer(completion)
        return Verdict(answer[:MAX_TEXT] or None, len(answer) <= MAX_TEXT and _is_solution(example, answer))

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Example:
        """Rows of ``input`` "30,100,93" and ``output`` "23", or ``nums`` and ``target`` as on the hub."""
        if "input" in row and "output" in row:
            return _example(str(row["input"]).split(","), row["output"])
        if "nums" in row and "target" in row:
            return _example(row["nums"], row["target"])
        raise ValueError("a row needs `input` and `output`, or `nums` and `target`")

    @classmethod
    def from_saved(cls, record: Mapping[str, Any]) -> Example:
        numbers, target = record["ground_truth"]
        return _example(numbers, target)


def _example(numbers: Sequence[Any], target: Any) -> Example:
    # A text is a sequence too, of which each digit would be a number.
    if isinstance(numbers, str) or not numbers:
        raise ValueError(f"numbers must be a list, got {numbers!r}")
    return {"numbers": [_whole(number) for number in numbers], "target": _whole(target)}


def _whole(number: Any) -> int:
    if isinstance(number, bool) or not isinstance(number, int | float | str):
        raise ValueError(f"numbers must be numbers or texts of digits, got {number!r}")
    if isinstance(number, float) and not number.is_integer():
        raise ValueError(f"numbers must be whole, got {number}")
    return int(number)


def published_hit(example: Example, expression: str) -> bool:
    """Whether the numbers are used exactly and Python's value is within 1e-5 of the target. An error is False."""
    try:
        if sorted(integers(expression)) != sorted(example["numbers"]):
            return False
        return abs(python_value(expression) - example["target"]) < TOLERANCE
    except (ExpressionError, OverflowError):
        return False


def published_expression(answer: str) -> str:
    """The left side of the first equation, else the whole answer, with LaTeX operators as symbols."""
    for latex, symbol in _PUBLISHED_OPERATORS.items():
        answer = answer.replace(latex, symbol)
    # In the published pattern a run of symbols comes before the equals sign. Each of them could start it, which takes
    # quadratic time, so the equals sign is searched first and the run is read backwards.
    equation = _EQUATION.search(answer)
    if equation is None:
        return answer
    before = answer[: equation.start() + 1]
    return before[len(before.rstrip(_SYMBOLS)) :].strip()


def _is_solution(example: Example, answer: str) -> bool:
    expression, *claims = _plain(answer).split("=")
    try:
        return (
            # `operands` would read 1.5 as the numbers 1 and 5.
            "." not in expression
            and _uses(example["numbers"], operands(expression))
            and all(exact_value(part) == example["target"] for part in (expression, *claims))
        )
    except ExpressionError:
        return False


def _uses(numbers: Sequence[int], used: Sequence[tuple[int, bool]]) -> bool:
    """Whether the operands are the numbers, each once. A sign makes a negative number, or belongs to a positive one."""
    signed = Counter(number for number, has_sign in used if has_sign)
    negative = Counter(-number for number in numbers if number < 0)
    return Counter(number for number, _ in used) == Counter(map(abs, numbers)) and negative <= signed


def _plain(answer: str) -> str:
    r"""The answer as an expression in ASCII: fractions with ``/``, all brackets round, no wrapping and no full stop."""
    for latex, symbol in _PUBLISHED_OPERATORS.items():
        answer = answer.replace(latex, symbol)
    answer = _NOISE.sub("", plain(answer).translate(OPERATORS)).strip().rstrip(".,;:")
    # From the inside out, and in parentheses, because what stands beside a fraction binds to it as a whole.
    found = 1
    while found:
        answer, found = _FRACTION.subn(r"((\1\2)/(\3\4))", answer)
    return answer.translate(_BRACKETS)
