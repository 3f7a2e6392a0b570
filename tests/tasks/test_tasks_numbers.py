"""Numbers in prose and LaTeX, and the gold numbers of GSM8K."""

import json
from fractions import Fraction

import pytest

from dmpo_lightning import GSM8K, Math500
from dmpo_lightning.data.sources import Parser, load_file
from dmpo_lightning.tasks.numbers import one_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2 1/2", Fraction(5, 2)),
        ("2\\frac{1}{2}", Fraction(5, 2)),
        ("2\\frac12", Fraction(5, 2)),
        ("2\u00bd", Fraction(5, 2)),
        ("\u00bd", Fraction(1, 2)),
        ("2 \\dfrac{1}{2} hours", Fraction(5, 2)),
        ("x is -\\frac{1}{2}", Fraction(-1, 2)),
        ("\\frac{-3}{4}", Fraction(-3, 4)),
        ("2 and 1/2", Fraction(5, 2)),
        ("10 5/2", None),
        ("\\frac34", Fraction(3, 4)),
        ("2-1/2", None),
        ("3 1/2 + 1/2", None),
        ("5\\frac{3}{2}", None),
        ("5/1", 5),
        ("2 / 4", Fraction(1, 2)),
        ("12 / 5 / 2", None),
    ],
)
def test_fractions_and_mixed_numbers(text, number):
    assert one_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("-2 1/2", Fraction(-5, 2)),
        ("-\\frac{1}{2}", Fraction(-1, 2)),
        ("\u20135", -5),
        ("\u22125", -5),
        ("-\u00a35", -5),
        ("\u00a3-5", -5),
        ("-\\$5", -5),
        ("Answer \u2013 5", 5),
        ("-1,000", -1000),
        ("\u2212$5", -5),
        ("\u20145", -5),
        ("five \u2014 5", 5),
        ("\u2212\u00a05", -5),
    ],
)
def test_signs_and_currency(text, number):
    assert one_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("9\u00a0500", 9500),
        ("9\u202f500", 9500),
        ("9~500", 9500),
        ("9\\,500", 9500),
        ("9\u2009500", 9500),
        ("9 500", None),
        ("5\\ 10", None),
        ("12, 345", None),
        ("3\\,4", None),
        ("10\\,\\!080", 10080),
        ("1 234\u00a0567", None),
        ("1{,}000", 1000),
        ("1 000 000", None),
    ],
)
def test_blanks_and_commas_between_thousands(text, number):
    assert one_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5 H2O", 5),
        ("25 m^2", 25),
        ("25 cm3", 25),
        ("25 \\text{ m}^2", 25),
        ("25 \\text{ cm}^{2}", 25),
        ("25\\,\\mathrm{m^2}", 25),
        ("25 square feet", 25),
        ("25 in^2", 25),
        ("25 m\u00b2", 25),
        ("25 m^{-2}", 25),
        ("5 kg of CO2", 5),
        ("5\\text{ minutes}", 5),
        ("5 ft 2", None),
        ("5 m/s^2", 5),
        ("\\left(5\\right)", 5),
        ("5\\text{ m}\\cdot\\text{s}", 5),
        ("25\\mathrm{~m}^{2}", 25),
        ("25\\ \\text{ft}^2", 25),
    ],
)
def test_units_and_their_exponents(text, number):
    assert one_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("25 = x^2", None),
        ("25 = x^{-2}", None),
        ("5^2", None),
        ("5\u00b2", None),
        ("5+5", None),
        ("<<2+3=5>>5", 5),
        ("Answer => 5", 5),
        ("10 -> 5", None),
        ("<b>5</b>", 5),
        ("5 - 5", None),
        ("2<x", None),
        ("x \\le 5", None),
        ("\\{5\\}", 5),
        ("{5}", 5),
        ("x=5", 5),
        ("3+4=7", 7),
        ("5\\%", 5),
        ("5.", 5),
        ("1,234,567.89", Fraction(123456789, 100)),
        ("10,\\!080", 10080),
        ("x^2 = 25", 25),
        ("A1", 1),
        ("The answer is 5. ", 5),
        ("5 x 3", None),
        ("(5)", 5),
        ("+5", 5),
        ("\\textbf{5}", 5),
        ("5:30", None),
        ("x5", 5),
        ("\\(5\\)", 5),
        ("5 \\cdot 3", None),
        ("\\approx 5", 5),
        ("1\u2044 2", Fraction(1, 2)),
        ("5^{\\circ}", 5),
        ("5^\\circ C", 5),
        ("90\u00b0", 90),
        ("100^{th}", 100),
        ("5^{th}", 5),
        ("\\$5\\text{-}7", None),
    ],
)
def test_what_states_a_number_and_what_does_not(text, number):
    assert one_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("negative 3", -3),
        ("minus 3", -3),
        ("Minus $3.00", -3),
        ("NEGATIVE \\$3.00", -3),
        ("\\text{negative }3", -3),
        ("\\text{minus } 3", -3),
        ("\\text{negative 3}", -3),
        ("\\textbf{negative}\\,3", -3),
        ("negative-3", -3),
        ("neg. 3", -3),
        ("**minus 3**", -3),
        ("$minus 3$", -3),
        ("the answer is minus 3 degrees", -3),
        ("Answer: minus 3.", -3),
        ("x = minus 3", -3),
        ("negative (3)", -3),
        ("-\\left(3\\right)", -3),
        ("minus 3/4", Fraction(-3, 4)),
        ("negative \\frac{3}{4}", Fraction(-3, 4)),
        ("minus 2 1/2", Fraction(-5, 2)),
        ("minus \u00bd", Fraction(-1, 2)),
        ("negative 1,000", -1000),
        ("\u27963", -3),
        ("3 minus 2", None),
        ("3 \\text{ minus } 2", None),
        ("10 - 3", None),
        ("x minus 3", None),
        ("$x$ minus $3$", None),
        ("(x + 1) minus 3", None),
        ("plus or minus 3", None),
        ("minus minus 3", None),
        ("5 minus negative 3", None),
        ("non-negative 3", 3),
        ("nonnegative 3", 3),
        ("the cost minus the discount is 5", 5),
        ("the negative of 5 is -5", None),
    ],
)
def test_a_sign_in_words_is_a_sign_unless_it_is_an_operation(text, number):
    assert one_number(text) == number


