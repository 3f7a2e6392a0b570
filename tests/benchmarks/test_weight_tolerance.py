import json

import pytest

from benchmarks import weight_tolerance
from dmpo_lightning import WDCE


@pytest.mark.parametrize("baseline", ["group", "none", "negative"])
@pytest.mark.slow
def test_the_default_tolerance_costs_at_most_two_thousandths_of_the_gradient(baseline):
    """On real weights: the first steps of training the embedded model."""
    default = WDCE(reward_temperature=0.1).weight_tolerance
    effects = {effect.tolerance: effect for effect in weight_tolerance.run(baseline, steps=8)}
    assert effects[0.0].gradient_error == 0
    assert effects[default].gradient_error <= 2e-3
    assert effects[0.1].gradient_error > 2e-3
    assert effects[0.1].skipped_rollouts > effects[0.0].skipped_rollouts


@pytest.mark.slow
def test_json_is_one_line_per_tolerance(capsys):
    weight_tolerance.main(["--baseline", "none", "--steps", "3", "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["tolerance"] for line in lines] == list(weight_tolerance.TOLERANCES)
    assert set(lines[0]) == {"baseline", "tolerance", "gradient_error", "skipped_rollouts"}
