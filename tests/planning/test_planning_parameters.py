"""Parameters, counted without weights."""

import json

import pytest
from planning_runs import small_config
from transformers import AutoModelForMaskedLM

from dmpo_lightning.models.lora import LoRA
from dmpo_lightning.planning import count_parameters, read_architecture
from dmpo_lightning.planning.parameters import adapted_linears, describe


@pytest.fixture(scope="module")
def llada():
    return read_architecture("GSAI-ML/LLaDA-8B-Instruct")


def test_llada_8b_has_the_published_number_of_parameters(llada):
    assert llada.total == 8_015_581_184
    assert (llada.dtype, llada.width, llada.blocks, llada.max_length) == ("bfloat16", 4096, 32, 4096)


def test_its_published_id_is_described_without_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for source in ("GSAI-ML/LLaDA-8B-Base", "GSAI-ML/LLaDA-1.5"):
        assert read_architecture(source).total == 8_015_581_184


def test_parameters_by_module_type_add_up_and_tell_head_from_block(llada):
    assert llada.parameters["ff_out"] == 126464 * 4096
    assert llada.parameters["blocks.ff_out"] == 32 * 12288 * 4096
    assert llada.parameters["blocks.attn_norm"] == 32 * 4096
    assert sum(llada.parameters.values()) == llada.total


def test_dream_7b_is_described_without_network():
    dream = read_architecture("Dream-org/Dream-v0-Instruct-7B")
    qkv, out = 3584 * (3584 + 2 * 512) + 3584 + 2 * 512, 3584 * 3584
    block = qkv + out + 3 * 3584 * 18944 + 2 * 3584
    assert dream.total == 28 * block + 2 * 152064 * 3584 + 3584
    assert (dream.heads, dream.key_heads, dream.head_size) == (28, 4, 128)


@pytest.mark.parametrize(
    ("source", "total"),
    [
        ("JetLM/SDAR-1.7B-Chat", 2_031_739_904),
        ("JetLM/SDAR-4B-Chat", 4_411_424_256),
        ("Gen-Verse/TraDo-4B-Instruct", 4_411_424_256),
        ("JetLM/SDAR-8B-Chat", 8_190_735_360),
        ("Gen-Verse/TraDo-8B-Instruct", 8_190_735_360),
        ("OpenMOSS-Team/DiRL-8B-Instruct", 8_190_735_360),
        ("GSAI-ML/iLLaDA-8B-Instruct", 7_615_025_152),
    ],
)
def test_models_with_grouped_keys_are_described_without_network(source, total):
    model = read_architecture(source)
    assert (model.total, model.key_heads, model.head_size, model.dtype) == (total, 8, 128, "bfloat16")


def test_a_published_name_says_how_long_blocks_are():
    assert read_architecture("JetLM/SDAR-8B-Chat-b32").block_size == 32
    assert read_architecture("JetLM/SDAR-8B-Chat").block_size == 4


@pytest.mark.parametrize("model_type", ["llada2_moe", "sdar_moe"])
def test_a_model_of_the_hub_that_is_not_supported_is_refused_by_name(tmp_path, monkeypatch, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: str(tmp_path / "config.json"))
    with pytest.raises(ValueError, match=f"'some/model' is a '{model_type}', which is not supported"):
        read_architecture("some/model")


def test_lora_on_all_block_linears_counts_rank_times_in_and_out(llada):
    by_hand = 32 * 128 * (4 * (4096 + 4096) + 3 * (4096 + 12288))
    assert by_hand == 335_544_320
    parameters = count_parameters(llada, LoRA(r=128))
    assert parameters.trainable_count == by_hand
    assert parameters.total_count == 8_015_581_184 + by_hand
    assert parameters.trainable["blocks.ff_out (LoRA)"] == 32 * 128 * (4096 + 12288)


def test_lora_on_named_targets_counts_those(llada):
    parameters = count_parameters(llada, LoRA(r=8, targets=["q_proj", "v_proj"]))
    assert parameters.trainable_count == 32 * 2 * 8 * (4096 + 4096)


def test_lora_never_touches_the_head_unless_it_is_named(llada):
    assert all(linear.in_block for linear in adapted_linears(llada, LoRA(r=8)))
    assert len(adapted_linears(llada, LoRA(r=8))) == 7 * 32
    assert len(adapted_linears(llada, LoRA(r=8, targets=["ff_out"]))) == 32
    assert len(adapted_linears(llada, LoRA(r=8, targets=["ff_out", "model.transformer.ff_out"]))) == 33


@pytest.mark.parametrize("targets", [None, ["ff_out"], ["q_proj", "0.ff_out"], ["ff_out", "model.transformer.ff_out"]])
def test_as_many_weights_are_counted_as_lora_adds(targets):
    config, adapter = small_config("small"), LoRA(r=3, targets=targets)
    counted = count_parameters(describe(config, name="small", dtype="float32"), adapter).trainable_count
    adapted = adapter.apply(AutoModelForMaskedLM.from_config(config))
    assert counted == sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)


def test_a_target_that_matches_nothing_names_what_there_is(llada):
    with pytest.raises(ValueError, match=r"'o_proj' matches no linear layer.*attn_out.*q_proj"):
        count_parameters(llada, LoRA(r=8, targets=["o_proj"]))


def test_full_fine_tuning_trains_everything():
    architecture = describe(small_config("small"), name="small", dtype="float32")
    parameters = count_parameters(architecture, None)
    assert parameters.trainable == parameters.total == architecture.parameters


def test_a_folder_without_a_configuration_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"needs the model's config\.json"):
        read_architecture(str(tmp_path))


def test_a_folder_is_described_by_its_configuration(tmp_path):
    small_config("small", n_layers=1).save_pretrained(tmp_path)
    assert read_architecture(str(tmp_path)).blocks == 1
