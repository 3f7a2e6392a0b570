"""What holds for every native family: published names, sizes and configurations, exact files, layers, positions."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM
from transformers.core_model_loading import revert_weight_conversion

from dmpo_lightning.models.adapted import AdaptedForMaskedDiffusion
from dmpo_lightning.models.dream import DreamForMaskedDiffusion
from dmpo_lightning.models.families import FAMILIES
from dmpo_lightning.models.illada import ILLaDAForMaskedDiffusion
from dmpo_lightning.models.llada import LLaDAForMaskedDiffusion
from dmpo_lightning.models.llada2 import LLaDA2ForMaskedDiffusion
from dmpo_lightning.models.loading import load_model
from dmpo_lightning.models.lora import LoRA
from dmpo_lightning.models.parts import layers_of
from dmpo_lightning.models.sdar import SDARForMaskedDiffusion
from dmpo_lightning.models.sdar_moe import SDARMoeForMaskedDiffusion
from helpers import tiny_config, tiny_model
from published import ADAPTED, DREAM, ILLADA, LLADA, LLADA2, SDAR, SDAR_MOE
from small_models import (
    SMALL,
    SMALL_MIXTURE,
    random_ids,
    tiny_adapted,
    tiny_dream,
    tiny_illada,
    tiny_llada2,
    tiny_sdar,
    tiny_sdar_moe,
)

LLAMA_LINEARS = (*(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down")))
LLAMA_NORMS = ("input_layernorm", "post_attention_layernorm")
LLADA_LINEARS = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
SDAR_4B = {"hidden_size": 2560, "intermediate_size": 9728}
SDAR_1_7B = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16}
FUSED_LINEARS = ("attention.query_key_value", "attention.dense")
LLADA2_FLASH = {
    "hidden_size": 4096,
    "intermediate_size": 9216,
    "moe_intermediate_size": 1024,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


@dataclass(frozen=True)
class Published:
    """A family as it is published, and a small model of it."""

    model: Any
    config: dict[str, Any]
    small: dict[str, Any]
    """What the small model's configuration has in place of the published one."""
    tiny: Callable[..., Any]
    parameters: list[tuple[dict[str, Any], int, int]]
    """Changes of the configuration, and how many tensors and parameters that model has."""
    layer: str = "model.layers"
    linears: tuple[str, ...] = LLAMA_LINEARS
    others: tuple[str, ...] = LLAMA_NORMS
    """What else a layer has, beside the weights of its linear layers."""
    around: tuple[str, ...] = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    unstated: dict[str, Any] = field(default_factory=dict)
    """Defaults that the published configuration leaves out."""

    later_linears: tuple[str, ...] = ()
    """Of the layers behind the first one, where they are others."""
    router: tuple[str, ...] = ()
    """What a mixture of experts has beside these, in all layers or in those behind the first one."""

    def linear_names(self, layers: int) -> set[str]:
        """Of the linear layers that a token always goes through."""
        return {
            f"{self.layer}.{i}.{part}" for i in range(layers) for part in (i and self.later_linears) or self.linears
        }

    def names(self, config: Any) -> set[str]:
        """Of all tensors in files."""
        layers = config.num_hidden_layers
        others = {f"{self.layer}.{i}.{part}" for i in range(layers) for part in self.others}
        if self.router:
            experts = [f"experts.{e}.{p}_proj" for e in range(config.num_experts) for p in ("gate", "up", "down")]
            mixtures = range(1 if self.later_linears else 0, layers)
            others |= {f"{self.layer}.{i}.mlp.{part}" for i in mixtures for part in (*self.router, *experts)}
        names = self.linear_names(layers) | others
        return {name if name.endswith("bias") else f"{name}.weight" for name in names} | set(self.around)


