import sys

import pytest

from benchmarks import logging as benchmark


@pytest.mark.slow
def test_buffers_with_logging_and_without_are_both_timed(capsys):
    screen = sys.stderr
    found = benchmark.main(["--buffers", "8", "--prompts", "2", "--group", "2", "--length", "20"])
    assert set(found) == {"seconds_with", "seconds_without", "ratio", "share_in_hooks"}
    assert all(value > 0 for value in found.values())
    assert found["share_in_hooks"] < 1
    assert "ratio of medians" in capsys.readouterr().out
    assert sys.stderr is screen
