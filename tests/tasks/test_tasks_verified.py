"""The ``verified`` checks: by hand, and against the published ones on real completions, difference by
difference.
"""

import json
import re
from fractions import Fraction
from pathlib import Path

import pytest

from dmpo_lightning import GSM8K, Countdown, Math500, Sudoku
from dmpo_lightning.commands.score import TASKS, make_task
from dmpo_lightning.tasks import latex
from dmpo_lightning.tasks.numbers import one_number

DIFFERENCES = Path(__file__).parent / "verified_differences.json"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,000", 1000),
        ("$42", 42),
        ("\\$1{,}234.50", Fraction(2469, 2)),
        ("42.0", 42),
        ("-3", -3),
        ("50\\%", 50),
        ("50%", 50),
        ("3/4", Fraction(3, 4)),
        ("\\frac{3}{4}", Fraction(3, 4)),
        ("9 * 2 = 18 dollars", 18),
        ("70\\text{ minutes}", 70),
        ("2:00 pm", 2),
        ("about .5", Fraction(1, 2)),
        ("18 and 18", 18),
        ("18 or 19", None),
        ("1/0", None),
        ("٣", None),
        ("none", None),
        ("", None),
    ],
)
def test_one_number(text, value):
    assert one_number(text) == value


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("\\frac{1}{2}", "0.5", True),
        ("\\dfrac12", "1/2", True),
        ("3/24", "\\frac{1}{8}", True),
        ("1,000", "1000", True),
        ("(1,000)", "(1000)", False),
        ("x \\in [-2, 7]", "[-2,7]", True),
        ("(1, \\frac{1}{2})", "(1,0.5)", True),
        ("(1,2)", "[1,2]", False),
        ("(1,2)", "(2,1)", False),
        ("\\text{east}", "east", True),
        ("15\\mbox{ cm}^2", "15", True),
        ("90^\\circ", "90", True),
        ("\\sqrt2", "\\sqrt{2}", True),
        ("x^{2}", "x^2", True),
        ("\\$36", "36.00", True),
        ("2(3)", "6", False),
        ("", "", False),
        ("\\{1,2\\}", "\\{1, 2\\}", True),
    ],
)
def test_latex(first, second, same):
    assert latex.equivalent(first, second) == latex.equivalent(second, first) == same


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("<answer>(2+3)*4</answer>", True),
        ("<answer>\\( (2+3) \\times 4 = 20 \\)</answer>", True),
        ("<answer>(2+3)*4 = 21</answer>", False),
        ("<answer>\\frac{4}{3}*2</answer>", False),
        ("<answer>2+3*4</answer>", False),
        ("<answer>20</answer>", False),
    ],
)
def test_countdown(completion, right):
    example = {"numbers": [4, 2, 3], "target": 20}
    assert Countdown().check(example, completion).correct == right


def test_countdown_is_exact_and_has_no_powers():
    third = {"numbers": [1, 3, 3], "target": 1}
    assert Countdown().check(third, "<answer>1/3*3</answer>").correct
    assert not Countdown().check({"numbers": [2, 3], "target": 8}, "<answer>2**3</answer>").correct
    near = {"numbers": [1, 999999, 1], "target": 1}
    assert Countdown(check="published").check(near, "<answer>\\boxed{1-1/999999}</answer>").correct
    assert not Countdown().check(near, "<answer>\\boxed{1-1/999999}</answer>").correct


def test_rewards_have_format_and_correctness():
    layout = "<reasoning>\na\nb\n</reasoning>\n<answer>\n{}\n</answer>"
    gsm8k = GSM8K().score({"question": "", "answer": "1,000"}, layout.format("$1000.00"))
    assert gsm8k == {"format": 0.5, "correctness": 2.0}
    math = Math500().score({"problem": "", "answer": "2"}, layout.format("3") + " tail")
    assert math == {"format": 0.0, "correctness": 0.0}


def test_sudoku_takes_only_16_digits_that_keep_the_clues():
    example = {"puzzle": "1000040000400020", "solution": "1234341221434321"}
    task = Sudoku(rewards="verified", check="verified")
    assert task.check(example, "<answer>1234|3412|2143|4321</answer>").correct
    for wrong in ("12343412214343211", "123434122143432", "2234341221434321"):
        assert task.score(example, f"<answer>{wrong}</answer>")["cells"] == 0


def reason(task, record, published, verified) -> str:  # noqa: PLR0911  one line per rule
    """Why the two checks differ, worked out from the texts alone."""
    answer = str(verified.answer)
    if task == "sudoku":
        found = str(published.answer)
        clues = record["question"].split()[-1]
        kept = all(clue in ("0", digit) for clue, digit in zip(clues, found, strict=True))
        return "the grid was padded or cut, or is surrounded by text" if kept else "a clue is overwritten"
    if task == "countdown":
        return "published stops at an equals sign" if str(published.answer) != answer else "exact value"
    if task == "math500":
        if "\\boxed" in str(published.answer):
            return "the box was cut off before its brace"
        if "boxed{" in str(published.answer):
            return "the box has lost its backslash"
        if re.fullmatch(r"[0-9]+ [a-z]+", answer):
            return "a unit outside \\text"
        return "same value" if latex.rational(answer) is not None else "same after normalising"
    boxes = re.findall(r"\\boxed\{(.*?)\}", record["completion"])
    if len(set(boxes)) > 1:
        return "published takes the first box, verified the last"
    if published.answer is None:
        return "the box or the tag was cut off"
    if "," in answer:
        return "a comma between thousands"
    return "a fraction is not its numerator" if "frac" in answer else "unexplained"


def differences(test_data) -> list[dict[str, object]]:
    found = []
    for task in TASKS:
        checks = make_task(task, "published"), make_task(task, "verified")
        for line, text in enumerate((test_data / "llada_8b_instruct_256" / f"{task}.jsonl").open(), 1):
            record = json.loads(text)
            published, verified = (c.check(c.from_saved(record), record["completion"]) for c in checks)
            if (published.correct, published.share) != (verified.correct, verified.share):
                why = reason(task, record, published, verified)
                row = {"task": task, "line": line, "published": published.answer, "verified": verified.answer}
                found.append({**row, "verified_correct": verified.correct, "reason": why})
    return found


def test_every_difference_from_published_is_listed_with_its_reason(test_data):
    found = differences(test_data)
    assert found == json.loads(DIFFERENCES.read_text())
    assert "unexplained" not in {row["reason"] for row in found}


@pytest.mark.parametrize(
    ("first", "second", "equal"),
    [
        ("\\begin{pmatrix} -2 \\\\ -14 \\end{pmatrix}", "\\begin{pmatrix}-2\\\\-14\\end{pmatrix}", True),
        ("58,500", "x=58,500", True),
        ("\\frac{11}{2}", "1 1/2", False),
        ("34", "3 4", False),
        ("3 4", "3  4", True),
        ("10\\,\\!080", "10080", True),
        ("1, 2", "1,2", True),
    ],
)
def test_what_blanks_and_commas_mean(first, second, equal):
    assert latex.equivalent(first, second) == equal


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Answer - 5", 5),
        ("step-5", 5),
        ("- 5", -5),
        ("-5", -5),
        ("the answer is -5", -5),
        ("-$5", -5),
        ("$ 5", 5),
        ("\\frac12", Fraction(1, 2)),
        ("x" + " " * 900 + "5", 5),
    ],
)
def test_what_a_minus_sign_belongs_to(text, number):
    assert one_number(text) == number
