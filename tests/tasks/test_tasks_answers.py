"""Where a completion states its answer: what its tag holds, and the rule of the ``verified`` checks."""

import pytest

from dmpo_lightning.tasks.answers import final_answer, tag_text


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("<answer>42</answer>", "42"),
        ("<reasoning>7</reasoning>\n<answer>\n 42 \n</answer>\n", "42"),
        ("<answer>1</answer> or <answer>2</answer>", "2"),
        ("<answer>42", "42"),
        (" 42 ", "42"),
        ("42</answer> 43", "42"),
        ("<answer></answer>", ""),
        ("<answer>1</answer><answer>", ""),
        ("<answer><answer>5</answer></answer>", "5"),
        ("", ""),
    ],
)
def test_the_answer_is_what_the_last_tag_holds(completion, text):
    assert tag_text(completion) == text


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<reasoning>\\boxed{1}</reasoning><answer>\\boxed{\\frac{1}{2}}</answer>", "\\frac{1}{2}"),
        ("<answer>\n5\n</answer>", "5"),
        ("so \\boxed{5}<|eot_id|>\\boxed{6}", "5"),
        ("<answer></answer> \\boxed{5}", "5"),
        ("\\boxed{4} <answer></answer> \\boxed{5}", "5"),
        ("\\boxed{5} <answer></answer>", "5"),
        ("\\boxed{<answer>5</answer>}", "5"),
        (" 5 ", "5"),
        ("first\n5", ""),
        ("\\boxed{\n5\n}", "5"),
        ("\\fbox{4}", "4"),
    ],
)
def test_the_final_answer(completion, answer):
    assert final_answer(completion) == answer


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("\\boxed{2<x}", "2<x"),
        ("\\boxed{0<x<y}", "0<x<y"),
        ("\\boxed{c<b<a}", "c<b<a"),
        ("<answer>c<b<a</answer>", "c<b<a"),
        ("<answer>c<b<a", "c<b<a"),
        ("<answer>x>2</answer>", "x>2"),
        ("\\boxed{a<b", "a<b"),
    ],
)
def test_an_inequality_is_no_tag_that_was_cut_off(completion, answer):
    assert final_answer(completion) == answer


@pytest.mark.parametrize(
    "completion",
    [
        "<answer>\\boxed{5\n</answer>",
        "<answer>\\boxed{5</answer",
        "<answer>\\boxed{5\n</answer}",
        "<answer>\\boxed{5></answer>",
        "<answer>5</answ",
        "<answer>5\n<",
        "\\boxed{5<|eot",
        "$\\boxed{5$ and more",
        "\\boxed{5>",
    ],
)
def test_what_is_left_of_a_closing_tag_or_brace_is_no_answer(completion):
    assert final_answer(completion) == "5"


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed{x = \\boxed{5}}", "x = 5"),
        ("\\boxed{(\\boxed{1}, \\boxed{2})}", "(1, 2)"),
        ("\\boxed{5 and then \\boxed{6}", "6"),
        ("\\boxed{5\nso \\boxed{6}", "6"),
        ("\\boxed{\\frac{1}{2}", "\\frac{1}{2}"),
        ("{\\boxed{5}", "5"),
        ("\\boxed{5}}", "5"),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        ("\\boxed{\\left\\{1\\right.}", "\\left\\{1\\right."),
        ("\\boxed{\\begin{pmatrix}1\\\\2\\end{pmatrix}}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
    ],
)
def test_boxes_inside_boxes_and_boxes_that_never_close(completion, answer):
    assert final_answer(completion) == answer


@pytest.mark.parametrize(
    "completion",
    [
        "\\boxed {5}",
        "\\boxed 5",
        "\\boxed 5$ yes",
        "\\boxed5",
        "boxed{5}",
        "\x08oxed{5}",
        "\\\\boxed{5}",
        "is\\boxed{5}",
    ],
)
def test_other_spellings_of_a_box(completion):
    assert final_answer(f"so\n{completion}\nqed") == "5"


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("\\boxed{5} \\boxed{...}", "5"),
        ("\\boxed{5} \\boxed{\\ldots}", "5"),
        ("\\boxed{5} \\boxed{ }", "5"),
        ("<answer>\\boxed{...}</answer> \\boxed{5}", "5"),
        ("\\boxed{5} then use the \\boxed format.", "5"),
        ("\\boxed{5} \\boxed{t}", "t"),
        ("\\boxed{5} \\boxed{lost}", "lost"),
    ],
)
def test_a_box_that_was_copied_from_the_prompt_is_no_answer(completion, answer):
    assert final_answer(completion) == answer
