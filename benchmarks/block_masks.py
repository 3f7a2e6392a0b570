"""Times attention in rows `[clean ; noisy ; noisy ...]` under a dense mask, as the models use it, and FlexAttention.

    python -m benchmarks.block_masks

FlexAttention is compiled, and leaves out blocks of its own in which nothing is attended to. It has no backward pass on
a processor. The two alternate, after one untimed run of each; ratios are those of medians, flex / dense.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benchmarks.options import at_least_three
from benchmarks.samplers import Timing, interleaved
from dmpo_lightning.models.layers import additive, block_causal_mask
from dmpo_lightning.policy.rows import clean_and_noisy


@dataclass(frozen=True)
class Size:
    """The rows of a micro-batch, and one layer's heads."""

    rows: int = 2
    prompt_length: int = 200
    completion_length: int = 256
    copies: int = 4
    block_size: int = 4
    heads: int = 8
    key_heads: int = 2
    head_size: int = 128


@dataclass(frozen=True)
class Layer:
    """One layer's states ``[rows heads total head_size]``, and who attends to whom in both forms."""

    query: Tensor
    key: Tensor
    value: Tensor
    allowed: Bool[Tensor, "rows total total"]
    mask: Float[Tensor, "rows 1 total total"]
    """What is added to the scores, which the models make once for all of their layers."""
    blocks: BlockMask
    kernel: Callable[..., Tensor]
    """FlexAttention, compiled or not."""

    @classmethod
    def random(cls, size: Size, device: torch.device, dtype: torch.dtype, kernel: Callable[..., Tensor]) -> "Layer":
        allowed = rows_mask(size, device)
        total = allowed.shape[1]
        generator = torch.Generator(device).manual_seed(0)
        shapes = [(size.rows, heads, total, size.head_size) for heads in (size.heads, size.key_heads, size.key_heads)]
        states = [torch.randn(shape, device=device, dtype=dtype, generator=generator) for shape in shapes]
        mask = additive(allowed[:, None], states[0])
        assert mask is not None
        blocks = create_block_mask(
            lambda row, head, query, key: allowed[row, query, key], size.rows, None, total, total, device=str(device)
        )
        return cls(*states, allowed, mask, blocks, kernel)

    def dense(self) -> Tensor:
        """As the models compute it."""
        return F.scaled_dot_product_attention(self.query, self.key, self.value, attn_mask=self.mask, enable_gqa=True)

    def flex(self) -> Tensor:
        """The same by a kernel compiled for this mask."""
        return self.kernel(self.query, self.key, self.value, block_mask=self.blocks, enable_gqa=True)

    def with_gradients(self, attend: Callable[[], Tensor]) -> Tensor:
        """Attends, and returns the gradient of the queries."""
        states = self.query, self.key, self.value
        for each in states:
            each.requires_grad_().grad = None
        # Padding attends to nothing. What comes out there is no number in one form and zero in the other.
        output = attend().masked_fill(~self.allowed.any(-1)[:, None, :, None], 0.0)
        return torch.autograd.grad(output.float().square().sum(), states)[0]


def rows_mask(size: Size, device: torch.device) -> Bool[Tensor, "rows total total"]:
    """Who attends to whom in rows whose prompts are padded by 0, 1, 2 ... tokens."""
    prompts = torch.zeros(size.rows, size.prompt_length, dtype=torch.long, device=device)
    attended = torch.arange(size.prompt_length, device=device) >= torch.arange(size.rows, device=device)[:, None]
    completions = prompts.new_zeros(size.rows, size.completion_length)
    noisy = completions[:, None].expand(-1, size.copies, -1)
    nowhere = torch.zeros_like(noisy, dtype=torch.bool)
    rows = clean_and_noisy(prompts, attended, completions, noisy, nowhere, size.block_size)
    # The model takes away what the rule of blocks does, on top of what these rows do.
    return block_causal_mask(rows.position_ids, rows.attention_mask, size.block_size).squeeze(1)


def compare(
    size: Size,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
    kernel: Callable[..., Tensor] | None = None,
) -> dict[str, Timing]:
    """FlexAttention (``plain_seconds``) beside the dense mask (ours): forward, and backward where both have it.

    ``kernel`` is compiled FlexAttention by default.
    """
    layer = Layer.random(size, device, dtype, torch.compile(flex_attention) if kernel is None else kernel)

    def forward(attend: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad():
            return attend()

    ways = {"forward": forward} | ({} if device.type == "cpu" else {"forward and backward": layer.with_gradients})
    return {
        name: interleaved(
            partial(_waited, way, layer.flex), partial(_waited, way, layer.dense), repeats=repeats, compare=False
        )
        for name, way in ways.items()
    }


def _waited(way: Callable[[Callable[[], Tensor]], Tensor], attend: Callable[[], Tensor]) -> Tensor:
    """The result, once the device has it."""
    result = way(attend)
    if result.is_cuda:
        torch.cuda.synchronize()
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.block_masks", description=__doc__.partition("\n")[0])
    parser.add_argument("--copies", nargs="+", type=int, default=[1, 4])
    parser.add_argument("--rows", type=int, default=Size.rows)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=at_least_three, default=9)
    options = parser.parse_args(arguments)
    print("copies  what                    flex [ms]     dense [ms]   ratio")
    for copies in options.copies:
        size = Size(rows=options.rows, copies=copies)
        for name, timing in compare(size, options.device, getattr(torch, options.dtype), options.repeats).items():
            flex, dense = 1e3 * timing.plain_seconds, 1e3 * timing.our_seconds
            print(f"{copies:6}  {name:22} {flex:10.4g} {dense:14.4g} {timing.ratio:7.2f}", flush=True)


if __name__ == "__main__":
    main()
