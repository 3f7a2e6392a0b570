"""No text, however hostile, raises, hangs or scores outside its range; and what is searched fast finds what the
published patterns find.
"""

import json
import math
import re
import time

import published_by_regex as by_regex
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmpo_lightning import GSM8K, Countdown, Math500, Sudoku
from dmpo_lightning.tasks import gsm8k, hendrycks, math500, sudoku
from dmpo_lightning.tasks.answers import first_block, last_block, last_boxed
from dmpo_lightning.tasks.countdown import published_expression

EXAMPLES = {
    GSM8K: {"question": "?", "answer": "42"},
    Math500: {"problem": "?", "answer": "\\frac{1}{2}"},
    Countdown: {"numbers": [99, 98, 97], "target": 98},
    Sudoku: {"puzzle": "1000040000400020", "solution": "1234341221434321"},
}
MEGABYTE = 1_000_000
HOSTILE = {
    "a tower of powers": "99**98**97",
    "nines": "9**9**9",
    "division by zero": "1/0",
    "parentheses": "(" * 10_000 + "1" + ")" * 10_000,
    "open parentheses": "(" * 10_000,
    "signs": "-" * 10_000 + "1",
    "digits": "9" * MEGABYTE,
    "a megabyte of open parentheses": "(" * MEGABYTE,
    "a megabyte of parentheses": "(" * (MEGABYTE // 2) + ")" * (MEGABYTE // 2),
    "unicode digits": "٣" * 50 + "²½𝟗",
    "nested boxes": "\\boxed{" * 5_000 + "1" + "}" * 5_000,
    "open boxes": "\\boxed{" * (MEGABYTE // 7),
    "full boxes": "\\boxed{a}" * (MEGABYTE // 9),
    "open braces": "{" * MEGABYTE,
    "braces": "{}" * (MEGABYTE // 2),
    "closed braces": "}" * MEGABYTE,
    "open answers": "<answer>" * (MEGABYTE // 8),
    "closed answers": "</answer>" * (MEGABYTE // 9),
    "reasoning": "<reasoning>" + "</reasoning><answer>" * (MEGABYTE // 20),
    "open reasoning": "<reasoning>\n" * (MEGABYTE // 12),
    "fences": "<answer>" + "``` " * (MEGABYTE // 4),
    "blanks": "<answer>```" + " " * MEGABYTE,
    "null bytes": "\x00" * MEGABYTE,
    "fractions": "\\frac" * (MEGABYTE // 5),
    "fractions of digits": "\\frac12" * (MEGABYTE // 7),
    "roots": "\\sqrt" * (MEGABYTE // 5),
    "commas": "1," * (MEGABYTE // 2),
    "equations": "1=" * (MEGABYTE // 2),
    "texts": "\\text{ " * (MEGABYTE // 7),
    "newlines": "\n" * MEGABYTE,
    "surrogate": "\ud800",
    "blanks inside": "x" + " " * 950 + "x",
    "minus signs and blanks": "- " * 450,
    "a number and blanks": "1 /" + " " * 900 + "/ 2",
    "empty boxes": "\\boxed{...}" * (MEGABYTE // 11),
    "open boxes line by line": "\\boxed{...\n" * (MEGABYTE // 11),
    "boxes without braces": "\\boxed 5" * (MEGABYTE // 8),
    "boxes without backslashes": "boxed{" * (MEGABYTE // 6),
    "cut-off tags": "<answer>" + "</" * (MEGABYTE // 2),
    "no-break blanks": "1~" * (MEGABYTE // 2),
    "units": "5" + "\\text{a}   " * 40 + "x",
    "units and signs": "5 m" + "^ " * 240,
    "nested fractions": "\\frac{" * 140 + "1" + "}{1}" * 40,
    "chains": "1=" * 490 + "1",
}


def tasks(variant):
    return [(cls(rewards=variant, check=variant), example) for cls, example in EXAMPLES.items()]


def check(text, variant):
    for task, example in tasks(variant):
        scores = task.score(example, text) | task.check(example, text).components
        assert all(math.isfinite(value) for value in scores.values())
        assert scores["correct"] in (0.0, 1.0)


def limit() -> float:
    """50 ms; more while the machine is so slow that a loop of a third of that takes longer than usual."""
    start = time.process_time()
    sum(number * number for number in range(200_000))
    return max(0.05, 3 * (time.process_time() - start))


def is_fast(call, argument, *, attempts: int = 8) -> bool:
    """Whether one of several calls takes less than 50 ms of the CPU."""
    for _ in range(attempts):
        start = time.process_time()
        call(argument)
        if time.process_time() - start < limit():
            return True
    return False


def checks(variant):
    """Every score and every check, by name."""
    for task, example in tasks(variant):
        yield f"{type(task).__name__} rewards", lambda text, f=task.score, e=example: f(e, text)
        yield f"{type(task).__name__} check", lambda text, f=task.check, e=example: f(e, text)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("variant", ["published", "verified"])
@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_text_is_scored_in_less_than_50_milliseconds(text, variant):
    """Demanded of the project, so timed in spite of the rule against it; on the CPU, and the best of eight."""
    for wrapped in (text, f"<answer>\\boxed{{{text}}}</answer>"):
        check(wrapped, variant)
        for name, call in checks(variant):
            assert is_fast(call, wrapped), name
    # Of the other places only that they raise nothing.
    for wrapped in (f"<answer>{text[:4096]}</answer>", f"\\boxed{{{text[:4096]}}}"):
        check(wrapped, variant)


@pytest.fixture(scope="module")
def completions(test_data):
    files = sorted((test_data / "llada_8b_instruct_256").iterdir())
    return [json.loads(line)["completion"] for file in files for line in file.read_text().splitlines()[:40]]


CHANGES = [
    ("\n", " "),
    ("</answer>", ""),
    ("}", ""),
    ("1", "1,"),
    (" ", "\n"),
    ("{", "{{"),
    ("\\boxed{", "\\boxed{{"),
    ("\\boxed{", "\\boxed "),
    ("\\boxed{", "\\fbox{\n"),
    ("<answer>", "</answer><answer>"),
    ("<answer>", "\n<answer>\n"),
    ("<answer>", "<answer><answer>"),
    ("</answer>", "\n</answer>\n</answer>\n"),
    ("</answer>", "\n</answer>\n"),
    ("</answer>", "<|eot_id|></answer>"),
    ("<answer>", "```\n<answer>```"),
    ("\n<answer>", "<answer>"),
    ("<reasoning>", ""),
    ("=", " = "),
    ("\\frac{", "\\frac"),
]
TAGS = re.compile(r"(</?(?:reasoning|answer)>|\\boxed\{|\n)")


def mutated(data, completions: list[str]) -> str:
    """A real completion after some of: cut, joined, reformatted, a tag moved, a piece repeated."""
    text = data.draw(st.sampled_from(completions))
    for change in data.draw(st.lists(st.sampled_from(["cut", "join", "replace", "move", "repeat"]), max_size=4)):
        start, end = sorted(data.draw(st.integers(0, len(text))) for _ in range(2))
        pieces = TAGS.split(text)
        if change == "cut":
            text = text[start:end]
        elif change == "join":
            text = text[:end] + data.draw(st.sampled_from(completions))
        elif change == "replace":
            text = text.replace(*data.draw(st.sampled_from(CHANGES)))
        elif change == "move":
            place = data.draw(st.integers(0, len(pieces) - 1))
            text = "".join(pieces[:place] + pieces[place + 1 :]) + pieces[place]
        else:
            text = text[:end] + text[start:end] + text[end:]
    return text[:5000]


def agrees_with_the_patterns(text: str) -> None:
    """Every fast search of the published variants, against its pattern."""
    assert repr(gsm8k.published_answer(text)) == repr(by_regex.gsm8k_answer(text))  # nan is not equal to itself
    assert gsm8k.published_tag_counts(text) == pytest.approx(by_regex.gsm8k_tags(text), abs=1e-9)
    found = gsm8k.published_soft_format(text), gsm8k.published_strict_format(text)
    assert found == by_regex.gsm8k_format(text)
    assert last_boxed(text) == by_regex.last_boxed(text)
    block = re.search("<answer>(.*?)</answer>", text, re.DOTALL)
    assert (first_block(text), last_block(text)) == (block and block[1], by_regex.last_answer(text))
    assert sudoku.published_answer(text) == by_regex.sudoku_answer(text)
    cells = Sudoku(rewards="published").score(EXAMPLES[Sudoku], text)["cells"]
    assert cells == by_regex.sudoku_cells(text, *EXAMPLES[Sudoku].values())
    assert math500.published_format(text) == by_regex.math_format(text)
    assert published_expression(text) == by_regex.equation(text)
    for other in (text[:-1], text[1:], text.replace(" ", ""), "\\frac{1}{2}", "3"):
        assert hendrycks.equivalent(text, other) == by_regex.equivalent(text, other)


@pytest.mark.timeout(120)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_real_completions_cut_joined_and_reformatted_are_scored(completions, data):
    text = mutated(data, completions)
    check(text, data.draw(st.sampled_from(["published", "verified"])))


@pytest.mark.timeout(200)
@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_published_checks_agree_with_their_patterns_on_mutated_completions(completions, data):
    agrees_with_the_patterns(mutated(data, completions))


WORDS = """
<reasoning> </reasoning> <answer> </answer> \\boxed{ \\boxed \\fbox{ \\frac \\sqrt \\text{ } { $ ( ) ** // / * + - = . ,
99 98 97 42 1/2 0 ٣ ² nan -inf 1_0 1e5 .5 \x00 1234341221434321 ``` <|eot_id|> <|endoftext|> \\div \\% \\left
"""
FRAGMENTS = st.sampled_from([*WORDS.split(), "\n", " ", "\\boxed ", "\\text{ ", "</reasoning>\n<answer>\n"])


@pytest.mark.timeout(120)
@settings(max_examples=150, deadline=2000)
@given(st.one_of(st.text(), st.lists(FRAGMENTS, max_size=30).map("".join)), st.sampled_from(["published", "verified"]))
def test_any_text_is_scored(text, variant):
    check(text, variant)


@pytest.mark.timeout(200)
@settings(max_examples=600, deadline=None)
@given(st.one_of(st.text(max_size=60), st.lists(FRAGMENTS, max_size=20).map("".join)))
def test_published_checks_agree_with_their_patterns_on_any_text(text):
    agrees_with_the_patterns(text)


@settings(max_examples=300, deadline=None)
@given(st.text("{}a\u00e9", max_size=60), st.integers(0, 40), st.integers(0, 600))
def test_the_closing_brace_is_found_at_any_depth_and_distance(text, depth, distance):
    boxed = "\\boxed" + "{" * depth + "x" * distance + text + "}" * depth
    assert last_boxed(boxed) == by_regex.last_boxed(boxed)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([".", "-", "1", "23", "4.5", " ", "a", "\u0663"]), max_size=12).map("".join))
def test_the_last_number_is_that_of_a_search_from_the_left(text):
    tagged = f"<answer>{text}</answer>"
    assert repr(gsm8k.published_answer(tagged)) == repr(by_regex.gsm8k_answer(tagged))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([1, 7, 15, 16, 17, 32]), st.sampled_from([" ", "a", "\n", "-"])), max_size=8))
def test_a_word_of_16_digits_is_found_wherever_it_stands(words):
    text = "".join("1" * length + separator for length, separator in words)
    assert sudoku.published_answer(text) == by_regex.sudoku_answer(text)
