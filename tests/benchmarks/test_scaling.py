import pytest

from benchmarks import scaling

TINY = scaling.Work(
    vocab_size=64, prompt_length=4, completion_length=16, group_size=2, denoising_steps=2, micro_batch_size=1
)


def test_efficiency_is_one_for_twice_the_rate_on_twice_the_ranks_and_a_half_for_the_same_rate():
    assert scaling.efficiency(6.0, 2, 3.0) == 1
    assert scaling.efficiency(3.0, 2, 3.0) == 0.5


def test_a_rank_receives_all_of_a_gathered_tensor_but_its_own_part():
    assert [scaling.received_bytes(800, ranks) for ranks in (1, 2, 8)] == [0, 400, 700]


def test_lines_are_compared_with_the_single_process_of_the_same_adapter():
    setups = [
        scaling.Setup("single", "lora", gather=False, ranks=1),
        scaling.Setup("single", "full", gather=False, ranks=1),
        scaling.Setup("fsdp2", "full", gather=True, ranks=2),
    ]
    lines = scaling.summary(setups, [8.0, 5.0, 7.0], [{}, {}, {"gathers_per_buffer": 9}])
    assert [line["efficiency"] for line in lines] == [1, 1, 0.7]
    assert lines[2]["gathers_per_buffer"] == 9
    rows = scaling.table(lines[2:]).splitlines()
    assert [row.split()[-1] for row in rows] == ["gathers_per_buffer", "9"]


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_benchmark_with_what_it_printed():
    broken = [scaling.Setup("unknown", "full", gather=False, ranks=1)]
    with pytest.raises(RuntimeError, match="KeyError: 'unknown'"):
        scaling.measure(broken, TINY, repeats=1)


@pytest.mark.slow
def test_two_ranks_of_fsdp2_gather_the_weights_of_four_blocks_and_the_rest_and_a_line_says_so(tmp_path):
    """Once for sampling and scoring; then for each of 4 micro-batches, blocks in its backward pass too."""
    setup = scaling.Setup("fsdp2", "lora", gather=True, ranks=2)
    with scaling.started(setup, TINY, 2, tmp_path / "ranks", *scaling.free_ports(1)) as job:
        job.wait()
        job.run_buffer()
        job.run_buffer()
    assert job.gathers["gathers_per_buffer"] == 5 + 4 * (5 + 4)
    assert len(job.seconds) == 2
    setups = [scaling.Setup("single", "lora", gather=False, ranks=1), setup]
    lines = scaling.summary(setups, [1.0, 1.0], [job.gathers, job.gathers])
    keys = "strategy adapter gather ranks rollouts_per_second efficiency gathers_per_buffer bytes_received_per_buffer"
    assert [list(line) for line in lines] == [keys.split()] * 2
