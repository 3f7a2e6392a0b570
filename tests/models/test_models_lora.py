"""Which layers LoRA adapts, how many weights that trains, and adapter files of other people."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from dmpo_lightning.checkpoints.export import save_policy
from dmpo_lightning.models.backbone import Backbone
from dmpo_lightning.models.dream import DreamConfig, DreamForMaskedDiffusion
from dmpo_lightning.models.llada import LLaDAConfig, LLaDAForMaskedDiffusion
from dmpo_lightning.models.loading import load_model, load_tokenizer
from dmpo_lightning.models.lora import LoRA
from dmpo_lightning.models.parts import enable_checkpointing
from dmpo_lightning.policy import evaluating
from helpers import perturb, prompt_batch, tiny_model, tiny_policy
from small_models import tiny_dream

LLADA_LINEARS = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
DREAM_LINEARS = (
    *(f"self_attn.{part}_proj" for part in "qkvo"),
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
)
D1_TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj", "gate_proj", "o_proj"]
"""FACTS.md 1: Llama's names, of which LLaDA has the first four."""


def llada_blocks(layers: int, parts=LLADA_LINEARS) -> set[str]:
    return {f"model.transformer.blocks.{i}.{part}" for i in range(layers) for part in parts}


def dream_blocks(layers: int) -> set[str]:
    return {f"model.layers.{i}.{part}" for i in range(layers) for part in DREAM_LINEARS}


