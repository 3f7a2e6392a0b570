"""The line at the bottom of a terminal, and the lines in a log, character by character."""

from dataclasses import replace

import pytest

from dmpo_lightning.callbacks.progress_text import Progress, duration, number, plain_line, status_line

SAMPLING = Progress(
    phase="sampling",
    denoised=12,
    denoising_steps=20,
    step=37,
    steps=200,
    reward=0.6123,
    accuracy=0.641,
    ess=0.834,
    informative=0.6249,
    rate=31.24,
    seconds_left=134,
)
LARGE = replace(
    SAMPLING,
    phase="validating",
    done=11,
    total=16,
    denoised=128,
    denoising_steps=256,
    step=11234,
    steps=120000,
    reward=-1234.5678,
    rate=0.0123,
    seconds_left=200_000,
)


def test_a_terminal_of_80_columns_reads_every_measure():
    line = status_line(SAMPLING, 79)
    assert line == "37/200 sample 12/20 rew 0.612 acc 0.641 ess 0.83 inf 62% 31/s 2:14"


def test_a_wide_terminal_reads_words_and_a_bar():
    words = "37/200 sampling 12/20  reward 0.612  accuracy 0.641  ess 0.83  informative 62%  31 rollouts/s  2:14 left"
    assert status_line(SAMPLING, 120) == f"[==           ] {words}"
    assert status_line(SAMPLING, len(words)) == words


@pytest.mark.parametrize("progress", [SAMPLING, LARGE, Progress(phase="starting"), Progress()], ids=str)
@pytest.mark.parametrize("columns", [1, 10, 20, 39, 59, 79, 99, 119, 199])
def test_a_line_never_exceeds_its_columns(progress, columns):
    assert len(status_line(progress, columns)) <= columns


def test_in_a_narrow_terminal_the_steps_and_the_time_left_stay_longest():
    assert status_line(SAMPLING, 40) == "37/200 sample 12/20 rew 0.612 2:14"
    assert status_line(SAMPLING, 25) == "37/200 sample 12/20 2:14"


def test_large_numbers_leave_out_what_matters_least():
    line = status_line(LARGE, 79)
    assert line == "11234/120000 val 11/16 128/256 rew -1235 acc 0.641 ess 0.83 inf 62% 2d 07:33:20"


def test_what_is_not_known_is_left_out():
    assert status_line(Progress(phase="starting"), 79) == "starting"
    assert plain_line(Progress(step=3, loss=1.5)) == "step 3, loss 1.500"


def test_a_log_reads_all_of_it():
    assert plain_line(SAMPLING) == (
        "step 37/200, reward 0.612, accuracy 0.641, ess 0.83, informative 62%, 31 rollouts/s, 2:14 left"
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(7.4, "0:07"), (59.9, "1:00"), (754, "12:34"), (3723, "1:02:03"), (176523, "2d 01:02:03")]
)
def test_durations_read_as_on_a_clock(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0.000"), (-0.25, "-0.250"), (99.5, "99.500"), (1234.5678, "1235"), (float("nan"), "nan")]
)
def test_numbers_have_few_digits(value, text):
    assert number(value) == text