PUBLISHED = {
    "llada": Published(
        model=LLaDAForMaskedDiffusion,
        config=LLADA,
        small=tiny_config().to_dict(),
        tiny=tiny_model,
        parameters=[({}, 291, 8_015_581_184)],
        layer="model.transformer.blocks",
        linears=LLADA_LINEARS,
        others=("attn_norm", "ff_norm"),
        around=tuple(f"model.transformer.{part}.weight" for part in ("wte", "ln_f", "ff_out")),
    ),
    "Dream": Published(
        model=DreamForMaskedDiffusion,
        config=DREAM,
        small=SMALL | {"mask_token_id": 5},
        tiny=tiny_dream,
        parameters=[({}, 339, 7_615_616_512)],
        others=(*LLAMA_NORMS, *(f"self_attn.{p}_proj.bias" for p in "qkv")),
    ),
    "illada": Published(
        model=ILLaDAForMaskedDiffusion,
        config=ILLADA,
        small=SMALL,
        tiny=tiny_illada,
        parameters=[({}, 290, 7_615_025_152)],
        around=("model.embed_tokens.weight", "model.norm.weight"),
        unstated={"mask_token_id": 5},
    ),
    "sdar": Published(
        model=SDARForMaskedDiffusion,
        config=SDAR,
        small=SMALL | {"head_dim": 12},
        tiny=tiny_sdar,
        parameters=[
            (SDAR_1_7B, 311, 2_031_739_904),
            (SDAR_1_7B | {"tie_word_embeddings": True}, 310, 1_720_574_976),
            (SDAR_4B, 399, 4_411_424_256),
            ({}, 399, 8_190_735_360),
        ],
        others=(*LLAMA_NORMS, "self_attn.q_norm", "self_attn.k_norm"),
    ),
    "sdar_moe": Published(
        model=SDARMoeForMaskedDiffusion,
        config=SDAR_MOE,
        small=SMALL | {"head_dim": 12, "moe_intermediate_size": 16, "num_experts": 6, "num_experts_per_tok": 2},
        tiny=tiny_sdar_moe,
        parameters=[({}, 18_867, 30_532_122_624)],
        linears=tuple(f"self_attn.{p}_proj" for p in "qkvo"),
        router=("gate",),
        others=(*LLAMA_NORMS, "self_attn.q_norm", "self_attn.k_norm"),
        unstated={"block_size": 4, "mask_token_id": 151669},
    ),
    "llada2_moe": Published(
        model=LLaDA2ForMaskedDiffusion,
        config=LLADA2,
        small=SMALL_MIXTURE | {"block_size": 4},
        tiny=tiny_llada2,
        parameters=[({}, 14_813, 16_255_638_528), (LLADA2_FLASH, 24_161, 102_889_697_280)],
        linears=(*FUSED_LINEARS, *(f"mlp.{p}_proj" for p in ("gate", "up", "down"))),
        later_linears=(*FUSED_LINEARS, *(f"mlp.shared_experts.{p}_proj" for p in ("gate", "up", "down"))),
        router=("gate", "gate.expert_bias"),
        others=(*LLAMA_NORMS, "attention.query_layernorm", "attention.key_layernorm"),
        around=("model.word_embeddings.weight", "model.norm.weight", "lm_head.weight"),
        unstated={"block_size": 32, "mask_token_id": 156895, "eos_token_id": 156892},
    ),
    "adapted_causal": Published(
        model=AdaptedForMaskedDiffusion,
        config=ADAPTED,
        small=SMALL | {"head_dim": 12, "block_size": 4},
        tiny=tiny_adapted,
        # Those of SmolLM2-135M, and the mask token's embedding.
        parameters=[({}, 272, 134_515_008 + 576)],
        around=("model.embed_tokens.weight", "model.norm.weight"),
    ),
}
family = pytest.mark.parametrize("family", PUBLISHED.values(), ids=PUBLISHED.keys())


def test_every_family_is_here():
    assert set(PUBLISHED) == set(FAMILIES)


@family
def test_the_published_sizes_have_the_published_tensors_and_parameters(family):
    for changes, tensors, parameters in family.parameters:
        with torch.device("meta"):
            model = family.model(family.model.config_class(**changes))
        stored = set(revert_weight_conversion(model, dict(model.named_parameters()) | dict(model.named_buffers())))
        around = set(family.around) - ({"lm_head.weight"} if changes.get("tie_word_embeddings") else set())
        assert stored == family.names(model.config) - set(family.around) | around
        assert (len(stored), sum(each.numel() for each in model.parameters())) == (tensors, parameters)


@family
def test_the_published_configuration_is_the_default(family, tmp_path):
    config_class = family.model.config_class
    (tmp_path / "config.json").write_text(json.dumps(family.config))
    loaded, default = AutoConfig.from_pretrained(tmp_path), config_class()
    assert type(loaded) is config_class
    stated = {name: family.config[name] for name in config_class.__dataclass_fields__ if name in family.config}
    for name, value in (stated | family.unstated).items():
        if name not in ("architectures", "transformers_version", "dtype"):
            assert getattr(loaded, name) == getattr(default, name) == value, name


@family
@pytest.mark.parametrize("load", [AutoModelForMaskedLM.from_pretrained, load_model])
def test_a_folder_in_shards_with_the_published_configuration_loads_exactly_without_remote_code(family, tmp_path, load):
    model = family.tiny().to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == family.names(model.config)
    (tmp_path / "config.json").write_text(json.dumps(family.config | family.small))
    loaded = load(str(tmp_path))
    assert (type(loaded), loaded.dtype) == (family.model, torch.bfloat16)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


