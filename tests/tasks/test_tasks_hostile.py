"""No text, however hostile, raises, hangs or scores outside its range."""

import json
import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmpo_lightning.tasks import GSM8K, Countdown, Math500, Sudoku

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
    "unicode digits": "٣" * 50 + "²½𝟗",
    "nested boxes": "\\boxed{" * 5_000 + "1" + "}" * 5_000,
    "open boxes": "\\boxed{" * (MEGABYTE // 7),
    "closed braces": "}" * MEGABYTE,
    "open answers": "<answer>" * (MEGABYTE // 8),
    "closed answers": "</answer>" * (MEGABYTE // 9),
    "reasoning": "<reasoning>" + "</reasoning><answer>" * (MEGABYTE // 20),
    "fences": "<answer>" + "``` " * (MEGABYTE // 4),
    "blanks": "<answer>```" + " " * MEGABYTE,
    "null bytes": "\x00" * 1000,
    "fractions": "\\frac" * (MEGABYTE // 5),
    "fractions of digits": "\\frac12" * (MEGABYTE // 7),
    "roots": "\\sqrt" * (MEGABYTE // 5),
    "commas": "1," * (MEGABYTE // 2),
    "equations": "1=" * (MEGABYTE // 2),
    "texts": "\\text{ " * (MEGABYTE // 7),
    "newlines": "\n" * MEGABYTE,
    "surrogate": "\ud800",
}
WRAPPERS = ("{}", "<answer>{}</answer>", "\\boxed{{{}}}", "<answer>\\boxed{{{}}}</answer>")


def tasks(variant):
    return [(cls(rewards=variant, verifier=variant), example) for cls, example in EXAMPLES.items()]


def check(text, variant):
    for task, example in tasks(variant):
        scores = task.score(example, text)
        assert scores.keys() >= {"correct"}
        assert all(math.isfinite(value) for value in scores.values())
        assert scores["correct"] in (0.0, 1.0)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("variant", ["published", "verified"])
@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_text_is_scored(text, variant):
    for wrapper in WRAPPERS:
        check(wrapper.format(text), variant)


@pytest.mark.parametrize("variant", ["published", "verified"])
@pytest.mark.parametrize("name", ["a tower of powers", "nines", "division by zero", "parentheses", "nested boxes"])
def test_what_is_short_and_hostile_takes_50_milliseconds_at_most(name, variant):
    for wrapper in WRAPPERS:
        for task, example in tasks(variant):
            durations = []
            for _ in range(3):
                start = time.process_time()
                task.score(example, wrapper.format(HOSTILE[name]))
                durations.append(time.process_time() - start)
            assert min(durations) < 0.05


@pytest.fixture(scope="module")
def completions(test_data):
    files = sorted((test_data / "llada_8b_instruct_256").iterdir())
    return [json.loads(line)["completion"] for file in files for line in file.read_text().splitlines()[:40]]


@pytest.mark.timeout(120)
@settings(max_examples=60, deadline=2000)
@given(st.data(), st.sampled_from(["published", "verified"]))
def test_real_completions_cut_joined_and_reformatted_are_scored(completions, data, variant):
    first, second = (data.draw(st.sampled_from(completions)) for _ in range(2))
    changes = [("\n", " "), ("</answer>", ""), ("}", ""), ("1", "1,"), (" ", "\n"), ("{", "{{")]
    old, new = data.draw(st.sampled_from(changes))
    check((first[: data.draw(st.integers(0, len(first)))] + second).replace(old, new), variant)


WORDS = """
<reasoning> </reasoning> <answer> </answer> \\boxed{ \\boxed \\fbox{ \\frac \\sqrt \\text{ } { $ ( ) ** // / * + - = . ,
99 98 97 42 1/2 0 ٣ ² \x00 1234341221434321 ``` <|eot_id|> <|endoftext|> \\div \\% \\left
"""
FRAGMENTS = st.sampled_from([*WORDS.split(), "\n", " ", "\\boxed ", "\\text{ "])


@pytest.mark.timeout(120)
@settings(max_examples=150, deadline=2000)
@given(st.one_of(st.text(), st.lists(FRAGMENTS, max_size=30).map("".join)), st.sampled_from(["published", "verified"]))
def test_any_text_is_scored(text, variant):
    check(text, variant)
