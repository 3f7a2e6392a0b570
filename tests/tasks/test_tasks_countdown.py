r"""The ``verified`` check of Countdown: how models write expressions, and what counts as one."""

import pytest

from dmpo_lightning import Countdown


@pytest.mark.parametrize(
    ("expression", "right"),
    [
        ("30 + 93 - 100.", True),
        ("30+93-100 = 23 = 23", True),
        ("30+93-100 = 123-100 = 23", True),
        ("30+93-100 = 122-100 = 23", False),
        ("30+93-100 = 123-100 = 22", False),
        ("30+93\u2013100", True),
        ("30\u00a0+\u00a093\u00a0-\u00a0100", True),
        ("`30 + 93 - 100`", True),
        ("```\n30+93-100\n```", True),
        ("{30+93}-100", True),
        ("{(30+93)}-100", True),
        ("[30+93]-100", True),
        ("**30+93-100**", True),
        ("$30 + 93 - 100$", True),
        ("\\(30+93-100\\)", True),
        ("\\left(30+93\\right)-100", True),
        ("30+93-100=23.", True),
        ("30+93-100 = 24", False),
        ("30+93\u2212100", True),
        ("-100+30+93", True),
        ("30+93", False),
        ("\\boxed{30+93-100}.", True),
        ("30+93-100 =", False),
        ("\\[30+93-100\\]", True),
        ("30 +93 -100 = 23.0", True),
        ("\u201c30+93-100\u201d", False),
        ("30 + 93 - 1 00", False),
        ("30+93-100;", True),
        ("```python\n30+93-100\n```", True),
        ("`30+93-100`.", True),
        ("**30+93-100", True),
        ("minus 100 + 30 + 93", True),
        ("30 + 93 minus 100", False),
        ("30+93-100*", False),
    ],
)
def test_how_expressions_and_chains_are_written(expression, right):
    example = {"numbers": [30, 100, 93], "target": 23}
    assert Countdown().check(example, f"<answer>\n{expression}\n</answer>").correct == right


@pytest.mark.parametrize(
    ("expression", "right"),
    [
        ("\\frac {8}{4}/2", True),
        ("\\frac{\\frac{8}{4}}{2}", True),
        ("\\dfrac{8}{4}\\div 2", True),
        ("\\frac84 / 2", True),
        ("\\frac{8}{4*2}", True),
        ("\\frac{8}{4 \\cdot 2}", True),
        ("\\frac 8 {4\\times2}", True),
        ("8\u00f74\u00f72", True),
        ("8/(4\u00b72)", True),
        ("8/(4\u22c52)", True),
        ("8/(4\u00d72)", True),
        ("8/4*2", False),
        ("8 \u2215 4 / 2", True),
        ("8-4-2-1", False),
        ("\\frac{8}{\\frac{4}{2}}", False),
        ("\\cfrac{\\dfrac{8}{4}}{2} = \\frac{2}{2} = 1", True),
        ("2(4)/8", False),
        ("8/4/2**1", False),
    ],
)
def test_fractions_products_and_quotients(expression, right):
    example = {"numbers": [2, 4, 8], "target": 1}
    assert Countdown().check(example, f"<answer>\n{expression}\n</answer>").correct == right


@pytest.mark.parametrize(
    ("numbers", "target", "expression", "right"),
    [
        ([-3, 5], 2, "5 + -3", True),
        ([-3, 5], 2, "5+(-3)", True),
        ([-3, 5], 2, "-3+5", True),
        ([-3, 5], 2, "5 - 3", False),
        ([-3, 5], 8, "5 - -3", True),
        ([-3, 5], 8, "5+3", False),
        ([-3, 5], -15, "5*-3", True),
        ([-3, 5], -15, "-3*5", True),
        ([-3, 5], -15, "(-3)*5", True),
        ([-3, 5], -15, "-(3)*5", False),
        ([-3, 5], 8, "5 \u2013 (\u20133)", True),
        ([3, -3, 5], 5, "3 + -3 + 5", True),
        ([3, -3, 5], 5, "3 - 3 + 5", False),
        ([0, 5], 5, "5 - 0", True),
        ([3, 5], 2, "-3 + 5", True),
    ],
)
def test_a_negative_number_is_used_with_its_sign(numbers, target, expression, right):
    example = {"numbers": numbers, "target": target}
    assert Countdown().check(example, f"<answer>{expression}</answer>").correct == right
