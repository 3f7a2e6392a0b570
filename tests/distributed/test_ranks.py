"""Any number of ranks: the same run on one and on two, restarts on more or fewer, prompts that do not divide evenly."""

import pytest
from ranks import end_ranks, run_ranks

SHARED = {"dropout": 0.0, "tolerance": 0.0}
"""Dropout draws from each rank's generator, and the tolerance leaves out rows by the share of their micro-batch."""


def test_plain_steps_of_two_ranks_are_those_of_one_that_accumulates_twice_as_much(tmp_path):
    """Neither clipped nor divided by Adam, so that a factor shows. Other strategies are compared with DDP."""
    case = SHARED | {"kind": "ddp", "adapter": "lora", "optimizer": "SGD", "learning_rate": 1e-2}
    flags = {"gradient_clip_val": None}
    one, *_ = run_ranks("cases.one_run", 1, tmp_path / "1", flags=flags | {"prompts": 4, "accumulate": 4}, **case)
    two = run_ranks("cases.one_run", 2, tmp_path / "2", flags=flags | {"prompts": 2, "accumulate": 2}, **case)
    means = [sum(one["losses"][step : step + 4]) for step in range(0, 16, 4)]
    halves = [sum(rank["losses"][step] + rank["losses"][step + 1] for rank in two) / 2 for step in range(0, 8, 2)]
    assert halves == pytest.approx(means, abs=1e-5)  # Lightning has divided each by the micro-batches of its step
    assert max(means) - min(means) > 0.1


@pytest.mark.parametrize(
    ("kind", "adapter", "prompt_weight"),
    [("ddp", "lora", "reward"), pytest.param("fsdp2", "full", "equal", marks=pytest.mark.slow)],
)
def test_two_ranks_with_half_of_the_prompts_each_are_one_rank_with_all(tmp_path, kind, adapter, prompt_weight):
    """Each step takes all rollouts of a buffer, so that both runs average over the same ones."""
    shared = SHARED | {"objective": {"prompt_weight": prompt_weight}}
    whole = shared | {"adapter": adapter, "micro_batch_size": 16, "flags": {"prompts": 4, "accumulate": 1}}
    half = shared | {"adapter": adapter, "micro_batch_size": 8, "flags": {"prompts": 2, "accumulate": 1}}
    (one,) = run_ranks("cases.one_run", 1, tmp_path / "1", kind=kind, steps=6, **whole)
    two = run_ranks("cases.one_run", 2, tmp_path / "2", kind=kind, steps=6, **half)
    assert one["prompts"] == [first + second for first, second in zip(*(r["prompts"] for r in two), strict=True)]
    means = [(first + second) / 2 for first, second in zip(*(r["losses"] for r in two), strict=True)]
    assert means == pytest.approx(one["losses"], abs=1e-5)
    assert two[0]["weights"] == pytest.approx(one["weights"], abs=1e-3)
    for rank in two:
        assert rank["validation"].keys() == one["validation"].keys()
        assert rank["validation"]["val/sampled/reward"] == pytest.approx(one["validation"]["val/sampled/reward"])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "before", "after"), [("ddp", 1, 2), ("fsdp2", 2, 1)])
def test_another_number_of_ranks_goes_on_with_weights_and_optimizer(tmp_path, kind, before, after):
    case = {"kind": kind, "adapter": "lora"}
    saved = run_ranks("cases.from_checkpoint", before, tmp_path / "before", steps=3, **case)[0]
    checkpoint = str(tmp_path / "before" / "run" / "step=3.ckpt")
    resumed = run_ranks("cases.from_checkpoint", after, tmp_path / "after", steps=5, saved=checkpoint, **case)
    (said,) = [each for each in resumed[0]["said"] if "collected afresh; weights and optimizer continue" in each]
    assert f"'world_size': {before}" in said
    for rank in resumed:
        assert rank["start"]["weights"] == pytest.approx(saved["weights"], abs=1e-9)
        assert (rank["start"]["step"], rank["start"]["optimizer_steps"]) == (3, [3.0])
        assert rank["start"]["collected"] == saved["collected"] == 2
        assert rank["collected"] > 2  # afresh, though the second buffer was half used
        assert rank["steps"] == 5
        assert len(rank["losses"]) == 4


@pytest.mark.slow
def test_ranks_that_found_different_checkpoints_end_with_a_message(tmp_path):
    case = {"kind": "ddp", "adapter": "lora", "steps": 3}
    run_ranks("cases.from_checkpoint", 2, tmp_path / "before", **case)
    saved = str(tmp_path / "before" / "run" / "step=2.ckpt")
    ended = end_ranks("cases.from_checkpoint", 2, tmp_path / "after", saved=saved, rank=1, **case)
    assert ended.statuses == [1, 1]
    for rank in (0, 1):
        assert "start differently (rank 0 afresh, rank 1 from a checkpoint)" in ended.log(rank)


@pytest.mark.slow
def test_three_ranks_share_seven_prompts(tmp_path):
    """Batches of 2 on 3 ranks: 7 prompts are two batches, the second of which wraps around."""
    flags = {"count": 7, "accumulate": 2}
    ranks = run_ranks("cases.one_run", 3, tmp_path, kind="fsdp2", adapter="full", steps=4, flags=flags)
    batches = [tuple(sorted(prompt for rank in ranks for prompt in rank["prompts"][batch])) for batch in range(8)]
    first, second = batches[0], batches[4]
    assert batches == [first] * 4 + [second] * 4
    assert len(set(first)) == 6
    assert set(first) | set(second) == set(range(7))
    assert [rank["steps"] for rank in ranks] == [4, 4, 4]
    assert ranks[0]["weights"] == ranks[1]["weights"] == ranks[2]["weights"]
    assert ranks[0]["validation"] == ranks[1]["validation"] == ranks[2]["validation"]  # 5 prompts, batches of 2