@family
@pytest.mark.parametrize(
    "stated",
    [
        {"attn_implementation": "flex_attention", "micro_forward": True, "use_deepep": True, "ep_size": 8},
        {"attn_implementation": "flash_attention_2", "fuse_cross_entropy": False, "flash_attention": True},
        {"_attn_implementation": "eager", "attn_impl": "simple", "output_attentions": True, "debug": True},
        {"attn_implementation": {"": "flash_attention_3"}, "experts_implementation": "grouped_mm"},
        {"attn_implementation": "no/such-kernel", "gradient_checkpointing": True, "skip_checkpoint": True},
    ],
)
@pytest.mark.parametrize("load", [AutoModelForMaskedLM.from_pretrained, load_model])
def test_how_attention_is_computed_is_not_said_by_the_file(family, stated, load, tmp_path):
    model = family.tiny()
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | stated))
    loaded, ids = load(str(tmp_path)), random_ids(2, 9)
    assert loaded.config._attn_implementation == "sdpa"
    assert not loaded.is_gradient_checkpointing
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


@family
@pytest.mark.parametrize("load", [AutoModelForMaskedLM.from_pretrained, load_model])
@pytest.mark.parametrize("name", ["num_attention_heads", "rope_theta", "rms_norm_eps"])
def test_what_no_tensor_shows_must_be_in_the_folder(family, load, name, tmp_path):
    """The published classes have other defaults for it than the published models."""
    family.tiny().save_pretrained(tmp_path)
    name = family.model.config_class.attribute_map.get(name, name)
    # Where the base of rotary positions is, transformers writes it twice.
    gone = {name, "rope_parameters"}
    for stated in ({}, {name: None}):
        config = {key: value for key, value in (family.config | family.small).items() if key not in gone} | stated
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=rf"config\.json of \w+ must state {name}, which its tensors do not show"):
            load(str(tmp_path))


@family
@pytest.mark.parametrize("name", ["num_key_value_heads", "head_dim", "intermediate_size", "tie_word_embeddings"])
def test_what_tensors_show_may_be_left_out_and_is_never_taken_for_something_else(family, name, tmp_path):
    model = family.tiny()
    model.save_pretrained(tmp_path)
    name = family.model.config_class.attribute_map.get(name, name)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({key: value for key, value in saved.items() if key != name}))
    ids = random_ids(2, 9)
    try:
        loaded = load_model(str(tmp_path))
    except ValueError as error:
        assert re.search(f"must have shape|`{name}` and divide", str(error))  # noqa: PT017
    else:
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def test_a_published_copy_without_block_size_and_mask_has_those_of_the_family(tmp_path):
    config = {name: value for name, value in SDAR.items() if name not in ("block_size", "mask_token_id")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert (loaded.block_size, loaded.mask_token_id) == (4, 151669)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_is_tied_where_the_configuration_says_so(tmp_path, tied):
    model = tiny_sdar(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


@family
@torch.no_grad()
def test_logits_asked_for_at_positions_are_those_of_the_whole(family):
    """In the shape [rows k] the last layer computes these queries alone."""
    model, ids = family.tiny().eval(), random_ids(2, 10)
    for padding in (0, 3):
        attended = torch.arange(10).expand(2, -1) >= torch.tensor([0, padding])[:, None]
        positions = torch.tensor([[4, 9, 7], [15, 19, 16]])
        whole = model(ids, attended).logits.flatten(0, 1)
        for asked in (positions, positions.flatten(), positions[:0]):
            torch.testing.assert_close(model(ids, attended, positions=asked), whole[asked], atol=1e-5, rtol=1e-5)


@family
def test_lora_adapts_the_linears_of_each_layer(family):
    model = family.tiny()
    assert len(layers_of(model)) == 2
    names = family.linear_names(2)
    assert set(LoRA(r=2).target_names(model)) == names
    adapted = LoRA(r=2).apply(model)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained == {f"base_model.model.{name}.lora_{part}.default.weight" for name in names for part in "AB"}


@family
@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 5},
        {"use_sliding_window": True},
        {"use_mrope": True},
        {"quantization_config": {"quant_method": "gptq"}},
    ],
)
def test_what_is_not_built_is_an_error_that_names_it(family, change):
    (name,) = change
    expected = family.model.config_class.attribute_map.get(name, name)
    with pytest.raises(ValueError, match=expected):
        family.model.config_class(**change)
    with pytest.raises(ValueError, match="scaled rotary positions is not supported"):
        family.model.config_class(rope_scaling={"rope_type": "yarn", "factor": 4.0})
    with pytest.raises(ValueError, match="scaled rotary positions is not supported"):
        family.model.config_class(rope_scaling=[4.0])