def adapted_modules(model: torch.nn.Module) -> set[str]:
    """Full names, in the base model, of the modules that carry a trainable pair of matrices."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(name.endswith((".lora_A.default.weight", ".lora_B.default.weight")) for name in names)
    return {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in names}


def trainable(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


# Which layers, how many weights ---------------------------------------------------------------------------------------


def test_trainable_parameters_of_small_models_are_those_worked_out_by_hand():
    # LLaDA: 4 maps 32 -> 32, 2 maps 32 -> 48 and one back, 2 blocks: rank * 2 * (4 * 64 + 3 * 80) = rank * 992
    assert trainable(LoRA(r=3).apply(tiny_model())) == 2976
    # Dream: k and v map 32 -> 16, so rank * 2 * (2 * 64 + 2 * 48 + 3 * 80) = rank * 928
    assert trainable(LoRA(r=3).apply(tiny_dream())) == 2784


def test_trainable_parameters_of_the_published_sizes_are_those_worked_out_by_hand():
    with torch.device("meta"):
        llada = LoRA(r=128).apply(LLaDAForMaskedDiffusion(LLaDAConfig()))
        dream = LoRA(r=128).apply(DreamForMaskedDiffusion(DreamConfig()))
    assert trainable(llada) == 128 * 32 * (4 * (4096 + 4096) + 3 * (4096 + 12288)) == 335_544_320
    assert adapted_modules(llada) == llada_blocks(32)
    assert trainable(dream) == 128 * 28 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18944)) == 322_961_408
    assert adapted_modules(dream) == dream_blocks(28)


def test_fresh_adapters_change_nothing():
    model = tiny_model().eval()
    ids = torch.tensor([[3, 9, 14, 5]])
    before = model(ids).logits
    assert torch.equal(LoRA(r=3).apply(model).eval()(ids).logits, before)


def test_named_targets_are_the_last_parts_of_names():
    assert adapted_modules(LoRA(r=3, targets=["q_proj", "0.up_proj"]).apply(tiny_model())) == (
        llada_blocks(2, ["q_proj"]) | {"model.transformer.blocks.0.up_proj"}
    )


@pytest.mark.parametrize("layers", [2, 24])
def test_the_bare_name_ff_out_is_that_of_the_blocks_and_not_of_the_head(layers):
    adapted = LoRA(r=3, targets=["ff_out"]).apply(tiny_model(n_layers=layers))
    assert adapted_modules(adapted) == llada_blocks(layers, ["ff_out"])


def test_all_seven_names_as_targets_are_the_default():
    assert adapted_modules(LoRA(r=3, targets=list(LLADA_LINEARS)).apply(tiny_model())) == llada_blocks(2)


def test_the_head_is_adapted_where_its_full_name_asks_for_it():
    adapted = LoRA(r=3, targets=["q_proj", "model.transformer.ff_out"]).apply(tiny_model())
    assert adapted_modules(adapted) == llada_blocks(2, ["q_proj"]) | {"model.transformer.ff_out"}


@pytest.mark.parametrize("target", ["o_proj", "proj", "lm_head", "wte", "ff_norm", ""])
def test_a_target_that_matches_no_linear_layer_is_an_error_that_names_those_there_are(target):
    with pytest.raises(ValueError, match=f"LoRA target '{target}' matches no linear layer") as caught:
        LoRA(r=3, targets=["q_proj", target]).apply(tiny_model())
    assert all(name in str(caught.value) for name in LLADA_LINEARS)


@pytest.mark.parametrize("settings", [{"r": 0}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_settings_out_of_range_are_errors(settings):
    with pytest.raises(ValueError, match=f"`{next(iter(settings))}` must be"):
        LoRA(**settings)


def test_an_empty_list_of_targets_is_an_error():
    with pytest.raises(ValueError, match="`targets` must name at least one"):
        LoRA(targets=[])


def test_fresh_adapters_depend_on_the_seed_alone():
    def drawn(seed: int) -> torch.Tensor:
        adapted = Backbone(tiny_model(), tokenizer="sudoku_tiny", adapter=LoRA(r=3)).build(seed=seed)
        return torch.cat([p.flatten() for name, p in adapted.named_parameters() if ".lora_A." in name])

    torch.manual_seed(1)
    first, state = drawn(3), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(drawn(3), first)
    assert not torch.equal(drawn(4), first)


# Training -------------------------------------------------------------------------------------------------------------


def scores(policy) -> torch.Tensor:
    prompts = prompt_batch(policy, ["12", "1234"])
    completions = torch.tensor([[6, 7, 8, 9], [10, 11, 12, 13]])
    masks = torch.tensor([[[True, True, False, True]], [[True, False, True, True]]])
    return policy.completion_log_probs(prompts.prompt_ids, prompts.prompt_mask, completions, masks)


@pytest.mark.parametrize("build", [tiny_model, tiny_dream])
def test_dropout_is_off_while_scoring_and_on_in_training(build):
    policy = tiny_policy(model=LoRA(r=3, dropout=0.5).apply(build()))
    perturb(policy)
    policy.train()
    with evaluating(policy):
        assert torch.equal(scores(policy), scores(policy))
    assert not torch.equal(scores(policy), scores(policy))


@pytest.mark.parametrize("build", [tiny_model, tiny_dream])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradient_checkpointing_gives_the_same_gradients(build, dropout):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        adapter = LoRA(r=3, dropout=dropout)
        network = Backbone(
            build(), tokenizer="sudoku_tiny", adapter=adapter, gradient_checkpointing=checkpointing
        ).build()
        perturb(network)
        policy = tiny_policy(model=network.train())
        torch.manual_seed(1)
        scores(policy).sum().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.requires_grad})
    plain, checkpointed = gradients
    assert all(gradient.abs().sum() > 0 for gradient in plain.values())
    torch.testing.assert_close(checkpointed, plain, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("build", [tiny_model, tiny_dream])
def test_checkpointing_recomputes_every_block_once_under_lora(build):
    policy = tiny_policy(model=LoRA(r=3).apply(build()))
    enable_checkpointing(policy.model)
    blocks = [m for m in policy.model.modules() if type(m).__name__ in ("LLaDALayer", "QwenLayer")]
    calls = []
    norms = [next(iter(block.children())) for block in blocks]
    for module in norms:
        module.register_forward_pre_hook(lambda module, inputs: calls.append(module))
    policy.train()
    scores(policy).sum().backward()
    assert [calls.count(module) for module in norms] == [2, 2]


def test_a_model_that_carries_an_adapter_takes_no_second_one():
    with pytest.raises(ValueError, match="already carries an adapter"):
        Backbone(LoRA(r=3).apply(tiny_model()), tokenizer="sudoku_tiny", adapter=LoRA(r=3)).build()


# Adapter folders ------------------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "base"
    tiny_model().save_pretrained(folder)
    return str(folder)


def test_an_adapter_of_ours_loads_without_a_warning_trainable_and_exact(base, tmp_path):
    adapted = LoRA(r=3).apply(load_model(base), base)
    perturb(adapted)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*without adapters.*")
        loaded = load_model(str(tmp_path / "adapter"))
    assert adapted_modules(loaded) == llada_blocks(2)
    for name, value in adapted.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_an_adapter_names_the_revision_of_its_base_and_loads_on_it(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    cached, models = tmp_path / "hub" / "models--nobody--base", {}
    for revision, commit in {"main": "a" * 40, "v2": "b" * 40}.items():
        models[revision] = tiny_model()
        perturb(models[revision], seed=len(models))
        models[revision].save_pretrained(cached / "snapshots" / commit)
        (cached / "refs").mkdir(exist_ok=True)
        (cached / "refs" / revision).write_text(commit)
    adapted = Backbone("nobody/base", revision="v2", tokenizer="sudoku_tiny", adapter=LoRA(r=2)).build()
    save_policy(adapted, load_tokenizer("sudoku_tiny"), adapted.state_dict(), tmp_path / "adapter")
    loaded, ids = load_model(str(tmp_path / "adapter")), torch.tensor([[3, 9, 14, 5]])
    # A fresh adapter changes nothing.
    torch.testing.assert_close(loaded.eval()(ids).logits, models["v2"].eval()(ids).logits, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(loaded(ids).logits, models["main"].eval()(ids).logits, atol=1e-2)


@pytest.fixture
def d1_adapter(base, tmp_path):
    """As d1 and DMPO save it: by PEFT itself, Llama's names, a causal task."""
    config = LoraConfig(r=3, lora_alpha=6, lora_dropout=0.05, target_modules=D1_TARGETS)
    adapted = get_peft_model(tiny_model(), config)
    adapted.peft_config["default"].base_model_name_or_path = base
    perturb(adapted)
    folder = tmp_path / "d1"
    adapted.save_pretrained(str(folder))
    saved = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(saved | {"task_type": "CAUSAL_LM"}))
    return folder, adapted


