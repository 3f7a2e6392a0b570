"""Checkpoints in the published layout: exact where whole, an error that names file and tensor where not."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmpo_lightning.models.llada import LLaDAForMaskedDiffusion
from dmpo_lightning.models.loading import load_model
from helpers import tiny_model
from published import LLADA

SMALL_LLADA = LLADA | {
    "d_model": 32,
    "embedding_size": 32,
    "eos_token_id": 0,
    "mask_token_id": 5,
    "max_sequence_length": 64,
    "mlp_hidden_size": 48,
    "n_heads": 4,
    "n_kv_heads": 4,
    "n_layers": 2,
    "pad_token_id": 0,
    "vocab_size": 32,
}
DOWN = "model.transformer.blocks.1.ff_out.weight"


def weights() -> dict[str, torch.Tensor]:
    return tiny_model(rope_theta=500000.0).to(torch.bfloat16).state_dict()


@pytest.fixture
def folder(tmp_path):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size=8200)
    (tmp_path / "config.json").write_text(json.dumps(SMALL_LLADA))
    return tmp_path


def index(folder) -> dict:
    return json.loads((folder / "model.safetensors.index.json").read_text())


def shard_of(folder, tensor: str):
    return folder / index(folder)["weight_map"][tensor]


def rewrite(folder, tensor: str, value: torch.Tensor | None, *, name: str | None = None) -> str:
    """Replaces, removes or adds a tensor in the shard of ``tensor``, as a broken tool would; returns the file."""
    file = shard_of(folder, tensor)
    tensors = load_file(file)
    if value is None:
        del tensors[tensor]
    else:
        tensors[name or tensor] = value
    save_file(tensors, file, metadata={"format": "pt"})
    return file.name


def error(folder, **options) -> str:
    with pytest.raises(ValueError, match=re.escape(str(folder))) as caught:
        load_model(str(folder), **options)
    return str(caught.value)


def test_the_published_layout_has_six_shards_and_an_index(folder):
    assert sorted(file.name for file in folder.glob("*.safetensors")) == [
        f"model-{i:05d}-of-00006.safetensors" for i in range(1, 7)
    ]
    assert set(index(folder)["weight_map"]) == set(weights())


def test_it_loads_bit_exactly_and_auto_keeps_its_dtype(folder):
    loaded = load_model(str(folder))
    assert type(loaded) is LLaDAForMaskedDiffusion
    assert set(loaded.state_dict()) == set(weights())
    for name, value in weights().items():
        assert loaded.state_dict()[name].dtype == torch.bfloat16
        assert torch.equal(loaded.state_dict()[name], value), name
    assert loaded.config.rope_theta == 500000.0


def test_another_dtype_is_cast_to(folder):
    loaded = load_model(str(folder), dtype="float32")
    for name, value in weights().items():
        assert torch.equal(loaded.state_dict()[name], value.float()), name


def test_an_unknown_dtype_is_an_error(folder):
    with pytest.raises(ValueError, match="`dtype` must be auto or the name of a torch dtype"):
        load_model(str(folder), dtype="bf17")


@pytest.mark.parametrize("listed", [True, False], ids=["listed in the index", "not listed"])
def test_a_missing_tensor_is_named(folder, listed):
    file = rewrite(folder, DOWN, None)
    if not listed:
        written = index(folder)
        del written["weight_map"][DOWN]
        (folder / "model.safetensors.index.json").write_text(json.dumps(written))
        file = "model.safetensors.index.json"
    message = error(folder)
    assert DOWN in message
    assert str(folder / file) in message


def test_an_unexpected_tensor_is_named_with_its_file(folder):
    odd = "model.transformer.blocks.1.k_norm.weight"
    file = rewrite(folder, DOWN, torch.ones(3), name=odd)
    message = error(folder)
    assert odd in message
    assert file in message


def test_a_misshapen_tensor_is_named_with_its_file_and_both_shapes(folder):
    file = rewrite(folder, DOWN, torch.ones(32, 47, dtype=torch.bfloat16))
    message = error(folder)
    assert DOWN in message
    assert file in message
    assert "(32, 48), got (32, 47)" in message


def test_a_missing_shard_is_named(folder):
    file = shard_of(folder, DOWN)
    file.unlink()
    message = error(folder)
    assert file.name in message
    assert "missing" in message


@pytest.mark.parametrize("cut", [-1, 40, 0], ids=["last byte", "in the header", "empty"])
def test_a_truncated_shard_is_named(folder, cut):
    file = shard_of(folder, DOWN)
    file.write_bytes(file.read_bytes()[:cut])
    message = error(folder)
    assert file.name in message
    assert "truncated or damaged" in message


def test_a_folder_without_weights_names_the_file_it_lacks(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL_LLADA))
    message = error(tmp_path)
    assert str(tmp_path / "model.safetensors") in message
    assert "missing" in message


def test_a_folder_without_anything_says_that_it_has_no_configuration(tmp_path):
    message = error(tmp_path)
    assert str(tmp_path) in message
    assert "config.json" in message


def test_a_damaged_index_is_named(folder):
    file = folder / "model.safetensors.index.json"
    file.write_text(file.read_text()[:50])
    assert str(file) in error(folder)


def test_an_unknown_id_offline_names_the_remedy_and_what_needs_none():
    message = error("GSAI-ML/LLaDA-8B-Instruct")
    assert "hf download GSAI-ML/LLaDA-8B-Instruct --local-dir DIR" in message
    assert "--model.model=DIR" in message
    assert "sudoku_tiny" in message
