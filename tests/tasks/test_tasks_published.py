"""Training rewards of the variant ``published``, worked out by hand from the published definitions."""

import pytest

from dmpo_lightning import GSM8K, Countdown, Math500
from dmpo_lightning.tasks.hendrycks import equivalent, normalise

LAYOUT = "<reasoning>\nx\n</reasoning>\n<answer>\n42\n</answer>\n"


def gsm8k(completion: str, answer: str = "42") -> tuple[float, ...]:
    components = GSM8K(rewards="published").score({"question": "", "answer": answer}, completion)
    assert list(components) == ["tags", "soft_format", "strict_format", "integer", "correctness"]
    return tuple(round(value, 9) for value in components.values())


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (LAYOUT, (0.5, 0, 0.5, 0.5, 2)),
        (LAYOUT + "\n", (0.498, 0, 0.5, 0.5, 2)),
        (LAYOUT + "tail", (0.5 - 0.004 - 0.004, 0, 0, 0.5, 2)),
        # 48 characters: 3 x .125 for the tags with newlines, less .048; .125 and back .001 for the closing tag
        (LAYOUT[:-1], (0.5 - 0.048 + 0.001, 0, 0, 0.5, 2)),
        (LAYOUT.replace("x", "x\ny"), (0.5, 0, 0, 0.5, 2)),
        (LAYOUT.replace("x", ""), (0.5, 0, 0.5, 0.5, 2)),
        (" " + LAYOUT, (0.5, 0, 0, 0.5, 2)),
        ("<reasoning>x</reasoning><answer>42</answer>", (0, 0.5, 0, 0.5, 2)),
        ("<reasoning>x</reasoning>\n \n<answer>42</answer> tail", (0, 0.5, 0, 0.5, 2)),
        ("<reasoning>x</reasoning> y <answer>42</answer>", (0, 0, 0, 0.5, 2)),
        ("<reasoning>x</reasoning></reasoning><answer>4<answer>42</answer>", (0, 0.5, 0, 0.5, 2)),
        ("<reasoning>x</reasoning><answer>\n42</answer>", (0, 0, 0, 0.5, 2)),
        ("<reasoning>x</reasoning><answer>42\n</answer>", (0.125 + 0.001, 0, 0, 0.5, 2)),
        (LAYOUT + LAYOUT, (0, 0, 0, 0.5, 2)),
        # The closing tag stands twice and overlaps itself: split from the left, `</answer>` and a newline are the rest.
        ("\n<answer>\n</answer>\n</answer>\n", (0.125 - 0.01, 0, 0, 0, 0)),
        ("42", (0, 0, 0, 0.5, 2)),
        (" 42 ", (0, 0, 0, 0.5, 2)),
        ("<answer>42", (0, 0, 0, 0.5, 2)),
        ("<answer>1</answer><answer>42</answer>", (0, 0, 0, 0.5, 2)),
        ("<answer>43</answer>", (0, 0, 0, 0.5, 0)),
        ("<answer>$42</answer>", (0, 0, 0, 0, 0)),
        ("<answer>42.0</answer>", (0, 0, 0, 0, 0)),
        ("<answer>²</answer>", (0, 0, 0, 0.5, 0)),
        ("", (0, 0, 0, 0, 0)),
    ],
)
def test_gsm8k(completion, expected):
    assert gsm8k(completion) == tuple(round(value, 9) for value in expected)


def test_gsm8k_a_missing_last_newline_costs_a_thousandth_per_character_of_everything():
    long = LAYOUT.replace("x", "x" * 1000)[:-1]
    assert gsm8k(long)[0] == round(0.5 - 0.001 * len(long) + 0.001, 9)


@pytest.mark.parametrize(("answer", "integer"), [("1,000", 0), ("-5", 0), ("-5.5", 0), ("007", 0.5)])
def test_gsm8k_correctness_is_equality_of_strings_and_integers_are_digits(answer, integer):
    assert gsm8k(f"<answer>{answer}</answer>", answer)[3:] == (integer, 2)