def test_an_adapter_of_d1_loads_with_a_warning_that_says_what_it_lacks(d1_adapter):
    folder, original = d1_adapter
    assert sorted(json.loads((folder / "adapter_config.json").read_text())["target_modules"]) == sorted(D1_TARGETS)
    assert {name.split(".")[-3] for name in load_file(folder / "adapter_model.safetensors")} == set(D1_TARGETS[:4])
    with pytest.warns(UserWarning, match="without adapters: attn_out, ff_out, ff_proj"):
        loaded = load_model(str(folder))
    assert adapted_modules(loaded) == llada_blocks(2, D1_TARGETS[:4])
    for name, value in original.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_an_adapter_of_d1_scores_and_trains_like_any_other(d1_adapter):
    folder, original = d1_adapter
    with pytest.warns(UserWarning, match="without adapters"):
        policy = tiny_policy(model=load_model(str(folder)))
    with evaluating(policy):
        found = scores(policy)
    original_policy = tiny_policy(model=original)
    with evaluating(original_policy):
        torch.testing.assert_close(found, scores(original_policy), atol=1e-6, rtol=1e-6)
    scores(policy).sum().backward()
    assert all(p.grad is not None for p in policy.parameters() if p.requires_grad)


def test_what_we_save_of_an_adapter_of_d1_plain_peft_loads(d1_adapter, base, tmp_path):
    folder, original = d1_adapter
    with pytest.warns(UserWarning, match="without adapters"):
        load_model(str(folder)).save_pretrained(str(tmp_path / "again"))
    again = PeftModel.from_pretrained(load_model(base), str(tmp_path / "again")).eval()
    ids = torch.tensor([[3, 9, 14, 5]])
    torch.testing.assert_close(again(ids).logits, original.eval()(ids).logits, atol=1e-6, rtol=1e-6)


