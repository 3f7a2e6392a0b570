import json

from benchmarks import train_step


def test_json_is_one_line_with_a_ratio_for_each_phase(capsys):
    small = "--vocab_size 1000 --prompt_length 8 --completion_length 16 --group_size 2 --denoising_steps 4"
    train_step.main([*small.split(), "--block_length", "8", "--num_iterations", "1", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"sampling", "scoring", "training", "ratio", "plain_seconds", "our_seconds"}
    assert all(value > 0 for value in found.values())