@pytest.mark.parametrize(
    "percent",
    [
        *("%", "\\%", " percent", "-percent", " per cent", "\u00a0per cent", " pct", " pct.", " percentage", "\uff05"),
        *("\\text{pct}", "\\text{ per cent}", "\\ \\text{percent}", " percentage points", " Percent", "\\text{\\%}"),
    ],
)
def test_percent_in_words_is_the_sign_in_every_task(percent):
    answer = f"<answer>28{percent}</answer>"
    assert GSM8K().check({"answer": "28"}, answer).correct
    for gold in ("28", "28\\%", "28 percent"):
        assert Math500().check({"answer": gold}, answer).correct
    assert not Math500().check({"answer": "0.28"}, answer).correct


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("2+3\n#### 5", "5"),
        ("#### Step 1\n2+3\n#### 5", "5"),
        ("#### 5\n#### 5", "5"),
        ("x\n#### 1,000", "1,000"),
        ("x\n#### -5.5 ", "-5.5"),
        ("x\n#### 0", "0"),
    ],
)
def test_the_gold_number_stands_behind_the_last_mark(answer, gold):
    assert GSM8K.from_row({"question": "?", "answer": answer}) == {"question": "?", "answer": gold}


@pytest.mark.parametrize(
    "answer", ["5", "#### none", "####", "#### 5\n####", "#### 5\n#### 6", "#### 5 or 6", "#### 2<x", ["#### 5"], 5]
)
def test_a_row_without_one_gold_number_is_named(tmp_path, answer):
    file = tmp_path / "train.jsonl"
    rows = [{"question": "?", "answer": "#### 1"}, {"question": "?", "answer": answer}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"train\.jsonl, row 2: `answer` "):
        load_file(file, Parser(GSM8K.from_row, GSM8K.columns))


def test_every_real_gold_number_is_read(test_data):
    for split, size in (("train", 7473), ("test", 1319)):
        examples = load_file(test_data / "gsm8k" / f"{split}.jsonl", Parser(GSM8K.from_row, GSM8K.columns))
        assert len(examples) == size
        assert all(one_number(example["answer"]) is not None for example in examples)
