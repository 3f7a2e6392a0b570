"""Decoding of block-causal models: block after block, with keys and values of finished blocks kept exactly."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dmpo_lightning.models.kv_cache import KeyValueCache
from dmpo_lightning.policy import Policy
from dmpo_lightning.samplers.base import Samples, reveal_counts
from dmpo_lightning.samplers.block_canvas import BlockCanvas
from dmpo_lightning.samplers.draws import Draw, DrawOptions, draw_at


@dataclass(frozen=True)
class Step:
    """What a step within a block chooses from."""

    keys: Int[Tensor, " rows"]
    places: Int[Tensor, "rows block"]
    """The place in its completion of each column of the block, where it has one."""
    masked: Bool[Tensor, "rows block"]
    length: int
    """The number of tokens of a completion."""
    number: int
    """Of the step. It counts from block number times block size, so that no completion depends on others."""
    count: int
    """How many places this step reveals by a static schedule, as far as a row has as many."""


@runtime_checkable
class BlockSampler(Protocol):
    """What `decode_blocks` asks of a sampler."""

    denoising_steps: int | None

    @property
    def draw_options(self) -> DrawOptions:
        """From which distribution tokens are drawn."""

    def choose(self, draw: Draw, step: Step) -> Bool[Tensor, "rows block"]:
        """Which of a block's masked candidates a step reveals: at least one in every row that has any."""


def decode_blocks(
    sampler: BlockSampler,
    policy: Policy,
    prompt_ids: Int[Tensor, "rows prompt"],
    prompt_mask: Bool[Tensor, "rows prompt"],
    *,
    completion_length: int,
    keys: Int[Tensor, " rows"],
) -> Samples:
    """Samples completions in the model's own blocks, of which the first may begin with the end of the prompt.

    A row is over with the block of its first end token. The rest becomes end tokens without being computed.
    """
    canvas = BlockCanvas.of(policy, prompt_ids, prompt_mask, completion_length, keys)
    decoding = Decoding(canvas, sampler)
    # One forward for each time that the other ranks are asked, whatever this one still has to do.
    while policy.anywhere(decoding.is_working):
        if decoding.is_working:
            decoding.step()
        else:
            canvas.idle()
    decoding.write_back()
    return canvas.samples()


