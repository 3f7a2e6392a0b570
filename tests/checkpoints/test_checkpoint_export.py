"""What a checkpoint becomes outside: the same logits through plain PEFT, transformers and our loader."""

import json
import subprocess
import sys
from functools import partial

import huggingface_hub
import pytest
import torch
from dmpo_runs import digit_share, loader, small_dmpo, trainer
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForMaskedLM, AutoTokenizer

from dmpo_lightning import DMPO, WDCE, ConfidenceSampler, LoRA, PromptLoader
from dmpo_lightning.__main__ import main
from dmpo_lightning.checkpoints.export import export_checkpoint
from dmpo_lightning.models.loading import load_model, load_tokenizer
from helpers import tiny_model
from small_models import bert_tokenizer, tiny_bert, tiny_illada, tiny_sdar

IDS = torch.tensor([[1, 9, 14, 5, 5, 22], [3, 5, 5, 12, 6, 7]])
BASE_TENSORS = len(load_model("sudoku_tiny").state_dict())


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def run_of(model, tmp_path, *, data=None, steps=2, **options) -> tuple[DMPO, str]:
    """A few optimizer steps, two of which use up a buffer, and their checkpoint."""
    dmpo = small_dmpo(model, **{"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=2e-3), **options})
    run = trainer(tmp_path, max_steps=steps)
    run.fit(dmpo, data or loader())
    checkpoint = str(tmp_path / "run.ckpt")
    run.save_checkpoint(checkpoint)
    return dmpo, checkpoint


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(IDS).logits


def assert_same(model, dmpo: DMPO) -> None:
    """To 1e-5 of the largest logit, which is about 10: merging rounds once more in float32."""
    expected = logits(dmpo.policy.model)
    torch.testing.assert_close(logits(model), expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


def assert_trained(dmpo: DMPO) -> None:
    """Two steps that changed nothing would make every comparison below empty."""
    assert (logits(dmpo.policy.model) - logits(load_model("sudoku_tiny"))).abs().max() > 1e-3


def tensors_in(folder) -> list[str]:
    names = []
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            names += list(tensors.keys())
    return names


LORA = {"adapter": LoRA(r=2, alpha=4, dropout=0.1)}


# Adapter --------------------------------------------------------------------------------------------------------------


def test_plain_peft_loads_the_exported_adapter(tmp_path):
    dmpo, checkpoint = run_of("sudoku_tiny", tmp_path, **LORA)
    assert_trained(dmpo)
    written = export_checkpoint(checkpoint, tmp_path / "out")
    linears = (BASE_TENSORS - 3) // 9 * 7
    assert written == len(tensors_in(tmp_path / "out")) == 2 * linears
    assert not any("base_layer" in name for name in tensors_in(tmp_path / "out"))
    assert_same(PeftModel.from_pretrained(load_model("sudoku_tiny"), str(tmp_path / "out")), dmpo)


def test_our_loader_takes_the_exported_adapter_without_being_told_its_base(tmp_path):
    dmpo, checkpoint = run_of("sudoku_tiny", tmp_path, **LORA)
    export_checkpoint(checkpoint, tmp_path / "out")
    assert_same(load_model(str(tmp_path / "out")), dmpo)
    words = load_tokenizer(str(tmp_path / "out"))
    assert words.get_vocab() == dmpo.policy.tokenizer.get_vocab()
    assert words.chat_template == dmpo.policy.tokenizer.chat_template


def test_a_refreshed_reference_is_left_out_of_the_export(tmp_path):
    dmpo, checkpoint = run_of("sudoku_tiny", tmp_path, **LORA, reference_refresh_interval=1, steps=3)
    assert "reference" in dmpo.policy.model.peft_config
    written = export_checkpoint(checkpoint, tmp_path / "out")
    assert written == len(tensors_in(tmp_path / "out"))
    assert not (tmp_path / "out" / "reference").exists()
    assert_same(load_model(str(tmp_path / "out")), dmpo)


def test_the_exported_adapter_is_where_the_next_run_starts_and_that_can_be_exported_again(tmp_path):
    first, checkpoint = run_of("sudoku_tiny", tmp_path, **LORA)
    export_checkpoint(checkpoint, tmp_path / "one")
    (tmp_path / "second").mkdir()
    second, checkpoint = run_of(str(tmp_path / "one"), tmp_path / "second")
    assert (logits(second.policy.model) - logits(first.policy.model)).abs().max() > 1e-3
    export_checkpoint(checkpoint, tmp_path / "two")
    assert_same(PeftModel.from_pretrained(load_model("sudoku_tiny"), str(tmp_path / "two")), second)
    export_checkpoint(checkpoint, tmp_path / "merged", merge=True)
    assert_same(load_model(str(tmp_path / "merged")), second)


# Merged, and whole models ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [load_model, AutoModelForMaskedLM.from_pretrained])
def test_a_merged_folder_is_a_plain_model(tmp_path, load):
    dmpo, checkpoint = run_of("sudoku_tiny", tmp_path, **LORA)
    assert_trained(dmpo)
    export_checkpoint(checkpoint, tmp_path / "out", merge=True)
    assert sorted(tensors_in(tmp_path / "out")) == sorted(load_model("sudoku_tiny").state_dict())
    loaded = load(str(tmp_path / "out"))
    assert not hasattr(loaded, "peft_config")
    assert_same(loaded, dmpo)


@pytest.mark.parametrize("load", [load_model, AutoModelForMaskedLM.from_pretrained])
def test_a_fully_trained_model_is_exported_bit_by_bit(tmp_path, load):
    dmpo, checkpoint = run_of("sudoku_tiny", tmp_path)
    assert_trained(dmpo)
    assert export_checkpoint(checkpoint, tmp_path / "out") == BASE_TENSORS == len(tensors_in(tmp_path / "out"))
    loaded = load(str(tmp_path / "out")).state_dict()
    for name, value in dmpo.policy.model.state_dict().items():
        assert torch.equal(loaded[name], value), name


@pytest.mark.parametrize("options", [{}, LORA], ids=["fully trained", "merged"])
def test_a_folder_carries_its_tokenizer_and_facts_and_starts_the_next_run(tmp_path, options):
    dmpo, checkpoint = run_of("sudoku_tiny", tmp_path, **options)
    export_checkpoint(checkpoint, tmp_path / "out", merge=bool(options))
    plain = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert plain.get_vocab() == dmpo.policy.tokenizer.get_vocab()
    assert plain.chat_template == dmpo.policy.tokenizer.chat_template
    (tmp_path / "second").mkdir()
    second = DMPO(
        str(tmp_path / "out"),
        objective=WDCE(reward_temperature=0.1, replicates=2),
        sampler=ConfidenceSampler(denoising_steps=4),
        completion_length=8,
        group_size=4,
        micro_batch_size=4,
        reward=digit_share,
    )
    assert second.policy.facts == dmpo.policy.facts
    assert_same(second.policy.model, dmpo)
    trainer(tmp_path / "second", max_steps=1).fit(second, loader())


def test_bfloat16_stays_bfloat16(tmp_path):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    dmpo, checkpoint = run_of(str(tmp_path / "base"), tmp_path, tokenizer="sudoku_tiny")
    export_checkpoint(checkpoint, tmp_path / "out")
    loaded = load_model(str(tmp_path / "out")).state_dict()
    for name, value in dmpo.policy.model.state_dict().items():
        assert loaded[name].dtype == torch.bfloat16
        assert torch.equal(loaded[name], value), name


def test_random_weights_are_drawn_again_for_a_merge(tmp_path):
    dmpo, checkpoint = run_of("sudoku_tiny", tmp_path, **LORA, random_weights=True, seed=3)
    export_checkpoint(checkpoint, tmp_path / "out", merge=True)
    assert_same(load_model(str(tmp_path / "out")), dmpo)


def test_an_adapter_on_random_weights_is_only_exported_merged(tmp_path):
    """Its base could not be found again: the adapter folder names a source, not a seed."""
    _, checkpoint = run_of("sudoku_tiny", tmp_path, **LORA, random_weights=True)
    with pytest.raises(ValueError, match=r"random weights.*--merge"):
        export_checkpoint(checkpoint, tmp_path / "out")


def test_an_adapter_trained_on_four_bits_is_exported_over_the_whole_base(tmp_path):
    pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes: the `quantization` extra")
    dmpo, checkpoint = run_of("sudoku_tiny", tmp_path, **LORA, quantization="nf4")
    export_checkpoint(checkpoint, tmp_path / "out")
    trained = {name: p for name, p in dmpo.policy.model.named_parameters() if p.requires_grad}
    loaded = dict(load_model(str(tmp_path / "out")).named_parameters())
    for name, value in trained.items():
        assert torch.equal(loaded[name], value), name
    export_checkpoint(checkpoint, tmp_path / "merged", merge=True)
    assert len(tensors_in(tmp_path / "merged")) == BASE_TENSORS


ON_QUERIES = {"adapter": LoRA(r=2, targets=["query"])}


@pytest.mark.parametrize(
    ("options", "merge"), [({}, False), (ON_QUERIES, False), (ON_QUERIES, True)], ids=["whole", "adapter", "merged"]
)
def test_a_bert_with_its_tied_embeddings(tmp_path, options, merge):
    tiny_bert().save_pretrained(tmp_path / "base")
    words = bert_tokenizer()
    words.save_pretrained(tmp_path / "base")
    data = PromptLoader([{"prompt": "1 2 3", "digit": "1"}] * 4, words, batch_size=1)
    dmpo, checkpoint = run_of(str(tmp_path / "base"), tmp_path, data=data, **options)
    export_checkpoint(checkpoint, tmp_path / "out", merge=merge)
    assert_same(load_model(str(tmp_path / "out")), dmpo)


TIED = {"iLLaDA": tiny_illada, "SDAR": partial(tiny_sdar, tie_word_embeddings=True)}


@pytest.mark.parametrize("build", TIED.values(), ids=TIED.keys())
@pytest.mark.parametrize(
    ("options", "merge"), [({}, False), (LORA, False), (LORA, True)], ids=["whole", "adapter", "merged"]
)
def test_a_model_whose_head_is_its_embedding(tmp_path, options, merge, build):
    build(initializer_range=0.1).save_pretrained(tmp_path / "base")
    load_tokenizer("sudoku_tiny").save_pretrained(tmp_path / "base")
    dmpo, checkpoint = run_of(str(tmp_path / "base"), tmp_path, **options)
    assert (logits(dmpo.policy.model) - logits(load_model(str(tmp_path / "base")))).abs().max() > 1e-3
    export_checkpoint(checkpoint, tmp_path / "out", merge=merge)
    assert_same(load_model(str(tmp_path / "out")), dmpo)


# What transformers is told, and what a checkpoint may ask for ---------------------------------------------------------

LOAD = """
import sys
import {package}
from transformers import AutoModelForMaskedLM
print(type(AutoModelForMaskedLM.from_pretrained(sys.argv[1])).__name__)
"""


@pytest.mark.parametrize(
    ("package", "expected"),
    [pytest.param("dmpo_lightning.models", "LLaDA", marks=pytest.mark.slow), ("dmpo_lightning", "")],
)
def test_transformers_loads_an_exported_folder_once_models_was_imported(tmp_path, package, expected):
    tiny_model().save_pretrained(tmp_path / "out")
    code = [sys.executable, "-c", LOAD.format(package=package), str(tmp_path / "out")]
    done = subprocess.run(code, capture_output=True, text=True, check=False)
    assert done.stdout.strip().startswith(expected)
    assert (done.returncode == 0) == bool(expected), done.stderr


def with_code(folder) -> None:
    """A base whose configuration names code of its own, which makes a folder where it is run."""
    tiny_bert().save_pretrained(folder)
    bert_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "ours", "auto_map": {"AutoConfig": "code.Ours", "AutoModelForMaskedLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(folder / 'exploded')!r})\n")


def test_code_of_the_base_is_not_run_because_the_checkpoint_says_so(tmp_path, caplog):
    _, checkpoint = run_of("sudoku_tiny", tmp_path)
    with_code(tmp_path / "base")
    saved = torch.load(checkpoint)
    saved["backbone"] |= {"model": str(tmp_path / "base"), "trust_remote_code": True}
    torch.save(saved, checkpoint)
    with pytest.raises(ValueError, match="trust_remote_code"):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert "add --trust_remote_code (`trust_remote_code=True` in Python) if you trust it" in caplog.text
    assert not (tmp_path / "base" / "exploded").exists()
    with pytest.raises(AttributeError, match="Ours"):
        export_checkpoint(checkpoint, tmp_path / "out", trust_remote_code=True)
    assert (tmp_path / "base" / "exploded").exists()


@pytest.mark.parametrize("change", [{"unknown": 1}, {"adapter": {"s": 1}}])
def test_a_description_of_the_model_that_is_not_understood_is_an_error(tmp_path, change):
    _, checkpoint = run_of("sudoku_tiny", tmp_path)
    saved = torch.load(checkpoint)
    torch.save(saved | {"backbone": saved["backbone"] | change}, checkpoint)
    with pytest.raises(ValueError, match="The checkpoint describes"):
        export_checkpoint(checkpoint, tmp_path / "out")


# Errors ---------------------------------------------------------------------------------------------------------------


def test_another_base_than_the_trained_one_is_an_error(tmp_path):
    _, checkpoint = run_of("sudoku_tiny", tmp_path, **LORA)
    tiny_model(n_layers=1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="trained tensors, the model has 14"):
        export_checkpoint(checkpoint, tmp_path / "out", model=str(tmp_path / "other"))


def test_a_base_of_another_width_is_an_error(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    _, checkpoint = run_of(str(tmp_path / "base"), tmp_path, tokenizer="sudoku_tiny", **LORA)
    tiny_model(d_model=64).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"attn_out\.lora_A.*Is `model` the base"):
        export_checkpoint(checkpoint, tmp_path / "out", model=str(tmp_path / "other"))


def test_a_base_that_moved_is_found_by_model(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    dmpo, checkpoint = run_of(str(tmp_path / "base"), tmp_path, tokenizer="sudoku_tiny", **LORA)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="Cannot load"):
        export_checkpoint(checkpoint, tmp_path / "out")
    export_checkpoint(checkpoint, tmp_path / "out", model=str(tmp_path / "moved"))
    assert_same(load_model(str(tmp_path / "out")), dmpo)


def test_a_model_given_as_a_module_needs_its_base_named(tmp_path):
    _, checkpoint = run_of(tiny_model(), tmp_path, tokenizer=load_tokenizer("sudoku_tiny"))
    with pytest.raises(ValueError, match="--model"):
        export_checkpoint(checkpoint, tmp_path / "out")


def test_a_folder_with_weights_of_something_else_is_an_error_before_anything_is_written(tmp_path):
    _, checkpoint = run_of("sudoku_tiny", tmp_path, **LORA)
    tiny_model().save_pretrained(tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    with pytest.raises(ValueError, match=r"holds other weights \(model\.safetensors\)"):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


# The command ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--merge"]])
def test_the_command_exports(tmp_path, capsys, flags):
    dmpo, checkpoint = run_of("sudoku_tiny", tmp_path, **LORA)
    out = str(tmp_path / "out")
    assert main(["export", "--ckpt_path", checkpoint, "--output", out, *flags]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{out}: 56 trained tensors")
    assert_same(load_model(out), dmpo)


def text_file(tmp_path) -> list[str]:
    (tmp_path / "run.ckpt").write_text("hello")
    return ["--output", str(tmp_path / "out")]


def foreign_checkpoint(tmp_path) -> list[str]:
    torch.save({"state_dict": {}}, tmp_path / "run.ckpt")
    return ["--output", str(tmp_path / "out")]


def truncated_checkpoint(tmp_path) -> list[str]:
    run_of("sudoku_tiny", tmp_path, **LORA)
    content = (tmp_path / "run.ckpt").read_bytes()
    (tmp_path / "run.ckpt").write_bytes(content[: len(content) // 2])
    return ["--output", str(tmp_path / "out")]


def nothing_to_merge(tmp_path) -> list[str]:
    run_of("sudoku_tiny", tmp_path)
    return ["--output", str(tmp_path / "out"), "--merge"]


def no_such_base(tmp_path) -> list[str]:
    run_of("sudoku_tiny", tmp_path, **LORA)
    return ["--output", str(tmp_path / "out"), "--model", "nobody/nothing"]


def output_is_a_file(tmp_path) -> list[str]:
    run_of("sudoku_tiny", tmp_path, **LORA)
    (tmp_path / "file").write_text("")
    return ["--output", str(tmp_path / "file")]


CASES = [
    (lambda tmp_path: ["--output", str(tmp_path / "out")], "No checkpoint file"),
    (text_file, "run.ckpt' is truncated, damaged or no checkpoint"),
    (truncated_checkpoint, "run.ckpt' is truncated, damaged or no checkpoint"),
    (foreign_checkpoint, "not written by DMPO"),
    (nothing_to_merge, "no adapter to merge"),
    (no_such_base, "hf download nobody/nothing"),
    (output_is_a_file, "file"),
]


@pytest.mark.parametrize(("prepare", "expected"), CASES)
def test_what_cannot_be_exported_is_one_line_and_status_2(tmp_path, capsys, prepare, expected):
    arguments = prepare(tmp_path)
    capsys.readouterr()
    assert main(["export", "--ckpt_path", str(tmp_path / "run.ckpt"), *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "Loading weights" not in line and line.strip()]
    assert [line.startswith("dmpo-lightning: ") for line in lines] == [True]
    assert expected in lines[0]
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("arguments", [[], ["--output", "x"], ["--ckpt_path", "x", "--output", "y", "--nope", "1"]])
def test_misspelt_or_lacking_options_have_status_2(arguments):
    assert main(["export", *arguments]) == 2
