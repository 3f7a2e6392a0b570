r"""MATH and its test selection MATH-500: competition problems with a LaTeX answer (Hendrycks et al. 2021)."""

from collections.abc import Mapping, Sequence
from decimal import Decimal
from importlib.util import find_spec
from typing import Any

from dmpo_lightning.tasks import hendrycks, latex
from dmpo_lightning.tasks.answers import final_answer, first_block, last_box, last_boxed, unbox
from dmpo_lightning.tasks.base import Example, Verdict
from dmpo_lightning.tasks.benchmark import EVAL_FORMAT, MATH_EXPERT, TRAIN_FORMAT, Benchmark


class Math500(Benchmark):
    r"""Competition problems. An example holds ``problem`` and ``answer``, the gold LaTeX.

    Rewards ``published`` are ``format``, 0.5 for an answer tag and 0.5 for a box in it or 0.25 for no box, and
    ``correctness``, 2.0 for the right answer. ``format`` is DMPO's and not d1's, see `published_format`. Rewards
    ``verified`` are ``format``, 0.5 for reasoning and answer in tags, and ``correctness``, 2.0.

    The check ``published`` compares strings normalised as in `hendrycks`, and ``verified`` as in `latex`.

    Args:
        data, benchmark: as in `Benchmark`.
        algebra: whether ``verified`` asks math-verify about answers that `latex` calls unequal, see `algebra`.

    Raises:
        ValueError: as in `Benchmark`, or math-verify is needed and missing.

    Example:
        >>> from dmpo_lightning import Math500
        >>> Math500().score({"answer": "0.5"}, "<reasoning>1 / 2</reasoning><answer>1/2</answer>")
        {'format': 0.5, 'correctness': 2.0}
    """

    columns = fields = ("problem",)
    # The quotation mark behind the format, and the blanks as they are, stand in the published prompts.
    instructions = {"train": f"{TRAIN_FORMAT}\n\n{MATH_EXPERT} ", "eval": f'{MATH_EXPERT}\n{EVAL_FORMAT}" \n'}

    def __init__(
        self,
        data: Mapping[str, Sequence[Example]] | None = None,
        *,
        algebra: bool = False,
        **benchmark: Any,
    ) -> None:
        super().__init__(data, **benchmark)
        self.algebra, self._algebra = algebra, None
        if algebra:
            if find_spec("math_verify") is None:
                raise ValueError("`algebra` needs math-verify; install it with `pip install dmpo-lightning[math]`.")
            # It brings sympy.
            from dmpo_lightning.tasks.algebra import AlgebraicEquality

            self._algebra = AlgebraicEquality()

    def task_text(self, example: Example) -> str:
        return str(example["problem"])

    def published_components(self, example: Example, completion: str) -> dict[str, float]:
        boxed = unbox(last_boxed(completion))
        right = hendrycks.equivalent(completion if boxed is None else boxed, example["answer"])
        return {"format": published_format(completion), "correctness": 2.0 * right}

    def published_check(self, example: Example, completion: str) -> Verdict:
        """As d1 evaluates: the last box, else the first answer tag."""
        answer = unbox(last_boxed(completion))
        if not answer and (block := first_block(completion)) is not None:
            answer = block.strip()
        right = answer is not None and hendrycks.equivalent(answer, example["answer"])
        return Verdict(answer, right, canonical=latex.canonical(answer or ""))

    def verified_check(self, example: Example, completion: str) -> Verdict:
        """Equivalence by `latex.equivalent` of the last answer, in its tag or its box.

        What it calls unequal, math-verify may call equal where ``algebra`` asks it.
        """
        answer, gold = final_answer(completion), example["answer"]
        right = latex.equivalent(answer, gold) or (self._algebra is not None and self._algebra(gold, answer))
        return Verdict(answer[: latex.MAX_TEXT] or None, right, canonical=latex.canonical(answer))

    def facts(self) -> dict[str, Any]:
        return super().facts() | ({"check": f"{self.check_name} with algebra"} if self.algebra else {})

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Example:
        r"""The gold answer is ``answer``, a text or a number, or else the last box of ``solution``.

        Raises:
            ValueError: neither, or an answer that no completion can meet.
        """
        answer = row.get("answer")
        if answer is None:
            solution = str(row.get("solution") or "")
            # Of a box that never closes nobody knows what is missing.
            answer = None if last_boxed(solution) is None else last_box(solution)
        elif isinstance(answer, int | float) and not isinstance(answer, bool):
            answer = f"{Decimal(repr(answer)):f}"
        if not isinstance(answer, str):
            raise ValueError(
                f"a row needs `answer`, a text or number, or `solution` with a \\boxed answer, got {answer!r}"
            )
        box = last_box(answer)
        gold = answer.strip() if box is None else box.strip()
        # What does not even equal itself in a box is empty, cut off, or longer than any answer that is compared.
        if not latex.equivalent(final_answer(f"\\boxed{{{gold}}}"), gold) or gold in ("NaN", "Infinity", "-Infinity"):
            raise ValueError(
                f"the gold answer must be a whole LaTeX text of at most {latex.MAX_TEXT} characters and not empty, got "
                f"{answer[:40]!r}"
            )
        return {"problem": row["problem"], "answer": gold}

    @classmethod
    def from_saved(cls, record: Mapping[str, Any]) -> Example:
        return {"problem": record["question"], "answer": str(record["ground_truth"])}


def published_format(completion: str) -> float:
    r"""0.5 for a tag, and 0.5 for a box in it or 0.25 without. If there is no tag the whole text is searched.

    The tag ends at the next ``<answer>`` too. This is DMPO's code; d1's looks for a backspace and ``oxed`` in place of
    ``\boxed``, because its text lacks a backslash, and so gives 0.25 to every box.
    """
    _, tag, rest = completion.partition("<answer>")
    looked_at = rest.partition("<answer>")[0].partition("</answer>")[0] if tag else completion
    return 0.5 * ((1.0 if tag else 0.0) + (1.0 if "\\boxed" in looked_at else 0.5))
