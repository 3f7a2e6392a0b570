"""Nothing hangs: lost ranks, gradients that are not finite."""

import re

import pytest
from ranks import end_ranks, run_ranks

from tiers import slow_unless


@pytest.mark.parametrize("kind", slow_unless(lambda kind: kind == "ddp", ["ddp", "fsdp2", "fsdp1", "zero2"]))
def test_a_step_with_an_infinite_loss_on_one_rank_is_left_out_on_all(tmp_path, kind):
    case = {"kind": kind, "adapter": "lora", "batches": [1]}
    ranks = run_ranks("cases.with_infinite_losses", 2, tmp_path, **case)
    for rank in ranks:
        assert (rank["skipped"], rank["saved"], rank["logged"], rank["steps"]) == (1, 1, 1.0, 4)
        assert rank["finite"]
    assert ranks[0]["weights"] == ranks[1]["weights"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "zero2"])
def test_too_many_of_them_end_the_run_on_all_ranks(tmp_path, kind):
    case = {"kind": kind, "adapter": "lora", "batches": [0, 1, 2], "limit": 2}
    ended = end_ranks("cases.with_infinite_losses", 2, tmp_path, **case)
    assert ended.statuses == [1, 1]
    for rank in (0, 1):
        assert "3 optimizer steps in a row had gradients that are not finite" in ended.log(rank)


def test_torch_names_ranks_out_of_step(tmp_path):
    """As docs/decisions/016-equal-forwards.md has users find the sampler that forgets other ranks."""
    # A machine with other work may take a minute between two collectives, and from one rank's error to the other's.
    case = {"kind": "fsdp2", "adapter": "full", "sampler": "uneven", "flags": {"timeout": 300}}
    ended = end_ranks("cases.compared_by_torch", 2, tmp_path, timeout=600, grace=300, **case)
    assert ended.statuses == [1, 1]
    assert "Detected mismatch between collectives on ranks. Rank 1 is running collective" in ended.log(1)


LOST = [("ddp", "SIGKILL"), ("zero3", "SIGKILL"), ("ddp", "SIGSTOP"), ("fsdp2", "SIGSTOP"), ("zero2", "SIGSTOP")]


@pytest.mark.parametrize(("kind", "name"), slow_unless(lambda *case: case == ("ddp", "SIGKILL"), LOST))
def test_a_lost_rank_ends_the_others_within_the_timeout(tmp_path, kind, name):
    """A killed one closes its connections; of one that stands still only time tells."""
    limits = {"timeout": 60, "grace": 1 if name == "SIGSTOP" else 20}
    ended = end_ranks("cases.with_a_lost_rank", 2, tmp_path, kind=kind, name=name, patience=6, **limits)
    assert ended.statuses[0] not in (0, -9)
    assert ended.seconds[0] < 40
    assert re.search("Connection (closed|reset) by peer|[Tt]imed out|timeout", ended.log(0)), ended.log(0)[-3000:]


REFUSED = [
    ("fsdp2", {"quantization": "nf4"}, "`quantization` needs whole layers on each rank, but FSDP2Strategy"),
    ("zero3", {"quantization": "nf4"}, "`quantization` needs whole layers on each rank, but ZeROOnCPU divides them"),
    ("fsdp1", {"gather_for_generation": True}, "`gather_for_generation` does not work under FSDP1"),
    ("fsdp2", {"sample_merged": True}, "`sample_merged` needs whole weights on each rank"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "options", "message"), REFUSED)
def test_what_does_not_work_together_is_refused_before_training(tmp_path, kind, options, message):
    ended = end_ranks("cases.one_run", 1, tmp_path, kind=kind, adapter="lora", **options)
    assert ended.statuses == [1]
    assert message in ended.log(0)
