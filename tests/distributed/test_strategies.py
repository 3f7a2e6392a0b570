"""Every strategy trains as DDP does, and a restarted run is the uninterrupted one."""

from functools import cache
from itertools import product

import pytest
from ranks import run_ranks
from safetensors.torch import load_file

from dmpo_lightning.checkpoints.export import export_checkpoint
from dmpo_lightning.models.loading import load_model, load_tokenizer
from small_models import tiny_sdar
from tiers import slow_unless

PAIRS = list(product(("ddp", "fsdp2", "fsdp2_full", "fsdp1", "zero2", "zero3"), ("lora", "full")))
ALL = slow_unless(lambda *pair: pair in {("ddp", "lora"), ("fsdp2", "lora"), ("zero2", "lora")}, PAIRS)
SHARDED = ["fsdp2", "fsdp1", "zero2", "zero3"]
EXACT = {"ddp", "fsdp2", "fsdp2_full"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The facts of each rank of `cases.train`, and its folder; each case is run once."""

    @cache
    def run(kind, adapter, **options):
        folder = tmp_path_factory.mktemp(f"{kind}-{adapter}")
        return run_ranks("cases.train", 2, folder, kind=kind, adapter=adapter, **options), folder

    return run


def assert_like_ddp(runs, kind, adapter, *, cut=3, exact=False, **options):
    options |= {"cut": cut}
    ranks, _ = runs(kind, adapter, **options)
    expected, _ = runs("ddp", adapter, **{name: value for name, value in options.items() if "gather" not in name})
    for rank, seen in enumerate(ranks):
        assert len(seen["losses"]) == 10
        # ZeRO-3 sums gradients in another order, and the steps here are long.
        assert seen["losses"] == pytest.approx(expected[rank]["losses"], abs=3e-5)
        assert seen["validation"] == pytest.approx(expected[rank]["validation"], abs=1e-5)
        assert seen["steps"] == 5
        tolerance = 0 if exact or kind in EXACT else 1e-6
        assert seen["resumed"] == pytest.approx(seen["losses"][2 * cut :], abs=tolerance, rel=0)
        assert seen["distance"] <= tolerance
        assert seen["moved"] > 1e-2  # else all of this would hold for weights that stand still


def assert_one_run_like_ddp(folder, kind, adapter, *, gather_for_generation=False, **case):
    """``case`` is one where DDP's own losses stay within 5e-6 when its first weights are moved by a rounding error:
    steps of AdamW of 1e-3 made that 5e-5 with dynamic samplers, which no other order of summation could meet.
    """
    case |= {"adapter": adapter, "steps": 3}
    gathers = {"gather_for_generation": True} if gather_for_generation else {}
    found = run_ranks("cases.one_run", 2, folder / "found", kind=kind, **gathers, **case)
    expected = run_ranks("cases.one_run", 2, folder / "ddp", kind="ddp", **case)
    for rank in (0, 1):
        assert found[rank]["losses"] == pytest.approx(expected[rank]["losses"], abs=1e-5)
        assert found[rank]["norm"] == pytest.approx(expected[rank]["norm"], rel=1e-4)
        assert max(map(abs, found[rank]["losses"])) > 0.1  # else no group had a signal


@pytest.mark.parametrize(("kind", "adapter"), ALL)
def test_losses_are_those_of_ddp_and_a_restart_in_the_middle_of_a_buffer_changes_nothing(runs, kind, adapter):
    assert_like_ddp(runs, kind, adapter)
    ranks, _ = runs(kind, adapter, cut=3)
    assert ranks[0]["losses"] != pytest.approx(ranks[1]["losses"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("kind", ["ddp", *SHARDED])
def test_a_renewed_reference_is_that_of_ddp_and_survives_a_restart(runs, kind, adapter):
    assert_like_ddp(runs, kind, adapter, refresh=1)
    renewed, fixed = runs("ddp", adapter, cut=3, refresh=1)[0][0], runs("ddp", adapter, cut=3)[0][0]
    assert renewed["losses"] != pytest.approx(fixed["losses"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("kind", ["ddp", *SHARDED])
def test_a_restart_right_before_the_reference_is_renewed_renews_it_once(runs, kind, adapter):
    """Buffers take two steps, so that the third begins with it."""
    assert_like_ddp(runs, kind, adapter, cut=4, refresh=2)


@pytest.mark.parametrize(
    ("kind", "adapter"),
    slow_unless(lambda *pair: pair == ("zero3", "full"), [pair for pair in PAIRS if pair[0] != "ddp"]),
)
def test_accumulated_gradients_are_those_of_ddp(tmp_path, kind, adapter):
    """Neither clipped nor divided by Adam, so that a factor shows."""
    rate = 1e-3 if adapter == "full" else 1e-2
    assert_one_run_like_ddp(
        tmp_path, kind, adapter, optimizer="SGD", learning_rate=rate, flags={"gradient_clip_val": None}
    )


@pytest.mark.slow
@pytest.mark.parametrize(("accumulate", "warns"), [(1, False), (2, True)])
def test_lightnings_own_deepspeed_is_warned_about_where_it_divides_accumulated_gradients_twice(
    tmp_path, accumulate, warns
):
    case = {"kind": "zero2 of lightning", "adapter": "lora", "steps": 1, "flags": {"accumulate": accumulate}}
    run_ranks("cases.one_run", 2, tmp_path, **case)
    assert ("use dmpo_lightning.distributed.strategies.ZeROStrategy" in (tmp_path / "rank0.log").read_text()) == warns


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["threshold", "early exit", "wino"])
@pytest.mark.parametrize("kind", SHARDED)
def test_samplers_that_end_early_on_one_rank_do_not_hang_and_train_as_ddp_does(tmp_path, kind, sampler):
    assert_one_run_like_ddp(tmp_path, kind, "full", sampler=sampler, learning_rate=2e-4)


@pytest.fixture(scope="module")
def block_causal_folder(tmp_path_factory):
    """A block-causal model whose head is its embedding, with the tokenizer of the embedded one."""
    folder = str(tmp_path_factory.mktemp("block_causal"))
    tiny_sdar(tie_word_embeddings=True, initializer_range=0.1).save_pretrained(folder)
    load_tokenizer("sudoku_tiny").save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "adapter"), [("fsdp2", "lora"), ("fsdp2", "full"), ("zero3", "full")])
def test_a_block_causal_model_trains_as_under_ddp_and_restarts_and_exports(runs, block_causal_folder, kind, adapter):
    assert_like_ddp(runs, kind, adapter, model=block_causal_folder, exact=True)
    _, folder = runs(kind, adapter, cut=3, model=block_causal_folder)
    _, other = runs("ddp", adapter, cut=3, model=block_causal_folder)
    found, expected = (load_model(str(each / "exported")).state_dict() for each in (folder, other))
    assert found.keys() == expected.keys()
    for tensor, value in expected.items():
        assert float((found[tensor] - value).abs().max()) < (1e-6 if adapter == "lora" else 1e-4), tensor


@pytest.mark.parametrize(("kind", "adapter"), ALL)
def test_the_export_holds_the_trained_tensors_of_ddp(runs, tmp_path, kind, adapter):
    """By callback at the end of the run, and from the checkpoint of its last step."""
    _, folder = runs(kind, adapter, cut=3)
    _, other = runs("ddp", adapter, cut=3)
    export_checkpoint(folder / "whole" / "step=5.ckpt", tmp_path, trust_checkpoint=True)
    name = "adapter_model.safetensors" if adapter == "lora" else "model.safetensors"
    expected = load_file(other / "exported" / name)
    assert len(expected) == (56 if adapter == "lora" else 39)
    for found in (load_file(folder / "exported" / name), load_file(tmp_path / name)):
        assert found.keys() == expected.keys()
        for tensor, value in expected.items():
            assert float((found[tensor] - value).abs().max()) < (1e-6 if adapter == "lora" else 1e-4), tensor


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", *SHARDED])
def test_checkpoints_grow_with_the_adapter_and_hold_no_base(tmp_path, kind):
    small, large = (
        run_ranks("cases.train", 2, tmp_path / str(rank), kind=kind, adapter="lora", rank=rank)[0] for rank in (4, 64)
    )
    grown = 4 * (large["trainable"] - small["trainable"])  # bytes
    copies = 4 if kind == "zero2" else 3  # weights, two moments, and ZeRO-2's own copy of the weights
    assert (copies - 0.1) * grown < large["bytes"] - small["bytes"] < (copies + 0.1) * grown


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp2", "zero3"])
def test_samplers_that_end_early_on_one_rank_sample_from_gathered_weights(tmp_path, kind):
    assert_one_run_like_ddp(tmp_path, kind, "full", gather_for_generation=True, sampler="threshold", learning_rate=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2", "zero2", "zero3"])
def test_a_base_in_bfloat16_trains_under_lora(tmp_path, kind):
    """PEFT makes float32 adapters for it."""
    case = {"adapter": "lora", "dtype": "bfloat16", "steps": 3, "flags": {"precision": "bf16-true"}}
    first, second = run_ranks("cases.one_run", 2, tmp_path, kind=kind, **case)
    assert first["steps"] == 3
    assert first["weights"] == second["weights"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1", "zero3"])
def test_mixed_precision_trains_and_continues_exactly(tmp_path, kind):
    """Each rounds at other places, so that other completions are drawn: losses are not compared with DDP's."""
    case = {"adapter": "full", "flags": {"precision": "bf16-mixed"}}
    for seen in run_ranks("cases.train", 2, tmp_path, kind=kind, **case):
        assert seen["resumed"] == pytest.approx(seen["losses"][-4:], abs=0 if kind == "fsdp2" else 1e-6)
        assert seen["distance"] <= (0 if kind == "fsdp2" else 1e-6)
        assert seen["moved"] > 1e-2


@pytest.mark.slow
def test_a_quantised_base_trains_under_ddp_and_continues_exactly(tmp_path):
    first, second = run_ranks("cases.train", 2, tmp_path, kind="ddp", adapter="lora", quantization="nf4")
    for rank in (first, second):
        assert rank["resumed"] == rank["losses"][-4:]
        assert rank["distance"] == 0
        assert rank["moved"] > 1e-2
    assert first["losses"] != pytest.approx(second["losses"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp2", "zero3"])
def test_gathering_once_per_buffer_saves_most_gathers_and_changes_nothing(tmp_path, kind):
    once, often = (
        run_ranks("cases.count_gathers", 2, tmp_path / str(gather), kind=kind, gather=gather)[0]
        for gather in (True, False)
    )
    assert once["losses"] == pytest.approx(often["losses"], abs=1e-5)
    assert max(once["gathers"]) * 2 < min(often["gathers"])
