import json
import re
import sys

import pytest

from dmpo_lightning import LatinSquareDemonstrations
from dmpo_lightning.__main__ import main
from dmpo_lightning.commands.score import TASKS, make_task, score_file

PUBLISHED = {"gsm8k": (863, 1130), "math500": (162, 500), "countdown": (50, 256), "sudoku": (0, 256)}


def saved(test_data, task):
    return test_data / "llada_8b_instruct_256" / f"{task}.jsonl"


def records(test_data, task):
    return [json.loads(line) for line in saved(test_data, task).read_text().splitlines()]


@pytest.mark.parametrize("task", PUBLISHED)
def test_published_totals_of_real_completions(test_data, capsys, task):
    assert main(["score", "--task", task, "--check", "published", "--file", str(saved(test_data, task)), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["correct"], summary["n"]) == PUBLISHED[task]
    assert (summary["task"], summary["check"]) == (task, "published")
    if task == "sudoku":
        assert (summary["correct_cells"], summary["blank_cells"], summary["correct"]) == (137, 2048, 0)
        assert summary["accuracy"] == 137 / 2048
    else:
        assert summary["accuracy"] == summary["correct"] / summary["n"]


@pytest.mark.parametrize("task", PUBLISHED)
def test_published_verdicts_item_by_item(test_data, task):
    made = make_task(task, "published")
    for record in records(test_data, task):
        found = made.check(made.from_saved(record), record["completion"])
        assert found.answer == record["published_answer"]
        if task == "sudoku":
            assert (found.share.right, found.share.of) == (record["correct_cells"], record["empty_cells"])
        else:
            assert found.correct == record["published_correct"]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_our_own_records_hold_an_example(tmp_path):
    example = {"numbers": [1, 2], "target": 3}
    file = write(tmp_path / "a.jsonl", *({"example": example, "completion": text} for text in ("1+2", "<answer>2-1")))
    assert score_file(make_task("countdown", "verified"), file) == {"n": 2, "correct": 1, "accuracy": 0.5}


def test_samplers_and_lengths_are_counted_by_themselves(tmp_path, capsys):
    record = {"example": {"numbers": [1, 2], "target": 3}, "length": 8}
    rows = [record | {"sampler": name, "completion": text} for name, text in (("a", "1+2"), ("b", "1+2"), ("b", "2-1"))]
    file = write(tmp_path / "a.jsonl", *rows)
    summary = score_file(make_task("countdown", "verified"), file)
    assert (summary["n"], summary["correct"]) == (3, 2)
    assert summary["samplers"] == {
        "a/8": {"n": 1, "correct": 1, "accuracy": 1.0},
        "b/8": {"n": 2, "correct": 1, "accuracy": 0.5},
    }
    assert main(["score", "--task", "countdown", "--file", str(file)]) == 0
    assert "b/8             1/2, accuracy 0.5" in capsys.readouterr().out


def test_the_accuracy_of_sudoku_is_that_of_its_answer_check(tmp_path):
    example = {"puzzle": "1204340021434320", "solution": "1234341221434321"}
    file = write(tmp_path / "a.jsonl", {"example": example, "completion": "<answer>1234341021434321</answer>"})
    assert score_file(make_task("sudoku", "published"), file)["accuracy"] == 0.75
    verified = score_file(make_task("sudoku", "verified"), file)
    assert (verified["accuracy"], verified["correct_cells"], verified["blank_cells"]) == (0.0, 3, 4)


@pytest.mark.parametrize("task", PUBLISHED)
def test_text_behind_the_first_end_token_changes_no_published_verdict(test_data, task):
    """Our completions end there, the saved ones do not."""
    made = make_task(task, "published")
    for record in records(test_data, task):
        cut = re.sub(r"(<\|(?:eot_id|endoftext)\|>).*", r"\1", record["completion"], count=1, flags=re.DOTALL)
        example = made.from_saved(record)
        ours, theirs = made.check(example, cut), made.check(example, record["completion"])
        assert (ours.correct, ours.share) == (theirs.correct, theirs.share)


def test_a_task_by_dotted_path_is_scored_by_its_accuracy(tmp_path, capsys):
    example = {"puzzle": "1000000000000000"}
    file = write(tmp_path / "a.jsonl", {"example": example, "completion": "<answer>1234214334124321</answer>"})
    path = "dmpo_lightning.LatinSquareDemonstrations"
    assert main(["score", "--task", path, "--file", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["correct"] == 1


def test_without_json_the_summary_is_a_table(tmp_path, capsys):
    file = write(tmp_path / "a.jsonl", {"question": "", "ground_truth": 4.0, "completion": "<answer>4</answer>"})
    assert main(["score", "--task", "gsm8k", "--file", str(file)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["accuracy", "1.0"]


@pytest.mark.parametrize("task", ["gsm9k", "no.such.Task", "json.dumps", "dmpo_lightning.tasks.Nothing"])
def test_an_unknown_task_is_an_error_in_one_line(tmp_path, capsys, task):
    assert main(["score", "--task", task, "--file", str(tmp_path / "none.jsonl")]) == 2
    assert "`--task` must be one of gsm8k, math500, countdown, sudoku" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ("[]", "line 1: not a JSON object but list"),
        ("{}", "row 1: column 'completion' is missing"),
        ('{"completion": 3, "question": "", "ground_truth": 1}', "`completion` must be a text"),
        ('{"completion": "x"}', "a record needs `example`"),
        ("", "holds no usable row"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    file = tmp_path / "a.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(ValueError, match=message) as error:
        score_file(make_task("gsm8k", "verified"), file)
    assert str(file) in str(error.value)


def test_the_table_of_names_is_complete():
    assert set(TASKS) == set(PUBLISHED)


PUZZLE = {"task": "four", "puzzle": "1000040000400020", "solution": "1234341221434321"}


def test_of_a_mixture_one_task_is_scored(tmp_path, capsys):
    rows = [
        {"example": PUZZLE, "completion": PUZZLE["solution"]},
        {"example": {"task": "gsm8k", "question": "?", "answer": "1"}, "completion": "\\boxed{2}"},
    ]
    file = write(tmp_path / "a.jsonl", *rows)
    assert score_file(make_task("gsm8k", "verified"), file, only="gsm8k")["n"] == 1
    assert score_file(make_task("sudoku", "verified"), file, only="four")["correct"] == 1
    assert main(["score", "--task", "sudoku", "--file", str(file), "--json"]) == 2
    assert "['four', 'gsm8k']; name one of them by `--only`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "record"),
    [
        ("sudoku", {"question": "1000040000400020", "ground_truth": "1"}),
        ("gsm8k", {"example": {"a": 1}}),
        ("gsm8k", {"example": 3}),
        ("countdown", {"question": "?", "ground_truth": [[1, 2], float("inf")]}),
        ("countdown", {"question": "?", "ground_truth": ["12", 3]}),
        ("countdown", {"question": "?", "ground_truth": [[1.5, 2], 3]}),
    ],
)
def test_a_bad_record_is_named_with_its_line(tmp_path, task, record):
    file = write(tmp_path / "a.jsonl", record | {"completion": "1"})
    with pytest.raises(ValueError, match=r"a\.jsonl, row 1: .*Mend or remove the row"):
        score_file(make_task(task, "verified"), file)


def test_a_task_that_needs_arguments_is_refused():
    with pytest.raises(ValueError, match="cannot be made without arguments"):
        make_task("dmpo_lightning.Task", "verified")


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda *_: True, r"row 1: the check failed: TypeError\('the check must return a Verdict, got True'\)"),
        (lambda *_: sys.exit(3), r"row 1: the check failed: SystemExit\(3\)"),
        (lambda *_: (number for number in ()), "row 1: the check failed: `check` returned a generator"),
    ],
)
def test_a_check_that_fails_is_named_with_its_row(tmp_path, check, message):
    class Own(LatinSquareDemonstrations):
        def check(self, example, completion):
            return check()

    file = write(tmp_path / "a.jsonl", {"example": {}, "completion": "x"})
    with pytest.raises(ValueError, match=message):
        score_file(Own(), file)
