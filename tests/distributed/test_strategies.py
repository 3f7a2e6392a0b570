"""Every strategy trains as DDP does, and a restarted run is the uninterrupted one."""

from functools import cache
from pathlib import Path

import pytest
from ranks import run_ranks
from safetensors.torch import load_file

from dmpo_lightning.checkpoints.export import export_checkpoint
from dmpo_lightning.models.loading import load_model, load_tokenizer
from small_models import tiny_llada2, tiny_sdar
from tiers import slow_unless

SHARDED = ["fsdp2", "fsdp1", "zero2", "zero3"]
PAIRS = [(kind, adapter) for kind in ("ddp", *SHARDED) for adapter in ("lora", "full")] + [("fsdp2_full", "lora")]
EXACT = {"ddp", "fsdp2", "fsdp2_full"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The facts of each rank of a case, and its folder; each is run once."""

    @cache
    def run(case, kind, adapter, **options):
        folder = tmp_path_factory.mktemp(f"{kind}-{adapter}")
        options |= {"cuts": list(options.pop("cuts"))} if "cuts" in options else {}
        options |= {"flags": dict(options.pop("flags"))} if "flags" in options else {}
        return run_ranks(f"cases.{case}", 2, folder, timeout=300, kind=kind, adapter=adapter, **options), folder

    return run


def assert_like_ddp(runs, kind, adapter, *, cuts, exact=False, **options):
    ranks, _ = runs("train", kind, adapter, cuts=cuts, **options)
    expected, _ = runs("train", "ddp", adapter, cuts=cuts, **options)
    for rank, seen in enumerate(ranks):
        assert len(seen["losses"]) == 10
        # ZeRO-3 sums gradients in another order, and the steps here are long.
        assert seen["losses"] == pytest.approx(expected[rank]["losses"], abs=3e-5)
        assert seen["validation"] == pytest.approx(expected[rank]["validation"], abs=1e-5)
        assert seen["steps"] == 5
        tolerance = 0 if exact or kind in EXACT else 1e-6
        for cut, resumed in zip(cuts, seen["resumed"], strict=True):
            assert resumed == pytest.approx(seen["losses"][2 * cut :], abs=tolerance, rel=0)
        assert seen["distance"] <= tolerance
        assert seen["moved"] > 1e-2  # else all of this would hold for weights that stand still
    assert ranks[0]["losses"] != pytest.approx(ranks[1]["losses"], abs=1e-3)


def assert_one_run_like_ddp(found, expected):
    """Of cases where DDP's own losses stay within 5e-6 when its first weights are moved by a rounding error: steps of
    AdamW of 1e-3 made that 5e-5 with dynamic samplers, which no other order of summation could meet.
    """
    for rank in (0, 1):
        assert found[rank]["losses"] == pytest.approx(expected[rank]["losses"], abs=1e-5)
        assert found[rank]["norm"] == pytest.approx(expected[rank]["norm"], rel=1e-4)
        assert max(map(abs, found[rank]["losses"])) > 0.1  # else no group had a signal


@pytest.mark.parametrize(
    ("kind", "adapter"),
    slow_unless(lambda *pair: pair in {("ddp", "lora"), ("fsdp2", "lora"), ("zero2", "lora")}, PAIRS),
)
def test_each_strategy_is_ddp_and_a_restart_changes_nothing_and_the_export_holds_what_was_trained(
    runs, tmp_path, kind, adapter
):
    """The reference is refreshed for each buffer but the first, and a buffer takes two steps. So one restart is in the
    middle of a buffer, with a reference that was refreshed, and the other right before it is refreshed again.
    """
    options = {"cuts": (3, 4), "refresh": 1}
    assert_like_ddp(runs, kind, adapter, **options)
    _, folder = runs("train", kind, adapter, **options)
    _, other = runs("train", "ddp", adapter, **options)
    # By callback at the end of the run, and from the checkpoint of its last step.
    export_checkpoint(folder / "whole" / "step=5.ckpt", tmp_path, trust_checkpoint=True)
    name = "adapter_model.safetensors" if adapter == "lora" else "model.safetensors"
    expected = load_file(other / "exported" / name)
    assert len(expected) == (56 if adapter == "lora" else 39)
    called_back, from_checkpoint = load_file(folder / "exported" / name), load_file(tmp_path / name)
    assert called_back.keys() == from_checkpoint.keys() == expected.keys()
    # Adam enlarges what ZeRO-3 sums in another order.
    tolerance = 1e-6 if adapter == "lora" and kind != "zero3" else 1e-4
    for tensor, value in expected.items():
        assert float((called_back[tensor] - value).abs().max()) < tolerance, tensor
        assert float((called_back[tensor] - from_checkpoint[tensor]).abs().max()) < 1e-6, tensor


@pytest.mark.slow
def test_a_refreshed_reference_changes_the_losses(runs):
    refreshed, fixed = (runs("train", "ddp", "lora", cuts=(3, 4), **options)[0][0] for options in ({"refresh": 1}, {}))
    assert refreshed["losses"] != pytest.approx(fixed["losses"], abs=1e-3)
    assert fixed["distance"] == 0


@pytest.mark.parametrize(
    ("kind", "adapter"),
    slow_unless(
        lambda *pair: pair[0] == "zero2", [("fsdp2", "full"), ("fsdp1", "full"), ("zero2", "lora"), ("zero3", "full")]
    ),
)
def test_accumulated_gradients_are_those_of_ddp(runs, kind, adapter):
    """Neither clipped nor divided by Adam, so that a factor shows."""
    case = {"optimizer": "SGD", "learning_rate": 1e-3 if adapter == "full" else 1e-2, "steps": 3}
    case["flags"] = (("gradient_clip_val", None),)
    (found, _), (expected, _) = (runs("one_run", each, adapter, **case) for each in (kind, "ddp"))
    assert_one_run_like_ddp(found, expected)


@pytest.mark.slow
def test_lightnings_own_deepspeed_is_warned_about_where_it_divides_accumulated_gradients_twice(tmp_path):
    for accumulate in (1, 2):
        case = {"kind": "zero2 of lightning", "adapter": "lora", "steps": 1, "flags": {"accumulate": accumulate}}
        run_ranks("cases.one_run", 2, tmp_path, **case)
        said = (tmp_path / "rank0.log").read_text()
        assert ("use dmpo_lightning.distributed.strategies.ZeROStrategy" in said) == (accumulate > 1)


DYNAMIC = {"adapter": "full", "learning_rate": 2e-4, "steps": 3}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "sampler"), [("fsdp2", "early exit"), ("fsdp2", "wino"), ("fsdp1", "threshold")])
def test_samplers_that_end_early_on_one_rank_do_not_hang_and_train_as_ddp_does(runs, kind, sampler):
    (found, _), (expected, _) = (runs("one_run", each, sampler=sampler, **DYNAMIC) for each in (kind, "ddp"))
    assert_one_run_like_ddp(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp2", "zero3"])
def test_gathering_once_per_buffer_saves_most_gathers_and_dynamic_samplers_train_as_under_ddp(runs, tmp_path, kind):
    expected, _ = runs("one_run", "ddp", sampler="threshold", **DYNAMIC)
    case = {"kind": kind, "sampler": "threshold", "learning_rate": 2e-4, "steps": 3}
    once, often = (
        run_ranks("cases.count_gathers", 2, tmp_path / str(gather), gather=gather, **case) for gather in (True, False)
    )
    assert_one_run_like_ddp(once, expected)
    assert_one_run_like_ddp(often, expected)
    assert max(once[0]["gathers"]) * 2 < min(often[0]["gathers"])


@pytest.fixture(scope="module")
def block_causal_folders(tmp_path_factory):
    """A block-causal model whose head is its embedding, and a mixture of experts, with the embedded tokenizer."""
    models = {"tied": tiny_sdar(tie_word_embeddings=True, initializer_range=0.1), "mixture": tiny_llada2()}
    folders = {name: str(tmp_path_factory.mktemp(name)) for name in models}
    for name, model in models.items():
        model.save_pretrained(folders[name])
        load_tokenizer("sudoku_tiny").save_pretrained(folders[name])
    return folders


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "model"),
    [("fsdp2", "tied"), ("zero3", "tied"), *((kind, "mixture") for kind in ("fsdp2", "fsdp1", "zero3"))],
)
def test_a_block_causal_model_trains_as_under_ddp_and_restarts_and_exports(runs, block_causal_folders, kind, model):
    options = {"cuts": (3,), "model": block_causal_folders[model]}
    assert_like_ddp(runs, kind, "full", exact=True, **options)
    found, expected = (
        load_model(str(runs("train", each, "full", **options)[1] / "exported")).state_dict() for each in (kind, "ddp")
    )
    assert found.keys() == expected.keys()
    for tensor, value in expected.items():
        assert float((found[tensor] - value).abs().max()) < 1e-4, tensor


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", *SHARDED])
def test_checkpoints_grow_with_the_adapter_and_hold_no_base(tmp_path, kind):
    small, large = (
        run_ranks("cases.one_run", 2, tmp_path / str(rank), kind=kind, adapter="lora", rank=rank, steps=1)[0]
        for rank in (4, 64)
    )
    grown = 4 * (large["trainable"] - small["trainable"])  # bytes
    copies = 4 if kind == "zero2" else 3  # weights, two moments, and ZeRO-2's own copy of the weights
    assert (copies - 0.1) * grown < large["bytes"] - small["bytes"] < (copies + 0.1) * grown


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHARDED)
def test_a_base_in_bfloat16_trains_under_lora(tmp_path, kind):
    """PEFT makes float32 adapters for it."""
    case = {"adapter": "lora", "dtype": "bfloat16", "steps": 2, "flags": {"precision": "bf16-true"}}
    first, second = run_ranks("cases.one_run", 2, tmp_path, kind=kind, **case)
    assert first["steps"] == 2
    assert first["weights"] == second["weights"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1", "zero3"])
def test_mixed_precision_trains_and_continues_exactly(tmp_path, kind):
    """Each rounds at other positions, so that other completions are drawn: losses are not compared with DDP's."""
    case = {"adapter": "full", "cuts": [3], "flags": {"precision": "bf16-mixed"}}
    for seen in run_ranks("cases.train", 2, tmp_path, kind=kind, **case):
        assert seen["resumed"] == [pytest.approx(seen["losses"][-4:], abs=0 if kind == "fsdp2" else 1e-6)]
        assert seen["distance"] <= (0 if kind == "fsdp2" else 1e-6)
        assert seen["moved"] > 1e-2


@pytest.mark.slow
def test_a_quantised_base_trains_under_ddp_and_continues_exactly(tmp_path):
    case = {"kind": "ddp", "adapter": "lora", "quantization": "nf4", "cuts": [3]}
    first, second = run_ranks("cases.train", 2, tmp_path, **case)
    for rank in (first, second):
        assert rank["resumed"] == [rank["losses"][-4:]]
        assert rank["distance"] == 0
        assert rank["moved"] > 1e-2
    assert first["losses"] != pytest.approx(second["losses"], abs=1e-3)


def test_objectives_of_others_train_under_fsdp2_as_under_ddp(runs):
    options = {"overlays": str(Path(__file__).parents[2] / "configs" / "objectives")}
    found, expected = (runs("every_overlay", kind, "full", **options)[0] for kind in ("fsdp2", "ddp"))
    for rank in (0, 1):
        assert found[rank].keys() == expected[rank].keys() != set()
        for name, losses in expected[rank].items():
            assert found[rank][name] == pytest.approx(losses, abs=3e-5, rel=1e-4), name
