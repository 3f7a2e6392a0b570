r"""Equality of LaTeX answers by rules, and the gold answers of MATH."""

import json

import pytest

from dmpo_lightning import Math500
from dmpo_lightning.data.sources import Parser, load_file
from dmpo_lightning.tasks import latex


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("137 \\frac{1}{2}", "137.5"),
        ("137\\frac12", "\\frac{275}{2}"),
        ("1\\frac{4}{5}", "\\frac{9}{5}"),
        ("1 4/5", "9/5"),
        ("-1\\frac{4}{5}", "-1.8"),
        ("{5}", "5"),
        ("{{5}}", "5"),
        ("{\\frac{1}{2}}", "0.5"),
        ("({1},{2})", "(1,2)"),
        ("12\\pi\\text{ cm}", "12\\pi"),
        ("12\\pi \\text{ square feet}", "12\\pi"),
        ("25\\text{ m}^2", "25"),
        ("25\\text{ m}^{2}", "25"),
        ("25\\,\\mathrm{m^2}", "25"),
        ("25 \\text{ cm}^{2}", "25"),
        ("25 square feet", "25"),
        ("12 cm", "12"),
        ("1\u00bd", "1.5"),
        ("12 in", "12"),
        ("12 in^2", "12"),
        ("25 cm^2", "25"),
        ("25 cm3", "25"),
        ("25 m^2", "25"),
        ("\u20135", "-5"),
        ("\u22125", "-5"),
        ("-\u00a35", "-5"),
        ("9\u00a0500", "9500"),
        ("9~500", "9500"),
        ("9\\,500", "9500"),
        ("10,\\!080", "10080"),
        ("10\\,\\!080", "10080"),
        ("58{,}500", "58,500"),
        ("10\\text{ p.m.}", "10 \\text{ PM}"),
        ("10\\text{ p.m.}", "10 p.m."),
        ("x \\in [-2, 7]", "[-2,7]"),
        ("2<x", "2 < x"),
        ("0<x<y", "0 \\lt x < y"),
        ("x\\le5", "x \u2264 5"),
        ("\\frac{270}7\\text{ degrees}", "\\frac{270}{7}"),
        ("864 \\mbox{ inches}^2", "864"),
        ("15\\mbox{ cm}^2", "15"),
        ("5.4 \\text{ cents}", "5.4"),
        ("\\text{(C)}", "(C)"),
        ("3\\sqrt{2}\\text{ units}", "3\\sqrt2"),
        ("4(1+x)\\text{ cm}", "4(1+x)"),
        ("\\text{ 5 }", "5"),
        ("60 \\text{ miles per hour}", "60"),
        ("5\\text{ m/s}", "5"),
        ("90^\\circ", "90"),
        ("5\\ \\text{cm}", "5"),
        ("5~\\text{cm}", "5"),
        ("25\\text{ ft}^2.", "25"),
        ("1,2", "1, 2"),
        ("0<x<1", "0<x<1."),
        ("$5$", "5"),
        ("5\\text{ kg}\\cdot\\text{m}", "5\\text{ kg}\\cdot\\text{m}"),
        ("\\$1{,}000", "1000"),
        ("1,000,000", "1000000"),
        ("3 4", "3  4"),
        ("10:00\\text{ a.m.}", "10:00 am"),
        ("\\text{(C)}", "C"),
        ("\\text{(C)}", "\\text{C}"),
        ("\\text{(C)}", "\\textbf{(C)}"),
        ("\\text{(C)}", "\\text{\\textbf{(C)}}"),
        ("\\text{(C)}", "**C**"),
        ("\\text{(C)}", "C."),
        ("\\text{(C)}", "C)"),
        ("\\text{(C)}", "\\mathrm{(C).}"),
        ("negative 3", "-3"),
        ("\\text{minus }3", "-3"),
        ("x = \\text{negative }\\frac34", "-\\frac{3}{4}"),
        ("negative 2\\sqrt2", "-2\\sqrt{2}"),
        ("(minus 3, 2)", "(-3,2)"),
        ("28 pct, 3 per cent", "28\\%, 3\\%"),
        ("**5**", "5"),
        ("`\\frac12`", "0.5"),
        ('"5".', "5"),
        ("```latex\n\\frac12\n```", "0.5"),
    ],
)
def test_equal(first, second):
    assert latex.equivalent(first, second)
    assert latex.equivalent(second, first)
    assert latex.canonical(first) == latex.canonical(second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("10\\text{ p.m.}", "10\\text{ a.m.}"),
        ("10\\text{ p.m.}", "10"),
        ("12345", "12, 345"),
        ("1 1/2", "11/2"),
        ("1\\frac{1}{2}", "\\frac{11}{2}"),
        ("5 \\text{ million}", "5"),
        ("2<x", "2"),
        ("2<x", "2<y"),
        ("34", "3 4"),
        ("3\\,4", "34"),
        ("3\\ 4", "34"),
        ("2(3)", "6"),
        ("5", "-5"),
        ("(1,2)", "[1,2]"),
        ("[2]", "2"),
        ("\\{2\\}", "2"),
        ("25m", "25"),
        ("25x^2", "25"),
        ("3\\frac{3}{2}", "4.5"),
        ("2x", "2"),
        ("\\text{5 north}", "\\text{5 south}"),
        ("5\\text{ north}", "5\\text{ south}"),
        ("", ""),
        ("(1,000)", "(1000)"),
        ("4i", "4"),
        ("2516_7", "2516_8"),
        ("12in", "12"),
        ("25m^2", "25"),
        ("C", "(C, D)"),
        ("C", "2C"),
        ("C", "D"),
        ("c", "\\text{(C)}"),
        ("f(C)", "C"),
        ("[C]", "C"),
        ("3 minus 2", "1"),
        ("2 negative 3", "-1"),
        ("x minus 3", "-3"),
        ("f'", "f"),
        ("2*x*", "2*x"),
    ],
)
def test_not_equal(first, second):
    assert not latex.equivalent(first, second)
    assert not latex.equivalent(second, first)


