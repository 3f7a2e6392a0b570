import pytest

from dmpo_lightning.tasks.answers import tag_text


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
