"""Parameters, counted without weights."""

import pytest
import torch
from planning_runs import small_config
from transformers import AutoModelForMaskedLM

from dmpo_lightning.models.backbone import Backbone
from dmpo_lightning.models.lora import LoRA
from dmpo_lightning.planning.network import active, counted, without_weights


def model(source: str, **options):
    with torch.device("meta"):
        return without_weights(Backbone(source, **options)).build()


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("GSAI-ML/LLaDA-8B-Instruct", 8_015_581_184),
        ("GSAI-ML/LLaDA-1.5", 8_015_581_184),
        ("Dream-org/Dream-v0-Instruct-7B", 7_615_616_512),
        ("JetLM/SDAR-1.7B-Chat", 2_031_739_904),
        ("Gen-Verse/TraDo-4B-Instruct", 4_411_424_256),
        ("JetLM/SDAR-8B-Chat", 8_190_735_360),
        ("GSAI-ML/iLLaDA-8B-Instruct", 7_615_025_152),
        ("JetLM/SDAR-30B-A3B-Chat", 30_532_122_624),
        ("inclusionAI/LLaDA2.0-mini", 16_255_638_528),
        ("inclusionAI/LLaDA2.1-flash", 102_889_697_280),
    ],
)
def test_published_models_are_known_without_network(source, count, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    network = model(source)
    assert (*counted(network), network.dtype) == (count, count, torch.bfloat16)


def test_a_token_goes_through_eight_of_256_experts():
    """19 layers of 248 others with three matrices each, and the whole of a dense model."""
    network = model("inclusionAI/LLaDA2.0-mini", adapter=LoRA(r=8))
    assert counted(network)[0] - active(network) == 19 * 248 * 3 * 2048 * 512
    assert active(model("sudoku_tiny")) == counted(model("sudoku_tiny"))[0]
    with pytest.raises(ValueError, match="94% of LLaDA2ForMaskedDiffusion are stacked experts"):
        model("inclusionAI/LLaDA2.0-mini", adapter=LoRA(r=8), quantization="nf4")


def test_a_published_name_says_how_long_blocks_are():
    assert model("JetLM/SDAR-8B-Chat-b32").block_size == 32
    assert model("JetLM/SDAR-8B-Chat").block_size == 4


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match=r"`dtype` must be auto or the name of a torch dtype .* got 'int3'"):
        model("sudoku_tiny", dtype="int3")


def test_lora_on_all_linear_layers_counts_rank_times_in_and_out():
    total, trained = counted(model("GSAI-ML/LLaDA-8B-Instruct", adapter=LoRA(r=128)))
    by_hand = 32 * 128 * (4 * (4096 + 4096) + 3 * (4096 + 12288))
    assert trained == by_hand == 335_544_320
    assert total == 8_015_581_184 + by_hand


def test_four_bits_do_not_change_the_number_of_weights():
    plain, packed = (counted(model("sudoku_tiny", adapter=LoRA(r=8), quantization=each)) for each in (None, "nf4"))
    assert plain == packed


@pytest.mark.parametrize("targets", [None, ["q_proj", "0.ff_out"], ["ff_out", "model.transformer.ff_out"]])
def test_as_many_weights_are_counted_as_lora_adds(targets, tmp_path):
    config, adapter = small_config("small"), LoRA(r=3, targets=targets)
    config.save_pretrained(tmp_path)
    adapted = adapter.apply(AutoModelForMaskedLM.from_config(config))
    trained = counted(model(str(tmp_path), adapter=adapter))[1]
    assert trained == sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)


def test_a_target_that_matches_nothing_names_what_there_is():
    with pytest.raises(ValueError, match=r"'o_proj' matches no linear layer.*attn_out.*q_proj"):
        model("sudoku_tiny", adapter=LoRA(r=8, targets=["o_proj"]))


def test_a_folder_without_a_configuration_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"there is no config\.json"):
        model(str(tmp_path))
