"""What is measured, each section by itself: a generator of figures."""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.block_masks import Size as MaskSize
from benchmarks.block_masks import compare
from benchmarks.gpu.__main__ import section_limits
from benchmarks.gpu.bench import Bench, Figure
from benchmarks.gpu.training import RecordedBuffer, full_fine_tuning, quantized, training_step
from benchmarks.plain import generate
from dmpo_lightning import ConfidenceSampler
from dmpo_lightning.functional import draw_masks, elbo, row_keys
from dmpo_lightning.policy import evaluating

MODES: dict[str, dict[str, Any]] = {
    "none": {"cache": "none"},
    "prefix": {"cache": "prefix"},
    "dual": {"cache": "dual"},
    "threshold": {"cache": "dual", "threshold": 0.9},
}
GIB = 2**30


def machine(bench: Bench) -> Iterator[Figure]:
    """The card: its matrix product and its memory, which all floors stand on."""
    side = bench.size.square
    a, b = (torch.randn(side, side, device=bench.device, dtype=bench.dtype) for _ in range(2))
    seconds = bench.seconds(lambda: a @ b, repeats=20, warm_up=5)
    bench.products = 2 * side**3 / seconds
    yield Figure(f"matrix product {side}^3", bench.products / 1e12, "TFLOP/s", note=str(bench.dtype))
    source = torch.empty(2**28 if bench.on_gpu else 2**20, device=bench.device, dtype=torch.float32)
    target = torch.empty_like(source)
    copying = bench.seconds(lambda: target.copy_(source), repeats=20, warm_up=5)
    yield Figure("copy", 2 * source.numel() * 4 / copying / 1e12, "TB/s")


def tests(bench: Bench, output: Path, limit: float) -> Iterator[Figure]:
    """`tests/gpu`, whose report is tests.log beside the results."""
    environment = os.environ | ({} if bench.on_gpu else {"DMPO_GPU_TESTS_ON": "cpu"})
    chosen = ["-k", "draws or masks"] if bench.size.name == "tiny" else []
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "--no-header", "-p", "no:cacheprovider", *chosen]
    with (output / "tests.log").open("w", encoding="utf-8") as log:
        try:
            subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, timeout=limit, check=False)
        except subprocess.TimeoutExpired:
            log.write(f"\nended after {limit:.0f} s\n")
    text = (output / "tests.log").read_text(encoding="utf-8")
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)
    for kind in ("passed", "failed", "skipped"):
        counts = re.findall(rf"(\d+) {kind}", text.splitlines()[-1] if text else "")
        yield Figure(f"tests {kind}", float(counts[0]) if counts else 0.0, "", note=" ".join(failed)[:500])
    if failed or not re.search(r"\d+ passed", text):
        raise RuntimeError(f"tests/gpu: {failed or 'no test has passed'}; see {output / 'tests.log'}")