def math(completion: str, answer: str = "\\frac{1}{2}") -> tuple[float, float]:
    components = Math500(rewards="published").score({"problem": "", "answer": answer}, completion)
    return components["format"], components["correctness"]


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<answer>\\boxed{1/2}</answer>", (1.0, 2)),
        ("<answer>1/2</answer>\\boxed{1/2}", (0.75, 2)),
        ("\\boxed{1/2}", (0.5, 2)),
        ("1/2", (0.25, 2)),
        ("x 1/2", (0.25, 0)),
        ("\\boxed 1/2$ done", (0.5, 2)),
        ("\\boxed{3} then \\boxed{\\dfrac12}", (0.5, 2)),
        ("\\fbox{1/2}", (0.25, 0)),
        ("\\boxed{1/2", (0.5, 0)),
        ("<answer>\\boxed{0.5}", (1.0, 2)),
        ("<answer><answer>\\boxed{1/2}", (0.75, 2)),
        ("<answer>\\boxed{1/2}<answer></answer>", (1.0, 2)),
        ("<answer>\boxed{1/2}</answer>", (0.75, 0)),
        ("", (0.25, 0)),
    ],
)
def test_math(completion, expected):
    assert math(completion) == expected


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("a\nb\\!c", "abc"),
        ("\\tfrac{1}{2}", "\\frac{1}{2}"),
        ("\\left(1,2\\right)", "(1,2)"),
        ("90^{\\circ}", "90"),
        ("90^\\circ", "90"),
        ("\\$5", "5"),
        ("5\\text{ cm}", "5"),
        ("50\\%", "50"),
        ("a .5{.5", "a0.5{0.5"),
        (".5", "\\frac{1}{2}"),
        ("", ""),
        ("x=5", "5"),
        ("abc=5", "abc=5"),
        ("a=b=c", "a=b=c"),
        ("\\sqrt2x", "\\sqrt{2}x"),
        ("\\sqrt{2}", "\\sqrt{2}"),
        ("\\frac12", "\\frac{1}{2}"),
        ("\\frac123", "\\frac{1}{2}3"),
        ("\\frac1{72}", "\\frac{1}{72}"),
        ("\\frac1", "\\frac1"),
        ("3/4", "\\frac{3}{4}"),
        ("03/4", "03/4"),
        ("1/2/3", "1/2/3"),
    ],
)
def test_math_normalising_step_by_step(text, normal):
    assert normalise(text) == normal


@pytest.mark.parametrize("text", ["a/b", "\\sqrt", "\\frac", "5\\text{ a}\\text{ b}"])
def test_math_where_normalising_fails_the_raw_texts_are_compared(text):
    assert equivalent(text, text)
    assert not equivalent(text, f"{text} ")


def test_math_missing_values():
    assert equivalent(None, None)
    assert not equivalent(None, "1")
    assert not equivalent("1", None)


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("<answer>(2+3)*4</answer>", 1.0),
        ("<answer>\n(2+3)*4\n</answer> tail", 1.0),
        ("<answer>1</answer><answer>(2+3)*4</answer>", 1.0),
        ("<answer>2+3*4</answer>", 0.1),
        ("<answer>20</answer>", 0.1),
        ("<answer>4*(2+3)=20</answer>", 0.1),
        ("<answer>(2+3)x4</answer>", 0.1),
        ("<answer>2+3)*4</answer>", 0.1),
        ("<answer>4/(2-3-</answer>", 0.1),
        ("<answer></answer>", 0.1),
        ("(2+3)*4", 0.0),
        ("<answer>(2+3)*4", 0.0),
        ("", 0.0),
    ],
)
def test_countdown(completion, reward):
    example = {"numbers": [4, 2, 3], "target": 20}
    assert Countdown(rewards="published").score(example, completion) == {"equation": reward}


@pytest.mark.parametrize(
    ("box", "hit"),
    [("\n 3+12\n", True), ("\u00a03+12\u00a0", True), (" 3+12 = 15\n", True), ("3\u00a0+12", False), ("3\n+12", False)],
)
def test_countdown_the_check_evaluates_the_stripped_text(box, hit):
    verdict = Countdown(check="published").check({"numbers": [3, 12], "target": 15}, f"\\boxed{{{box}}}")
    assert verdict.correct == hit


@pytest.mark.parametrize(
    ("expression", "numbers", "target", "hit"),
    [
        ("2**3", [2, 3], 8, True),
        ("-2**2", [2, 2], -4, True),
        ("2**3**2", [2, 3, 2], 512, True),
        ("7//2", [7, 2], 3, True),
        ("1.5*2", [1, 5, 2], 3, True),
        ("10/3*3", [10, 3, 3], 10, True),
        ("02+1", [2, 1], 3, False),
        ("1/0", [1, 0], 1, False),
        ("2(3)", [2, 3], 6, False),
        ("٣+1", [3, 1], 4, False),
        ("1 2", [1, 2], 3, False),
        ("(1+\n2)", [1, 2], 3, True),
        ("1+\n2", [1, 2], 3, False),
        ("99**98**97", [99, 98, 97], 1, False),
        ("9**9**9", [9, 9, 9], 1, False),
    ],
)
def test_countdown_values_are_those_of_python(expression, numbers, target, hit):
    components = Countdown(rewards="published").score(
        {"numbers": numbers, "target": target}, f"<answer>{expression}</answer>"
    )
    assert components == {"equation": 1.0 if hit else 0.1}
