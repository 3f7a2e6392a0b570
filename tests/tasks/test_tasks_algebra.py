"""Equality by computer algebra, which runs in a worker process."""

import json
import logging
from pathlib import Path

import pytest

from dmpo_lightning import Math500
from dmpo_lightning.__main__ import main
from dmpo_lightning.commands.score import make_task
from dmpo_lightning.tasks.algebra import MAX_TEXT, AlgebraicEquality

DIFFERENCES = json.loads((Path(__file__).parent / "algebra_differences.json").read_text())


@pytest.fixture(scope="module")
def algebra():
    return AlgebraicEquality(time_limit=5.0)


def test_real_answers_that_only_algebra_calls_equal_are_those_listed(test_data):
    plain, algebraic = make_task("math500", "verified"), make_task("math500", "verified", algebra=True)
    found = []
    lines = (test_data / "llada_8b_instruct_256" / "math500.jsonl").read_text().splitlines()
    for number, line in enumerate(lines, 1):
        record = json.loads(line)
        example = plain.from_saved(record)
        before, after = (task.check(example, record["completion"]) for task in (plain, algebraic))
        assert after.correct >= before.correct
        if after.correct != before.correct:
            found.append({"line": number, "answer": after.answer, "gold": example["answer"]})
    assert found == [{key: value for key, value in each.items() if key != "reason"} for each in DIFFERENCES]
    assert all(each["reason"] for each in DIFFERENCES)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("x+1", "1+x"),
        ("\\frac{\\sqrt{3}}{3}", "\\frac{1}{\\sqrt{3}}"),
        ("(x+1)^2", "x^2+2x+1"),
        ("\\$12", "12"),
        ("3,5,7", "3, 7, 5"),
        ("10,\\!080", "7! \\times 2!"),
        ("\\sqrt{3}/3", "\\frac{\\sqrt3}{3}"),
        ("-2 + 7i", "7i - 2"),
        ("\\text{(C)}", "C"),
        ("\\{1,2\\}", "\\{2,1\\}"),
        ("\\{1,2\\}", "2,1"),
        ("(1,2x+2)", "(1,2(x+1))"),
        (
            "\\begin{pmatrix} 1/2 \\\\ 3 \\end{pmatrix}",
            "\\mathbf{a} = \\begin{pmatrix} \\frac{1}{2} \\\\ 3 \\end{pmatrix}",
        ),
        ("2,-2", "\\pm 2"),
        ("1\\pm\\sqrt2", "1-\\sqrt{2}, 1+\\sqrt 2"),
        ("(-\\infty,2]\\cup[3,\\infty)", "[3,\\infty)\\cup(-\\infty,2]"),
        ("1,2", "x=1 \\text{ or } x=2"),
        ("x>2", "2<x"),
        ("2x=4y", "x=2y"),
        ("x<2", "-x>-2"),
        ("0.5x", "\\frac{x}{2}"),
        ("\\sqrt{8}", "2\\sqrt2"),
        ("\\frac{1}{2^{99}}", "2^{-99}"),
        ("y=2x+1", "y=1+2x"),
        ("\\frac{1}{2004!}", "\\frac{2005}{2005!}"),
        ("\\sin^2 x+\\cos^2 x", "1"),
        ("\\log_2 8", "3"),
        ("5", "x=5"),
        ("\\frac{\\pi}{4}", "\\pi/4"),
        ("2+\\sqrt3", "\\sqrt{3}+2"),
        ("\\sqrt{5+2\\sqrt6}", "\\sqrt2+\\sqrt3"),
        ("\\{(1,2),(3,4)\\}", "(3,4),(1,2)"),
        ("\\frac{9}{7}", "1\\frac27"),
        ("p^2-q", "-q+p^2"),
        ("(2,1)", "(2, \\frac{2}{2})"),
        ("0<x<1+1", "0<x<2"),
        ("\\pi r^2", "r^2\\pi"),
    ],
)
def test_equal_as_mathematics(algebra, gold, answer):
    assert algebra(gold, answer)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("1", ""),
        ("1", "("),
        ("2516_8", "2516_7"),
        ("11001_2", "11001_3"),
        ("\\frac{1}{2004!}", "\\frac{1}{2006!}"),
        ("\\frac{1}{2^{99}}", "\\frac{1}{2^{98}}"),
        (".0000672", "0.000067"),
        ("(1,2)", "\\{1,2\\}"),
        ("(1,2)", "1,2"),
        ("(1,2,3)", "\\{1,2,3\\}"),
        ("[2]", "2"),
        ("\\{2\\}", "2"),
        ("2", "[2]"),
        ("(1,2)", "[1,2]"),
        ("(1,2)", "(2,1)"),
        ("(2,1)", "(3,1)"),
        ("(5,3)", "(4,3)"),
        ("[1,2)", "[1,2]"),
        ("1/3", "0.333333"),
        ("\\pi", "3.14159265358979"),
        ("x>2", "x<2"),
        ("x>2", "x\\ge 2"),
        ("x=2", "y=2x"),
        ("10\\text{ p.m.}", "10\\text{ a.m.}"),
        ("10\\text{ p.m.}", "10"),
        ("5\\text{ million}", "5"),
        ("12345", "12, 345"),
        ("x+1", "x-1"),
        ("2", "\\text{two}"),
        ("\\sqrt2", "1.41421356237"),
        ("e^{-50}", "e^{-51}"),
        ("10^{-20}", "10^{-21}"),
        ("\\frac{x}{10^{20}}", "\\frac{x}{10^{21}}"),
        ("10^{-20}+x", "10^{-21}+x"),
        ("2^{100}", "2^{100}+1"),
        ("2^{100}x", "(2^{100}+1)x"),
        ("1,2,2", "1,1,2"),
        ("1,2", "1,2,2"),
        ("x<y", "y<x"),
        ("2x+1=0", "2x-1=0"),
        ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1\\\\3\\end{pmatrix}"),
        ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "(1,2)"),
        ("A", "B"),
        ("\\text{east}", "\\text{west}"),
        ("\\infty", "-\\infty"),
        ("1234567_8", "342391"),
        ("BEE_{16}", "BEE_{15}"),
        ("5!", "5"),
        ("0.1234567", "0.12345671"),
        ("\\sqrt{2}\\cdot10^{-8}", "\\sqrt{3}\\cdot10^{-8}"),
        ("1000000.0000001", "1000000"),
        ("0<x<2", "0<x<3"),
        ("0<x<2", "0\\le x<2"),
    ],
)
def test_not_equal_as_mathematics(algebra, gold, answer):
    assert not algebra(gold, answer)
    assert not algebra(answer, gold)


