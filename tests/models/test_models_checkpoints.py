"""Checkpoints in the published layout: exact where whole, an error that names file and tensor where not."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmpo_lightning.models.llada import LLaDAForMaskedDiffusion
from dmpo_lightning.models.loading import load_model, load_tokenizer
from helpers import tiny_model
from published import LLADA
from small_models import tiny_bert

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


@pytest.mark.parametrize(
    "text",
    [
        '{"weight_map": {',
        "[]",
        '"model.safetensors"',
        "[" * 100_000,
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": ["model-00001-of-00006.safetensors"]}}',
        '{"weight_map": {"a": "../model-00001-of-00006.safetensors"}}',
        '{"weight_map": {"a": "/etc/model.safetensors"}}',
        '{"weight_map": {"a": "pytorch_model.bin"}}',
    ],
)
@pytest.mark.parametrize("build", [tiny_model, tiny_bert], ids=["native", "of transformers"])
def test_a_damaged_index_is_named(tmp_path, text, build):
    build().save_pretrained(tmp_path, max_shard_size="10KB")
    file = tmp_path / "model.safetensors.index.json"
    file.write_text(text)
    assert f"{str(file)!r} is damaged" in error(tmp_path)


@pytest.mark.parametrize("build", [tiny_model, tiny_bert], ids=["native", "of transformers"])
def test_a_single_file_beside_shards_is_another_model(tmp_path, build):
    """Transformers loads the single file, and others the shards."""
    build().save_pretrained(tmp_path, max_shard_size="10KB")
    build().save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "model.safetensors")
    message = error(tmp_path)
    assert "holds two models: model.safetensors, and an index" in message
    assert "Remove the one that is not wanted" in message


def test_an_index_may_name_the_single_file(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    names = dict.fromkeys(model.state_dict(), "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert torch.equal(load_model(str(tmp_path)).get_output_embeddings().weight, model.get_output_embeddings().weight)


def test_a_tensor_in_two_shards_is_named(folder):
    name = "model.transformer.ln_f.weight"
    file = next(file for file in sorted(folder.glob("*.safetensors")) if file != shard_of(folder, name))
    save_file(load_file(file) | {name: torch.ones(4096)}, file)
    assert f"tensor {name!r} is in " in error(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("shards", [None, "10KB"])
def test_a_folder_with_a_model_and_an_adapter_is_neither(tmp_path, name, shards):
    tiny_model().save_pretrained(tmp_path, max_shard_size=shards or "1GB")
    (tmp_path / name).write_text("{}")
    assert f"and an adapter ({name}), of which one alone would be loaded" in error(tmp_path)


def test_weights_in_another_format_beside_the_verified_ones_are_left_alone(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    save_file({"x": torch.ones(1)}, tmp_path / "model.fp16.safetensors")
    assert torch.equal(load_model(str(tmp_path)).get_output_embeddings().weight, model.get_output_embeddings().weight)


def test_a_model_of_transformers_that_lacks_a_tensor_is_not_completed_at_random(tmp_path):
    tiny_bert().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "layer.1" not in k}, file, metadata={"format": "pt"})
    assert re.search(r"lack the tensor 'bert\.encoder\.layer\.1\.\S+' and \d+ more", error(tmp_path))
    file.write_bytes(file.read_bytes()[:-5])
    assert f"Cannot load the weights in {str(tmp_path)!r}" in error(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "3", "[" * 100_000, '{"a":' * 100_000, "\xff", '{"model_type": "llada"'])
def test_a_damaged_configuration_is_named(tmp_path, text):
    file = tmp_path / "config.json"
    file.write_bytes(text.encode("latin1"))
    for options in ({}, {"random_weights": True}):
        message = error(tmp_path, **options)
        assert f"{str(file)!r} is damaged" in message
        assert len(message) < 400


@pytest.mark.parametrize(
    "stated",
    [
        {"model_type": ["llada"]},
        {"model_type": {}},
        {"d_model": "wide"},
        {"n_heads": [4]},
        {"rope_theta": "big"},
        {"layer_types": 3},
        {"rope_scaling": "linear"},
        {"n_layers": 2.5},
        {"n_layers": 0},
        {"rms_norm_eps": -1e-6},
        {"rms_norm_eps": "1e-6"},
        {"attribute_map": 3},
        {"n_kv_heads": -4},
        {"embedding_size": "x"},
        {"dtype": {"a": 1}},
        {"dtype": "float99"},
        {"id2label": 3},
    ],
)
def test_a_configuration_of_wrong_kinds_is_a_sentence(tmp_path, stated):
    tiny_model().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | stated))
    assert len(error(tmp_path)) < 500


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json"]
)
@pytest.mark.parametrize("text", ["[]", "{", "3", "[" * 100_000])
def test_a_damaged_file_of_a_tokenizer_is_named(tmp_path, name, text):
    load_tokenizer("sudoku_tiny").save_pretrained(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path / name))}' is damaged"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("stated", [{"eos_token": 3}, {"added_tokens_decoder": []}, {"chat_template": [{"name": "a"}]}])
def test_a_tokenizer_of_wrong_kinds_is_a_sentence(tmp_path, stated):
    load_tokenizer("sudoku_tiny").save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | stated))
    with pytest.raises(ValueError, match=re.escape(f"Cannot load a tokenizer from {str(tmp_path)!r}")) as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_a_checkpoint_of_a_run_is_no_model(tmp_path, kind, load):
    (tmp_path / "last.ckpt").write_bytes(b"")
    source = tmp_path / "last.ckpt" if kind == "file" else tmp_path
    with pytest.raises(ValueError, match=r"dmpo-lightning export` first, or pass(ed| it) as --ckpt_path"):
        load(str(source))


def test_an_unknown_id_offline_names_the_remedy_and_what_needs_none():
    message = error("GSAI-ML/LLaDA-8B-Instruct")
    assert "hf download GSAI-ML/LLaDA-8B-Instruct --local-dir DIR" in message
    assert "--model.model=DIR" in message
    assert "sudoku_tiny" in message