@pytest.mark.parametrize(
    ("row", "gold"),
    [
        ({"answer": 0}, "0"),
        ({"answer": -2.5}, "-2.5"),
        ({"answer": 1e-7}, "0.0000001"),
        ({"answer": " 4 "}, "4"),
        ({"answer": "\\boxed{4}"}, "4"),
        ({"solution": "so $\\fbox{4}$."}, "4"),
        ({"solution": "so $\\boxed {4}$."}, "4"),
        ({"solution": "so $\\boxed 4$."}, "4"),
        ({"solution": "\\boxed{3} so \\boxed{\\frac{1}{2}}"}, "\\frac{1}{2}"),
        ({"solution": "\\boxed{3}", "answer": "4"}, "4"),
    ],
)
def test_the_gold_answer_of_a_row(row, gold):
    assert Math500.from_row({"problem": "?"} | row) == {"problem": "?", "answer": gold}


BAD = [
    {"solution": "The answer is 4."},
    {"solution": "so \\boxed{12"},
    {"solution": "so \\boxed{...}"},
    {"answer": ["4"]},
    {"answer": {"4": 4}},
    {"answer": True},
    {"answer": float("nan")},
    {"answer": float("inf")},
    {"answer": " "},
    {"answer": "$$"},
    {"answer": "\\boxed{}"},
    {"answer": "\\frac{1}{2"},
    {"answer": "x" * (latex.MAX_TEXT + 1)},
    {},
]


@pytest.mark.parametrize("row", BAD)
def test_a_gold_answer_that_nobody_can_meet_is_named(tmp_path, row):
    file = tmp_path / "train.jsonl"
    rows = [{"problem": "?", "answer": "1"}, {"problem": "?"} | row]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"train\.jsonl, row 2: (a row needs `answer`|the gold answer must be)"):
        load_file(file, Parser(Math500.from_row, Math500.columns))


def test_every_real_gold_answer_is_kept_and_met(test_data):
    task = Math500()
    file = test_data / "math500" / "test.jsonl"
    answers = [json.loads(line)["answer"] for line in file.read_text(encoding="utf-8").splitlines()]
    examples = load_file(file, Parser(Math500.from_row, Math500.columns))
    assert [example["answer"] for example in examples] == answers
    assert all(task.check(each, f"<answer>\\boxed{{{each['answer']}}}</answer>").correct for each in examples)