class Decoding:
    """The state of `decode_blocks`: which rows still go on, and the block and step that they are at."""

    def __init__(self, whole: BlockCanvas, sampler: BlockSampler) -> None:
        self.whole, self.sampler = whole, sampler
        assert whole.policy.block_size is not None
        self.size = whole.policy.block_size
        self.counts = counts_per_block(sampler.denoising_steps, whole.length, self.size)
        self.canvas, self.going = whole, torch.arange(len(whole.ids), device=whole.ids.device)
        self.number = self.within = 0
        self.cache: KeyValueCache | None = None
        self.kept = 0
        """Columns below this number are in the cache as they are when finished."""

    @property
    def block(self) -> slice:
        """The columns of the current block. The last one may be cut short by the end of the completions."""
        start = self.canvas.start + self.number * self.size
        return slice(start, min(start + self.size, self.canvas.ids.shape[1]))

    @property
    def is_working(self) -> bool:
        """Whether any row has a block left."""
        return len(self.going) > 0 and self.block.start < self.canvas.ids.shape[1]

    def step(self) -> None:
        """One forward, and what it reveals. The block's last step ends the block as well."""
        canvas, block, number = self.canvas, self.block, self.number * self.size + self.within
        step = Step(
            canvas.keys, canvas.places(block), canvas.blank(block), canvas.length, number, self.counts[self.within]
        )
        options = self.sampler.draw_options
        draw = draw_at(self._logits(), step.keys, number, step.length, step.places, options=options)
        chosen = self.sampler.choose(draw, step) & step.masked
        for target, value in (
            (canvas.ids, draw.tokens),
            (canvas.reveal_step, torch.full_like(draw.tokens, number)),
            (canvas.log_prob, draw.log_prob),
        ):
            # Written as a choice over the whole block: picking places out would wait for the device to count them.
            target[:, block] = torch.where(chosen, value, target[:, block])
        canvas.show(block, chosen, draw.confidence)
        # Not the number by which draws are keyed, which leaves room for one token per step.
        canvas.policy.note_step(self.number * len(self.counts) + self.within)
        self.within += 1
        if not bool((step.masked & ~chosen).any()):
            self._end_block()

    def _logits(self) -> Float[Tensor, "rows block vocab"]:
        """The first step of a block also computes the block before, whose last tokens are not in the cache yet."""
        canvas, block, first = self.canvas, self.block, self.kept
        # What is computed now, up to this block, is finished.
        self.kept = block.start
        if self.cache is not None:
            return canvas.logits(block, self.cache, first)
        # The prompts come with the first block. Runs of equal ones are computed once: all that follows them is blank.
        runs = canvas.prompt_runs
        computed = canvas if runs is None else canvas.rows(runs.first)
        self.cache = KeyValueCache(computed.attention_mask, is_padded=canvas.is_padded, grows=True)
        logits = computed.logits(block, self.cache, first)
        if runs is None:
            return logits
        self.cache.select(runs.of_row)
        return logits[runs.of_row]

    def write_back(self) -> None:
        """Writes rows that are worked on alone back to the whole."""
        if self.canvas is not self.whole:
            self.whole.put_rows(self.going, self.canvas)

    def _end_block(self) -> None:
        """Goes on to the next block with the rows that have no end token yet."""
        canvas, block = self.canvas, self.block
        self.number, self.within = self.number + 1, 0
        ends = torch.tensor(canvas.policy.facts.end_token_ids, device=canvas.ids.device)
        # The prompt may hold end tokens too, by which it closes a turn. Those were revealed by no step.
        over = ((canvas.reveal_step[:, block] >= 0) & torch.isin(canvas.ids[:, block], ends)).any(1)
        rest = (~over).nonzero().squeeze(1)
        if len(rest) == len(over):
            return
        behind = canvas.ids[:, block.stop :]
        behind.copy_(torch.where(over[:, None], ends[:1], behind))
        canvas.show(slice(block.stop, canvas.ids.shape[1]), over[:, None].expand(behind.shape))
        self.write_back()
        self.going, self.canvas = self.going[rest], canvas.rows(rest)
        assert self.cache is not None
        self.cache.select(rest)


def check_own_blocks(sampler: object, policy: Policy, block_length: int | None, *, approximate: bool = False) -> None:
    """Raises ValueError where a sampler is to decode a block-causal model in blocks that are not the model's.

    ``approximate`` says that it has options by which a bidirectional model is told to see less, or is guided.
    """
    if policy.block_size is None:
        return
    if approximate:
        raise ValueError(
            f"`cache`, `suffix_window` and `guidance` must be left out with {type(policy.model).__name__}: it sees "
            "nothing behind a block, and finished blocks are kept exactly anyway."
        )
    if block_length not in (None, policy.block_size):
        raise ValueError(
            f"`block_length` of {type(sampler).__name__} must be null or {policy.block_size} with "
            f"{type(policy.model).__name__}, whose blocks are its own, got {block_length}."
        )


def counts_per_block(denoising_steps: int | None, completion_length: int, block_size: int) -> list[int]:
    """How many places each step of a whole block reveals, if a completion takes ``denoising_steps``. A block that the
    prompt begins, or that the completion's end cuts short, is done in fewer.

    Raises:
        ValueError: blocks would not all take the same number of steps, at least one and at most one per token.
    """
    if denoising_steps is None:
        return [1] * block_size
    steps, rest = divmod(denoising_steps * block_size, completion_length)
    if rest or not 1 <= steps <= block_size:
        raise ValueError(
            f"`denoising_steps` must be a multiple of `completion_length` / {block_size} (the model's blocks) and at "
            f"most `completion_length`, got {denoising_steps} and {completion_length}; use null for one token per step."
        )
    return reveal_counts(block_size, steps)
