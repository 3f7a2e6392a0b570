"""The benchmarks of logging and of records run to their end, or say what they need."""

import json
import sys

import pytest

from benchmarks import logging as benchmark
from benchmarks import records


@pytest.mark.slow
def test_buffers_with_logging_and_without_are_both_timed(capsys):
    screen = sys.stderr
    found = benchmark.main(["--buffers", "8", "--prompts", "2", "--group", "2", "--length", "20"])
    assert set(found) == {"seconds_with", "seconds_without", "ratio", "share_in_hooks"}
    assert all(value > 0 for value in found.values())
    assert found["share_in_hooks"] < 1
    assert "ratio of medians" in capsys.readouterr().out
    assert sys.stderr is screen


@pytest.mark.parametrize(
    ("main", "options", "says"),
    [
        (benchmark.main, ["--buffers", "4"], "--buffers must be at least 5, got 4"),
        (benchmark.main, ["--prompts", "3", "--group", "2"], "multiple of 4, got 6"),
        (records.main, ["--prompts", "1", "--group_size", "2"], "multiple of 4, got 2"),
    ],
)
def test_sizes_that_cannot_be_timed_are_refused_before_the_run(main, options, says, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(options)
    assert says in capsys.readouterr().err


@pytest.mark.slow
def test_records_are_timed(capsys):
    records.main(["--prompts", "2", "--group_size", "2", "--buffers", "3", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"share", "buffer_seconds", "record_seconds", "bytes"}
    assert 0 < found["share"] < 1
