"""Two ranks evaluate as one does; 7 prompts in batches of 3 leave rank 1 with one real prompt less and one batch of
filler alone, 2 prompts leave it without any.
"""

import json
from pathlib import Path

import evaluation_run
import pytest
from ranks import run_ranks

from dmpo_lightning.commands.score import make_task, score_file


def launch(processes: int, puzzles: int, folder: Path) -> list[dict]:
    """What each rank of `evaluation_run.py` saw; a single one runs in this process."""
    folder.mkdir()
    case = {"processes": processes, "puzzles": puzzles, "output": str(folder)}
    if processes == 1:
        return [evaluation_run.main(**case)]
    return run_ranks("evaluation_run.main", processes, folder, **case)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> dict[int, tuple[Path, list[dict]]]:
    """The folder and the ranks of a run with one process and of one with two."""
    folder = tmp_path_factory.mktemp("evaluation")
    return {count: (folder / str(count), launch(count, 7, folder / str(count))) for count in (1, 2)}


def test_two_ranks_report_what_one_reports(ranks):
    (one,), two = ranks[1][1], ranks[2][1]
    assert one["prompts"] == 7
    assert 0 < one["means"]["accuracy"][0] < 1
    assert {"pass@1", "pass@2", "pass@4", "majority", "correct_cells", "effective_length"} <= set(one["means"])
    for rank in two:
        assert rank["prompts"] == 7
        assert list(rank["means"]) == list(one["means"])
        for name, pair in one["means"].items():
            assert rank["means"][name] == pytest.approx(pair, abs=1e-6), name


def test_every_rank_can_monitor_the_accuracy(ranks):
    (one,), two = ranks[1][1], ranks[2][1]
    expected = one["logged"]["test/sampled/accuracy"]
    assert [rank["logged"]["test/sampled/accuracy"] for rank in two] == pytest.approx([expected] * 2, abs=1e-6)


def test_two_ranks_leave_the_file_of_one_in_prompt_order(ranks):
    one, two = ((ranks[count][0] / "completions.jsonl").read_text() for count in (1, 2))
    places = [(record["index"], record["rollout"]) for record in map(json.loads, one.splitlines())]
    assert places == [(index, rollout) for index in range(7) for rollout in range(4)]
    assert two == one
    assert not list(ranks[2][0].glob("*rank*.jsonl"))


def test_the_merged_file_scores_to_the_accuracy_that_was_reported(ranks):
    for folder, seen in ranks.values():
        summary = score_file(make_task("sudoku", "published"), folder / "completions.jsonl")
        assert summary["n"] == 28
        assert summary["accuracy"] == pytest.approx(seen[0]["means"]["accuracy"][0], abs=1e-6)


def test_the_table_is_printed_once(ranks):
    assert "".join((ranks[2][0] / f"rank{rank}.log").read_text() for rank in (0, 1)).count("Sudoku/sampled") == 1
    assert json.loads((ranks[2][0] / "evaluation.json").read_text())["n"] == 7


@pytest.mark.slow
def test_a_rank_without_any_prompt_keeps_in_step(tmp_path):
    (one,), two = (launch(count, 2, tmp_path / str(count)) for count in (1, 2))
    for rank in two:
        assert rank["prompts"] == 2
        assert rank["means"] == {name: pytest.approx(pair, abs=1e-6) for name, pair in one["means"].items()}