def test_an_adapter_whose_base_is_not_to_be_had_names_the_base(d1_adapter):
    folder, _ = d1_adapter
    saved = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(saved | {"base_model_name_or_path": "nobody/base"}))
    with pytest.raises(ValueError, match="hf download nobody/base"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, name: tensors.pop(name), "is missing"),
        (lambda tensors, name: tensors.update({"odd": torch.ones(1)}), "unexpected tensor 'odd'"),
        (lambda tensors, name: tensors.update({name: torch.ones(2, 2)}), r"must have shape \(3, 32\), got \(2, 2\)"),
    ],
)
def test_an_adapter_is_checked_like_a_model(base, tmp_path, change, message):
    folder = tmp_path / "adapter"
    LoRA(r=3).apply(load_model(base), base).save_pretrained(str(folder))
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors, next(name for name in tensors if "lora_A" in name and "q_proj" in name))
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=rf"adapter_model\.safetensors'.*{message}"):
        load_model(str(folder))


def test_an_adapter_whose_file_is_cut_or_gone_names_it(base, tmp_path):
    LoRA(r=3).apply(load_model(base), base).save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors' is truncated or damaged"):
        load_model(str(tmp_path))
    file.rename(tmp_path / "adapter_model-00001-of-00001.safetensors")
    # Transformers has an index for models. PEFT has none for adapters.
    names = {"weight_map": {"a": "adapter_model-00001-of-00001.safetensors"}}
    (tmp_path / "adapter_model.safetensors.index.json").write_text(json.dumps(names))
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors' is missing"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"peft_type": "MAGIC"}, "must be of the `peft_type` 'LORA', got 'MAGIC'"),
        ({"peft_type": "IA3"}, "must be of the `peft_type` 'LORA', got 'IA3'"),
        ({"peft_type": None}, "must be of the `peft_type` 'LORA', got None"),
        ({"peft_type": ["LORA"]}, "must be of the `peft_type` 'LORA', got "),
        ({"r": "four"}, "does not fit LLaDAForMaskedDiffusion"),
        ({"r": 0}, "does not fit LLaDAForMaskedDiffusion"),
        ({"r": 5}, r"must have shape \(5, 32\), got \(3, 32\)"),
        ({"target_modules": ["o_proj"]}, "does not fit LLaDAForMaskedDiffusion"),
        ({"target_modules": 3}, "does not fit LLaDAForMaskedDiffusion"),
        ({"target_modules": ["q_proj"]}, "unexpected tensor"),
        ({"modules_to_save": ["ln_f"]}, r"tensor 'base_model\.model\.model\.transformer\.ln_f\.weight' is missing"),
        ({"use_dora": True}, "lora_magnitude_vector.* is missing"),
    ],
)
def test_an_adapter_that_does_not_say_what_it_is_is_an_error(base, tmp_path, stated, message):
    LoRA(r=3).apply(load_model(base), base).save_pretrained(str(tmp_path / "adapter"))
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | stated))
    with pytest.raises(ValueError, match=message) as caught:
        load_model(str(tmp_path / "adapter"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [{"modules_to_save": ["ln_f", "wte"]}, {"use_dora": True}, {"target_modules": ["q_proj", "wte"]}, {"bias": "none"}],
)
def test_whatever_an_adapter_has_trained_is_saved_under_the_names_of_peft(base, tmp_path, options):
    config = LoraConfig(**{"r": 3, "target_modules": ["q_proj", "v_proj"]} | options)
    adapted = get_peft_model(load_model(base), config)
    adapted.peft_config["default"].base_model_name_or_path = base
    perturb(adapted)
    save_policy(adapted, load_tokenizer("sudoku_tiny"), adapted.state_dict(), tmp_path / "ours")
    adapted.save_pretrained(str(tmp_path / "peft"))
    ours, theirs = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("ours", "peft"))
    assert ours.keys() == theirs.keys()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = load_model(str(tmp_path / "ours"))
    ids = torch.tensor([[3, 9, 14, 5]])
    torch.testing.assert_close(loaded.eval()(ids).logits, adapted.eval()(ids).logits, atol=1e-6, rtol=1e-6)
