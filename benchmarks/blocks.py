"""Sampling of a block-causal model: what a token costs at several lengths, beside recomputing everything in each step.

    python -m benchmarks.blocks --lengths 128 256 512
    python -m benchmarks.blocks --family llada2

The two sides alternate, after one untimed run of each whose tokens are compared; seconds are medians. Operations are
those of the matrix products, counted, per row and token behind the first block: those of attention grow with what there
is to attend to, and all others must not grow. Of a mixture of experts the plain side runs a loop over them, as
published, and both ways are also timed by themselves, forward and backward.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.options import at_least_three, function_named
from benchmarks.plain_experts import with_loops
from benchmarks.samplers import Timing, interleaved, random_policy_of, sampled
from dmpo_lightning.models.llada2 import LLaDA2Config, LLaDA2ForMaskedDiffusion
from dmpo_lightning.models.mixture import MixtureMLP
from dmpo_lightning.models.sdar import SDARConfig, SDARForMaskedDiffusion
from dmpo_lightning.policy import Policy
from dmpo_lightning.samplers import ConfidenceSampler


@dataclass(frozen=True)
class Size:
    """A model, four layers of width 256 with twice as many queries as keys, and the prompts that it continues."""

    vocab_size: int = 2048
    prompt_length: int = 96
    rows: int = 2
    block_size: int = 4


@dataclass(frozen=True)
class Cost:
    """Of one length, per row and token: median milliseconds of both sides, and millions of operations of ours.

    Operations are without those of the prompt and the first block; milliseconds are of everything.
    """

    length: int
    plain_ms: float
    our_ms: float
    ratio: float
    mismatches: int
    products: float
    """Outside attention."""
    attention: float


SHAPE = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "intermediate_size": 768,
    "initializer_range": 0.1,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 64, "moe_intermediate_size": 128}
"""Three of the four layers are mixtures, of which a token gets eight."""


def random_policy(size: Size, family: str = "sdar") -> Policy:
    """A model with large random weights, which never chooses its end token."""
    own = {"vocab_size": size.vocab_size, "block_size": size.block_size, "mask_token_id": size.vocab_size - 1}
    if family == "sdar":
        policy = random_policy_of(lambda: SDARForMaskedDiffusion(SDARConfig(**SHAPE, **own)))
    else:
        policy = random_policy_of(lambda: LLaDA2ForMaskedDiffusion(LLaDA2Config(**SHAPE, **EXPERTS, **own)))
    # All others are spread widely about 0, so that the greatest is far above it.
    policy.model.get_output_embeddings().weight.data[list(policy.facts.end_token_ids)] = 0.0
    return policy


def random_prompts(size: Size) -> Tensor:
    """Ids without the mask and end tokens."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, size.vocab_size - 1, (size.rows, size.prompt_length), generator=generator)


def ours(policy: Policy, prompt_ids: Tensor, length: int) -> Tensor:
    """Completions of the package's sampler, greedy, one token per step."""
    mask = torch.ones_like(prompt_ids, dtype=torch.bool)
    return sampled(policy, ConfidenceSampler(temperature=0.0), prompt_ids, mask, length)


def operations(run: Callable[[], object]) -> tuple[int, int]:
    """Floating-point operations of matrix products outside attention, and of attention."""
    kernels = (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,)
    counter = FlopCounterMode(display=False, custom_mapping=dict.fromkeys(kernels, _attention_operations))
    with counter:
        run()
    counts = counter.get_flop_counts()["Global"]
    attention = sum(count for kernel, count in counts.items() if "attention" in str(kernel))
    return sum(counts.values()) - attention, attention


def _attention_operations(query: torch.Size, key: torch.Size, *_: Any, **__: Any) -> int:
    """Of the two products, from the shapes ``[rows heads queries head_size]`` and ``[rows heads keys head_size]``."""
    rows, heads, queries, head_size = query
    return 4 * rows * heads * queries * key[2] * head_size


def cost(policy: Policy, size: Size, length: int, plain: Callable[..., Any], repeats: int) -> Cost:
    """Both sides at one length of completions."""
    prompt_ids, tokens = random_prompts(size), size.rows * length
    plain_model = with_loops(policy.model)
    timing = interleaved(
        lambda: (
            plain(
                plain_model, prompt_ids, completion_length=length, mask_token_id=policy.facts.mask_token_id
            ).completion_ids
        ),
        lambda: ours(policy, prompt_ids, length),
        repeats=repeats,
        compare=True,
    )
    whole, first = (
        operations(lambda length=end: ours(policy, prompt_ids, length)) for end in (length, size.block_size)
    )
    products, attention = (
        (of_all - of_first) / (size.rows * (length - size.block_size)) / 1e6
        for of_all, of_first in zip(whole, first, strict=True)
    )
    assert timing.mismatches is not None
    return Cost(
        length,
        1e3 * timing.plain_seconds / tokens,
        1e3 * timing.our_seconds / tokens,
        timing.ratio,
        timing.mismatches,
        products,
        attention,
    )


def expert_timing(policy: Policy, tokens: int, repeats: int) -> Timing:
    """Both ways of running the experts of one layer in training, forward and backward."""
    ours, plain = (
        next(module for module in model.train().modules() if isinstance(module, MixtureMLP))
        for model in (policy.model, with_loops(policy.model))
    )
    states = torch.randn(1, tokens, SHAPE["hidden_size"], generator=torch.Generator().manual_seed(0))

    def gradient(mixture: MixtureMLP) -> Tensor:
        mixture.zero_grad()
        given = states.clone().requires_grad_()
        mixture(given).square().sum().backward()
        return given.grad

    return interleaved(lambda: gradient(plain), lambda: gradient(ours), repeats=repeats, compare=False)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.blocks", description=__doc__.partition("\n")[0])
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 512])
    parser.add_argument("--family", choices=["sdar", "llada2"], default="sdar")
    parser.add_argument("--block-size", type=int, default=4)
    parser.add_argument("--plain", type=function_named, default="benchmarks.plain_blocks:generate")
    parser.add_argument("--repeats", type=at_least_three, default=3)
    parser.add_argument("--json", action="store_true", help="one line of JSON per length")
    options = parser.parse_args(arguments)
    if min(options.lengths) <= options.block_size:
        parser.error(f"lengths must be greater than the block size {options.block_size}, got {options.lengths}")
    if Size.prompt_length % options.block_size:
        parser.error(f"the block size must divide the prompt's {Size.prompt_length} tokens, got {options.block_size}")
    size = Size(block_size=options.block_size)
    policy = random_policy(size, options.family)
    if not options.json:
        print("length   plain [ms]   ours [ms]   ratio  mismatches   products [M]   attention [M]")
    for length in options.lengths:
        found = cost(policy, size, length, options.plain, options.repeats)
        line = (
            f"{found.length:6} {found.plain_ms:12.4g} {found.our_ms:11.4g} {found.ratio:7.2f} {found.mismatches:11} "
            f"{found.products:14.4g} {found.attention:15.4g}"
        )
        print(json.dumps(asdict(found)) if options.json else line, flush=True)
    for tokens in (256, 2048) if options.family == "llada2" else ():
        timing = expert_timing(policy, tokens, options.repeats)
        found = {"tokens": tokens, **asdict(timing)}
        line = (
            f"one mixture, forward and backward of {tokens} tokens: plain {1e3 * timing.plain_seconds:.4g} ms, "
            f"ours {1e3 * timing.our_seconds:.4g} ms, ratio {timing.ratio:.2f}"
        )
        print(json.dumps(found) if options.json else line, flush=True)


if __name__ == "__main__":
    main()