def forward(bench: Bench) -> Iterator[Figure]:
    """One forward of all rows, with adapters and without, and what a mask costs that hides nothing."""
    size, policy = bench.size, bench.policy
    rows = size.group_size
    ids, mask = bench.prompts(rows)
    ids = torch.cat((ids, torch.full((rows, size.completion_length), size.vocab_size - 1, device=bench.device)), 1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    places = torch.arange(rows, device=bench.device)[:, None] * size.length + torch.arange(
        size.prompt_length, size.prompt_length + size.block_length, device=bench.device
    )
    positions = rows * size.block_length
    flops = size.flops(ids.numel(), rows=rows, attended=size.length, head_positions=positions)

    variants: tuple[tuple[str, Tensor | None, Any], ...] = (
        ("with LoRA", None, nullcontext),
        ("without adapters", None, policy.model.disable_adapter),
        ("with LoRA and a mask", mask, nullcontext),
    )

    with evaluating(policy):
        for name, attended, context in variants:
            with context():
                seconds = bench.seconds(partial(policy.logits, ids, attended, places))
                share = flops / seconds / bench.products if bench.products else 0.0
                note = f"{flops / seconds / 1e12:.0f} TFLOP/s, {share:.0%} of the matrix product"
                yield Figure(f"forward {rows} x {size.length}, {name}", 1e3 * seconds, "ms", _ms(bench, flops), note)
        share = bench.product_share(partial(policy.logits, ids, None, places))
        yield Figure("share of matrix products in a forward", share, "")


def sampling(bench: Bench) -> Iterator[Figure]:
    """A buffer's rollouts under each cache, and the time of a step after the first of a block."""
    size, policy = bench.size, bench.policy
    rows, columns = size.group_size, size.length
    ids, mask = bench.prompts(rows)
    keys = row_keys(0, torch.zeros(1, dtype=torch.long, device=bench.device), group_size=rows, buffer=0)[0]
    blocks = size.completion_length // size.block_length
    with evaluating(policy):
        for name, options in MODES.items():
            steps = None if "threshold" in options else size.denoising_steps
            sampler = ConfidenceSampler(
                block_length=size.block_length, denoising_steps=steps, temperature=size.temperature, **options
            )
            run = _sampled(policy, sampler, ids, mask, size.completion_length, keys)
            forwards = _counted_forwards(policy, run)
            seconds = bench.seconds(run, repeats=1, warm_up=0)
            flops = None
            if steps is not None:
                flops = _sampling_flops(size, options["cache"], blocks, rows, columns)
            floor = None if flops is None else bench.floor(flops)
            note = f"{forwards} forwards, {1e3 * seconds / forwards:.1f} ms each"
            yield Figure(f"sampling {rows} rollouts, {name}", seconds, "s", floor, note)
        quick = ConfidenceSampler(
            block_length=size.block_length, denoising_steps=2 * blocks, temperature=size.temperature, cache="dual"
        )
        share = bench.product_share(_sampled(policy, quick, ids, mask, size.completion_length, keys))
        yield Figure("share of matrix products in sampling, dual", share, "")
        with policy.merged():
            seconds = bench.seconds(_sampled(policy, quick, ids, mask, size.completion_length, keys), repeats=1)
        yield Figure(f"sampling, dual, {2 * blocks} steps, adapters merged", seconds, "s")
        seconds = bench.seconds(_sampled(policy, quick, ids, mask, size.completion_length, keys), repeats=1)
        yield Figure(f"sampling, dual, {2 * blocks} steps, adapters beside", seconds, "s")


def plain(bench: Bench) -> Iterator[Figure]:
    """The published decoding beside ours, for a few steps: one block of two steps each, base weights."""
    size, policy = bench.size, bench.policy
    rows, length, steps = size.group_size, 2 * size.block_length, 4
    ids, mask = bench.prompts(rows)
    keys = row_keys(0, torch.zeros(1, dtype=torch.long, device=bench.device), group_size=rows, buffer=0)[0]
    base = policy.model.get_base_model()
    ban = torch.zeros(size.vocab_size, device=bench.device)
    ban[list(policy.facts.banned_token_ids)] = -torch.inf
    for cache in ("none", "prefix", "dual"):
        options: dict[str, Any] = {"block_length": size.block_length, "denoising_steps": steps, "cache": cache}
        sampler = ConfidenceSampler(temperature=size.temperature, **options)

        def published(options: dict[str, Any] = options) -> Any:
            return generate(
                base,
                ids,
                mask,
                completion_length=length,
                mask_token_id=size.vocab_size - 1,
                ban=ban,
                generator=torch.Generator(bench.device).manual_seed(0),
                temperature=size.temperature,
                **options,
            )

        with evaluating(policy), policy.model.disable_adapter():
            ours = _sampled(policy, sampler, ids, mask, length, keys)
            theirs, own = (bench.seconds(run, repeats=3) for run in (published, ours))
        note = f"plain {theirs:.3f} s, ours {own:.3f} s, {steps} steps"
        yield Figure(f"plain / ours, {cache}", theirs / own, "x", note=note)


def blocks(bench: Bench) -> Iterator[Figure]:
    """One layer's attention under the mask of a block-causal likelihood, and by FlexAttention."""
    config = bench.size
    size = MaskSize(
        rows=config.micro_batch_size,
        prompt_length=config.prompt_length,
        completion_length=config.completion_length,
        copies=config.replicates,
        heads=config.n_heads,
        key_heads=max(config.n_heads // 4, 1),
        head_size=config.d_model // config.n_heads,
    )
    # Compiling it takes longer than all else in small.
    kernel = None if bench.on_gpu else flex_attention
    for name, timing in compare(size, bench.device, bench.dtype, 3, kernel).items():
        note = f"flex {1e3 * timing.plain_seconds:.2f} ms, dense {1e3 * timing.our_seconds:.2f} ms"
        yield Figure(f"FlexAttention / dense mask, {name}", timing.ratio, "x", note=note)


def scoring(bench: Bench) -> Iterator[Figure]:
    """The ELBO of a micro-batch of rollouts, as log_rnd needs it of policy and reference."""
    size, policy = bench.size, bench.policy
    rows = size.micro_batch_size
    ids, mask = bench.prompts(rows)
    completions = torch.randint(1, size.vocab_size - 1, (rows, size.completion_length), device=bench.device)
    keys = torch.arange(rows, device=bench.device)
    masks = draw_masks(keys, length=size.completion_length, replicates=size.elbo_samples)

    def run() -> Tensor:
        return elbo(policy.completion_log_probs(ids, mask, completions, masks), masks)

    tokens = rows * size.elbo_samples * size.length
    positions = rows * size.elbo_samples * (size.completion_length + 1) / 2
    flops = size.flops(tokens, rows=rows * size.elbo_samples, attended=size.length, head_positions=positions)
    with evaluating(policy), bench.peak() as peak:
        seconds = bench.seconds(run)
    note = f"peak {peak[0] / GIB:.1f} GiB" if peak else ""
    yield Figure(
        f"scoring {rows} rollouts x {size.elbo_samples} maskings", 1e3 * seconds, "ms", _ms(bench, flops), note
    )


def training(bench: Bench) -> Iterator[Figure]:
    """Loss, backward pass and step of a micro-batch with LoRA: plain, checkpointed, compiled."""
    bench.release()
    for name, options in (
        ("checkpointed", {"checkpointing": True}),
        ("checkpointed, compiled blocks", {"checkpointing": True, "compiled": True}),
        ("all activations kept", {}),
    ):
        yield from training_step(bench, name, **options)
        bench.release()


def buffer(bench: Bench) -> Iterator[Figure]:
    """A whole buffer through the Trainer: rollout (dual cache), scoring and all passes."""
    bench.release()
    yield from RecordedBuffer(bench).figures()
    bench.release()


def qlora(bench: Bench) -> Iterator[Figure]:
    """A training step on a base of 4 bits."""
    bench.release()
    yield from quantized(bench)
    bench.release()


def full(bench: Bench) -> Iterator[Figure]:
    """A training step of all weights, of the largest model of this width that fits."""
    bench.release()
    yield from full_fine_tuning(bench)
    bench.release()


SECTIONS: dict[str, Callable[..., Iterator[Figure]]] = {
    "machine": machine,
    "tests": tests,
    "forward": forward,
    "buffer": buffer,
    "sampling": sampling,
    "plain": plain,
    "blocks": blocks,
    "scoring": scoring,
    "training": training,
    "qlora": qlora,
    "full": full,
}
"""In the order in which they are run, the most valuable first."""
LIMITS = section_limits(None)
"""Seconds after which a section is ended; all others have 60."""


def versions(device: torch.device) -> dict[str, str]:
    """What the figures depend on beside the code."""
    import lightning
    import peft
    import transformers

    card = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()}, no GPU"
    modules = {"torch": torch, "lightning": lightning, "transformers": transformers, "peft": peft}
    named = {name: str(module.__version__) for name, module in modules.items()}
    return {"card": card, "cuda": str(torch.version.cuda), "python": platform.python_version(), **named}


def _ms(bench: Bench, flops: float) -> float | None:
    floor = bench.floor(flops)
    return None if floor is None else 1e3 * floor


def _sampled(policy: Any, sampler: Any, ids: Tensor, mask: Tensor, length: int, keys: Tensor) -> Callable[[], Any]:
    return lambda: sampler.sample(policy, ids, mask, completion_length=length, keys=keys)


def _counted_forwards(policy: Any, run: Callable[[], Any]) -> int:
    """Forwards of one run, which is also its warm-up."""
    counted: list[None] = []
    hook = policy.model.register_forward_pre_hook(lambda *_: counted.append(None))
    run()
    hook.remove()
    return max(len(counted), 1)


def _sampling_flops(size: Any, cache: str, blocks: int, rows: int, columns: int) -> float:
    """Of a static schedule: a block's first step computes all columns, later ones what the cache leaves open."""
    later_steps = size.denoising_steps // blocks - 1
    total = 0.0
    for block in range(blocks):
        behind = size.completion_length - block * size.block_length
        later = {"none": columns, "prefix": behind, "dual": size.block_length}[cache]
        first = size.flops(rows * columns, rows=rows, attended=columns, head_positions=rows * size.block_length)
        next_ = size.flops(rows * later, rows=rows, attended=columns, head_positions=rows * size.block_length / 2)
        total += first + later_steps * next_
    return total
