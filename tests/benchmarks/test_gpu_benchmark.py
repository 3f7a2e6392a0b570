"""The benchmark for GPUs, in small: what fails or hangs costs its own section only."""

import json

import pytest
from benchmarks.gpu import __main__ as program
from benchmarks.gpu.sections import LIMITS, SECTIONS
from benchmarks.gpu.sizes import EIGHT_B


def run(tmp_path, *arguments: str) -> tuple[int, list[dict]]:
    status = program.main(["--size", "tiny", "--output", str(tmp_path), *arguments])
    return status, [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]


def sections_of(records: list[dict], key: str) -> list[str]:
    return list(dict.fromkeys(record["section"] for record in records if key in record))


@pytest.mark.slow
def test_a_planted_failure_leaves_the_other_sections_results(tmp_path, capsys):
    status, records = run(tmp_path, "--only", "machine", "forward", "scoring", "--plant", "forward")
    assert status == 1
    assert sections_of(records, "value") == ["machine", "scoring"]
    (failure,) = [record for record in records if "error" in record]
    assert failure["section"] == "forward"
    assert "a planted failure" in failure["error"]
    assert "Traceback" in failure["error"]
    printed = capsys.readouterr().out
    assert "FAILED: RuntimeError: a planted failure" in printed
    assert "scoring 2 rollouts x 4 maskings" in printed


@pytest.mark.slow
def test_a_section_that_takes_too_long_is_ended_and_the_next_is_begun(tmp_path):
    status, records = run(tmp_path, "--only", "training", "machine", "--limit", "1")
    assert status == 1
    assert [record["section"] for record in records if "error" in record][:1] == ["training"]
    assert "ended after 1 s" in next(record["error"] for record in records if "error" in record)
    assert any(record.get("section") == "machine" and record.get("event") == "start" for record in records)


def test_a_budget_that_is_used_up_is_said(tmp_path):
    _, records = run(tmp_path, "--only", "machine", "forward", "--budget", "0")
    assert [record["error"] for record in records] == ["not begun: the budget of 0 s was used up"] * 2


def test_a_half_written_line_is_not_read(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"section": "machine", "value": 1}\n{"section": "forw')
    assert program.read(path) == [{"section": "machine", "value": 1}]


def test_the_watcher_knows_all_sections_without_importing_torch():
    assert tuple(SECTIONS) == program.NAMES
    assert program.section_limits(None) == LIMITS


def test_the_floor_of_the_recipe_is_that_of_the_cost_model():
    """docs/performance.md: 14.0 GFLOP per token, of which the attention is not a part."""
    tokens = 16 * 456
    products = EIGHT_B.flops(tokens, rows=16, attended=0)
    assert products == pytest.approx(2 * 6.98e9 * tokens, rel=1e-3)
    assert EIGHT_B.flops(tokens, rows=16, attended=456) / products == pytest.approx(1.02, abs=0.005)
    assert (EIGHT_B.prompt_length, EIGHT_B.completion_length, EIGHT_B.denoising_steps) == (200, 256, 128)
