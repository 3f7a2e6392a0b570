"""The planned peak against the measured one: forward, backward and AdamW step of small runs on the CPU; sampling."""

import pytest
import torch
from benchmarks.tensor_memory import TensorMemory
from planning_runs import LENGTH, PROMPT, ROWS, SmallRun, planned, small_config, small_run, training_peak
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoModelForMaskedLM, PreTrainedConfig

from dmpo_lightning.models.backbone import Backbone
from dmpo_lightning.models.dream import DreamConfig
from dmpo_lightning.models.lora import LoRA
from dmpo_lightning.models.sdar import SDARConfig
from dmpo_lightning.planning.rehearsal import Rehearsal
from dmpo_lightning.samplers import ConfidenceSampler, RandomOrderSampler, WinoSampler
from tiers import slow_unless

WITHIN = 0.1
"""The promise is 10 %."""


def qwen_config(family: type[PreTrainedConfig], **own: object) -> PreTrainedConfig:
    return family(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=384,
        vocab_size=2048,
        mask_token_id=5,
        eos_token_id=0,
        pad_token_id=0,
        **own,
    )


LORA, LORA_DROPOUT = LoRA(r=8, dropout=0.0), LoRA(r=8, dropout=0.05)
TRAINING = {
    "full": {},
    "full, checkpointing": {"checkpointing": True},
    "full, one micro-batch": {"accumulation": 1},
    "full, half precision": {"precision": "bf16-true"},
    "full, autocast": {"precision": "bf16-mixed"},
    "LoRA": {"adapter": LORA},
    "LoRA with dropout, half precision": {"adapter": LORA_DROPOUT, "precision": "bf16-true"},
    "LoRA with dropout, checkpointing": {"adapter": LORA_DROPOUT, "checkpointing": True, "dtype": "bfloat16"},
}


FAST = ("full, checkpointing", "LoRA with dropout, half precision", "dual, parallel", "short blocks")


@pytest.mark.parametrize("name", slow_unless(FAST.__contains__, TRAINING))
def test_a_training_step_is_predicted(name):
    config = small_config("small")
    measured = SmallRun(config, **TRAINING[name]).measured_peak()
    assert training_peak(planned(config, **TRAINING[name])) == pytest.approx(measured, rel=WITHIN)


def test_a_run_of_tensors_that_are_mostly_without_numbers_is_predicted():
    config = small_config("large", n_kv_heads=2)
    measured = SmallRun(config).measured_peak()
    assert training_peak(planned(config)) == pytest.approx(measured, rel=WITHIN)


@pytest.mark.parametrize(
    ("family", "own"), [(DreamConfig, {}), (SDARConfig, {"head_dim": 32, "tie_word_embeddings": True})]
)
def test_models_of_qwens_shape_are_predicted(family, own):
    config = qwen_config(family, **own)
    options = {"sampler": ConfidenceSampler()} if family is SDARConfig else {}
    assert training_peak(planned(config, **options)) == pytest.approx(SmallRun(config).measured_peak(), rel=WITHIN)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("checkpointing", slow_unless(bool, [False, True]))
def test_four_bit_bases_are_predicted(checkpointing, tmp_path):
    pytest.importorskip("bitsandbytes")
    config = small_config("small")
    AutoModelForMaskedLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path)
    options = {"adapter": LORA_DROPOUT, "quantization": "nf4"}
    model = Backbone(str(tmp_path), gradient_checkpointing=checkpointing, **options).build()
    memory = planned(config, dtype="bfloat16", precision="bf16-true", checkpointing=checkpointing, **options)
    measured = SmallRun(config, model=model, precision="bf16-true").measured_peak()
    assert training_peak(memory) == pytest.approx(measured, rel=WITHIN)


SAMPLING = {
    "drawn": (small_config("small"), "float32", ConfidenceSampler(block_length=16)),
    "tempered, half precision": (
        small_config("large"),
        "bfloat16",
        ConfidenceSampler(block_length=16, temperature=0.2),
    ),
    "greedy": (small_config("large"), "float32", ConfidenceSampler(block_length=16, temperature=0.0)),
    "prefix": (small_config("small"), "float32", ConfidenceSampler(block_length=16, cache="prefix")),
    "dual, parallel": (
        small_config("large"),
        "float32",
        ConfidenceSampler(block_length=16, cache="dual", threshold=0.9),
    ),
    "top-p": (small_config("small"), "float32", ConfidenceSampler(block_length=16, temperature=0.7, top_p=0.9)),
    "random order": (small_config("small"), "float32", RandomOrderSampler(denoising_steps=4)),
    "wino": (small_config("small"), "float32", WinoSampler(block_length=16)),
    "short blocks": (qwen_config(SDARConfig, head_dim=32, block_size=4), "float32", ConfidenceSampler()),
    "long blocks": (qwen_config(SDARConfig, head_dim=32, block_size=16), "bfloat16", ConfidenceSampler()),
}


@pytest.mark.parametrize("name", slow_unless(FAST.__contains__, SAMPLING))
def test_sampling_and_scoring_are_predicted(name):
    config, dtype, sampler = SAMPLING[name]
    phases = planned(config, dtype=dtype, sampler=sampler, accumulation=1).phases
    run = SmallRun(config, dtype=dtype)
    assert phases["sampling"].peak == pytest.approx(run.measured_sampling(sampler), rel=WITHIN)
    assert phases["scoring"].peak == pytest.approx(run.measured_scoring(), rel=WITHIN)


def test_our_measure_agrees_with_torch_where_torch_can_measure():
    """`MemTracker` fails on frozen parameters, so that LoRA needs a measure of our own."""
    run = SmallRun(small_config("small"), accumulation=1)
    run.step()
    tracker = MemTracker()
    tracker.track_external(run.model, run.optimizer)
    with tracker:
        run.step()
    ours = TensorMemory.of_training(run.model, run.optimizer)
    with ours:
        run.step()
    assert ours.peak == tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


def test_small_tensors_have_numbers_and_what_comes_of_large_ones_is_zeros():
    with Rehearsal() as rehearsal:
        large = torch.ones(2**10, 2**10)
        small = torch.arange(4)
        assert (int(small.sum()), float(large.sum()), int(large.argmax())) == (6, 0.0, 0)
        product = large @ large
        assert (rehearsal.live, rehearsal.flops) == (2 * 2**22 + 4 * 8, 2 * 2**30)
        del product
        # A view is the same memory.
        assert (large.T.shape, rehearsal.live) == ((2**10, 2**10), 2**22 + 4 * 8)


def test_memory_that_nobody_wrote_to_is_zeros():
    """A cache may be read where the forward that would fill it is left out."""
    with Rehearsal():
        assert not torch.full((2**12,), torch.nan).new_empty(2**12).any()


def test_a_run_has_as_many_columns_as_it_says():
    run = small_run(small_config("small"))
    assert (run.prompt_length, run.completion_length, run.schedule.buffer_rollouts) == (PROMPT, LENGTH, 2 * ROWS)