def test_what_cannot_be_an_answer_never_reaches_the_worker():
    algebra = AlgebraicEquality()
    assert not algebra("1", "1" * (MAX_TEXT + 1))
    assert not algebra("1", '__import__("os")')
    assert not algebra("1", "\x00")
    assert [worker.process for worker in algebra._pool._workers] == [None]


def test_a_hostile_expression_ends_at_the_time_limit_and_the_next_is_compared(caplog):
    algebra = AlgebraicEquality(time_limit=1.0)
    with caplog.at_level(logging.WARNING):
        assert not algebra("1", "9^{9^{9^{9^{9}}}}!")
    assert "was not compared with '1': time limit" in caplog.text
    # With a new worker, of which the imports are no part of the call.
    assert algebra("x+1", "1+x")


def test_the_score_command_compares_by_algebra(test_data, tmp_path, capsys):
    file = tmp_path / "one.jsonl"
    file.write_text(json.dumps({"question": "?", "ground_truth": "-2+7i", "completion": "\\boxed{7i-2}"}) + "\n")
    command = ["score", "--task", "math500", "--file", str(file), "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["correct"] == 0
    assert main([*command, "--algebra"]) == 0
    assert json.loads(capsys.readouterr().out)["correct"] == 1


@pytest.mark.parametrize(("task", "check"), [("gsm8k", "verified"), ("math500", "published")])
def test_algebra_is_for_the_verified_check_of_math_alone(task, check):
    with pytest.raises(ValueError, match="needs --task math500 and --check verified"):
        make_task(task, check, algebra=True)


def test_without_math_verify_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr("dmpo_lightning.tasks.math500.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install dmpo-lightning\[math\]"):
        Math500(algebra=True)
