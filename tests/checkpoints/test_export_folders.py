"""What a model or an adapter is written into may hold older ones: nothing of them is left that a loader would take."""

import json

import pytest
import torch
from dmpo_runs import loader, module, trainer
from safetensors.torch import load_file

from dmpo_lightning.callbacks.save_pretrained import SavePretrained
from dmpo_lightning.checkpoints.export import refuse_other_weights, save_policy
from dmpo_lightning.models.loading import load_model, load_tokenizer
from dmpo_lightning.models.lora import LoRA
from helpers import perturb, tiny_model
from small_models import tiny_bert


def write(network, folder):
    save_policy(network, load_tokenizer("sudoku_tiny"), network.state_dict(), folder)


def weights(folder) -> set[str]:
    return {file.name for file in folder.iterdir() if "token" not in file.name and file.suffix != ".jinja"}


@pytest.mark.parametrize("build", [tiny_model, tiny_bert], ids=["native", "of transformers"])
@pytest.mark.parametrize("shards", ["10KB", "1GB"])
def test_a_model_replaces_what_was_there(tmp_path, build, shards):
    """The base itself, from whose files the weights may still be read."""
    build(seed=3).save_pretrained(tmp_path, max_shard_size=shards)
    torch.save({}, tmp_path / "pytorch_model.bin")
    network = load_model(str(tmp_path))
    expected = {name: value.clone() for name, value in network.state_dict().items()}
    for _ in range(2):
        write(network, tmp_path)
        assert weights(tmp_path) == {"config.json", "model.safetensors"}
    loaded = load_model(str(tmp_path)).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


def test_shards_replace_a_single_file(tmp_path, monkeypatch):
    network = tiny_model(seed=3)
    write(network, tmp_path)
    whole = type(network).save_pretrained
    monkeypatch.setattr(type(network), "save_pretrained", lambda *a, **k: whole(*a, **k | {"max_shard_size": "10KB"}))
    write(network, tmp_path)
    assert "model.safetensors" not in weights(tmp_path)
    assert set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values()) < weights(
        tmp_path
    )
    assert torch.equal(load_model(str(tmp_path)).get_output_embeddings().weight, network.get_output_embeddings().weight)


def test_an_adapter_replaces_an_adapter(tmp_path):
    (tmp_path / "adapter_model.bin").write_bytes(b"old")
    for seed in (1, 2):
        network = LoRA(r=2).apply(load_model("sudoku_tiny"), "sudoku_tiny", seed=seed)
        perturb(network)
        write(network, tmp_path)
    assert weights(tmp_path) - {"README.md"} == {"adapter_config.json", "adapter_model.safetensors"}
    for name, value in load_model(str(tmp_path)).state_dict().items():
        assert torch.equal(value, network.state_dict()[name]), name


@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        ("model.safetensors", True),
        ("model-00001-of-00002.safetensors", True),
        ("pytorch_model.bin", True),
        ("adapter_config.json", False),
        ("adapter_model.safetensors", False),
        ("adapter_model.bin", False),
    ],
)
def test_an_adapter_is_not_written_beside_a_model_nor_the_reverse(tmp_path, name, adapter):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"holds other weights \({name}\); give an empty or a new folder"):
        refuse_other_weights(tmp_path, adapter=adapter)
    refuse_other_weights(tmp_path, adapter=not adapter)


def test_a_run_that_would_end_in_a_folder_of_another_kind_does_not_begin(tmp_path):
    write(LoRA(r=2).apply(load_model("sudoku_tiny"), "sudoku_tiny"), tmp_path / "out")
    before = load_file(tmp_path / "out" / "adapter_model.safetensors")
    dmpo = module()
    with pytest.raises(ValueError, match=r"holds other weights \(adapter_config\.json\)"):
        trainer(tmp_path, callbacks=[SavePretrained(str(tmp_path / "out"))]).fit(dmpo, loader())
    assert dmpo.trainer.global_step == 0
    assert before.keys() == load_file(tmp_path / "out" / "adapter_model.safetensors").keys()
