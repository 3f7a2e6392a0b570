import json

import pytest
import torch
from benchmarks.samplers import CACHES, SCHEDULES, Case, Size, main, parsed, random_policy, time_decoding

from benchmarks import plain as plain_module

SMALL = Size(vocab_size=97, prompt_length=5, completion_length=8, rows=2, denoising_steps=4, block_length=4)


@pytest.fixture(scope="module")
def policy():
    return random_policy(SMALL)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("schedule", list(SCHEDULES))
def test_both_sides_decode_the_same_tokens_at_temperature_zero(policy, schedule, cache):
    timing = time_decoding(Case("small", 0.0, schedule, cache), SMALL, policy, plain_module.generate, 3)
    assert timing.mismatches == 0
    assert timing.ratio > 0


def test_mismatches_count_the_tokens_of_a_plain_side_that_decodes_something_else(policy):
    def off_by_one(*arguments, **options):
        result = plain_module.generate(*arguments, **options)
        result.completion_ids[0, :3] += 1
        return result

    case = Case("small", 0.0, "static", "none")
    assert time_decoding(case, SMALL, policy, off_by_one, 3).mismatches == 3


def test_random_draws_are_not_compared(policy):
    case = Case("small", 0.2, "static", "none")
    assert time_decoding(case, SMALL, policy, plain_module.generate, 3).mismatches is None


def test_only_the_mask_token_is_banned_in_the_random_policy(policy):
    assert policy.facts.banned_token_ids == (96,)


def test_json_is_one_line_per_case(capsys):
    main(["--size", "transfer", "--json"])
    (line,) = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    assert result.pop("ratio") > 0
    assert result == {
        "size": "transfer",
        "temperature": 0.0,
        "schedule": "threshold",
        "cache": "none",
        "mismatches": 0,
    }


def test_any_function_can_take_the_plain_side():
    assert parsed(["--plain", "torch:argmax"]).plain is torch.argmax
    assert parsed([]).plain is plain_module.generate


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--plain", "benchmarks.plain:missing"], "importable module:function"),
        (["--plain", "nothing"], "importable module:function"),
        (["--repeats", "2"], "at least 3"),
    ],
)
def test_wrong_options_are_refused(arguments, complaint, capsys):
    with pytest.raises(SystemExit):
        parsed(arguments)
    assert complaint in capsys.readouterr().err
