import itertools
import json

import pytest
import torch
from benchmarks.plain_loss import weighted_cross_entropy

from benchmarks import loss

SMALL = ["--vocab_size", "3000", "--prompt_length", "20", "--completion_length", "24"]


def test_both_sides_have_the_same_loss_and_gradient():
    workload = loss.Workload(vocab_size=500, prompt_length=7, completion_length=12, rollouts=3, replicates=4)
    policy = loss.adapted_policy(workload)
    plain, ours = loss.losses(policy, workload, weighted_cross_entropy)
    assert ours().item() == pytest.approx(plain().item(), rel=1e-5)
    gradients = [loss.gradient(policy, side) for side in (plain, ours)]
    assert gradients[0].norm() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_peak_memory_does_not_grow_with_vocabulary_times_sequence():
    """At two vocabularies and two lengths: what both together add beyond what each adds alone."""
    peaks = {}
    for vocab_size, prompt_length in itertools.product((4000, 32000), (40, 160)):
        workload = loss.Workload(vocab_size=vocab_size, prompt_length=prompt_length, completion_length=32)
        policy = loss.adapted_policy(workload)
        sides = loss.losses(policy, workload, weighted_cross_entropy)
        peaks[vocab_size, prompt_length] = torch.tensor([loss.peak_bytes(policy, side) for side in sides])
    together = peaks[32000, 160] - peaks[32000, 40] - peaks[4000, 160] + peaks[4000, 40]
    logits = 4 * (32000 - 4000) * 4 * (160 - 40)
    assert together[0] >= logits
    assert together[1].abs() < logits / 50


def test_json_is_one_line_with_the_ratios(capsys):
    loss.main([*SMALL, "--repeats", "3", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"time_ratio", "memory_ratio", "gradient_error"}
    assert found["gradient_error"] < 1e-4
    assert found["memory_ratio"] > 1


def test_any_function_can_take_the_plain_side(capsys):
    loss.main([*SMALL, "--repeats", "3", "--json", "--plain", "benchmarks.plain_loss:weighted_cross_entropy"])
    assert json.loads(capsys.readouterr().out)["gradient_error"] < 1e-4
