from benchmarks import real_size


def test_a_recipe_runs_on_weights_in_the_published_sharding_and_continues(test_data, tmp_path, monkeypatch, capsys):
    """With two layers of width 64, whose memory is torch's own."""
    monkeypatch.setattr(real_size, "SHARD", 2e7)
    real_size.main(["--data", str(test_data / "gsm8k"), "--folder", str(tmp_path), "--tiny"])
    printed = dict(line.rsplit(maxsplit=2)[:2] for line in capsys.readouterr().out.splitlines())
    assert len(list((tmp_path / "tiny/llada").glob("model-*-of-00002.safetensors"))) == 2
    assert 0 < float(printed["peak while loading"]) <= float(printed["peak"])
    assert 0 < float(printed["start-up"]) < float(printed["one step"])
