"""Decoding of block-causal models: block after block, with keys and values of finished blocks kept exactly."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dmpo_lightning.models.kv_cache import KeyValueCache
from dmpo_lightning.samplers.base import Sampler, Samples, reveal_counts
from dmpo_lightning.samplers.canvas import Canvas
from dmpo_lightning.samplers.draws import Draw


@dataclass(frozen=True)
class Step:
    """What a step within a block chooses from."""

    canvas: Canvas
    positions: Int[Tensor, "rows block"]
    """The position of each column of the block, or the nearest one in the completion."""
    masked: Bool[Tensor, "rows block"]
    number: int
    """The number that keys draws. It counts from block number times block size, whatever other rows do."""
    count: int
    """How many positions this step reveals by a static schedule, as far as a row has as many."""


Choice = Callable[[Draw, Step], Bool[Tensor, "rows block"]]
"""Says which of a block's masked candidates a step reveals: at least one in every row that has any."""


EDITING_STEPS = 16
"""How many steps a row may go on writing a block's tokens anew once all are revealed, as published for LLaDA2.1."""


def decode_blocks(
    sampler: Sampler, canvas: Canvas, choose: Choice, *, editing_threshold: float | None = None
) -> Samples:
    """Samples completions in the model's own blocks, of which the first may begin with the end of the prompt.

    A row is over with the block of its first end token. The rest becomes end tokens without being computed.

    With an ``editing_threshold`` each step also writes revealed tokens of the block anew for which another one is drawn
    with more than that probability. A row has done with a block in which all is revealed and a step changes nothing.
    What is recorded of a token is of its last write.
    """
    decoding = Decoding(sampler, canvas, choose, editing_threshold)
    # One forward for each time that the other ranks are asked, whatever this one still has to do.
    while canvas.policy.anywhere(decoding.is_working):
        if decoding.is_working:
            decoding.step()
        else:
            canvas.idle()
    decoding.write_back()
    return canvas.samples()


class Decoding:
    """The state of `decode_blocks`: which rows still go on, and the block and step that they are at."""

    def __init__(self, sampler: Sampler, whole: Canvas, choose: Choice, editing_threshold: float | None) -> None:
        self.sampler, self.whole, self.choose, self.editing_threshold = sampler, whole, choose, editing_threshold
        assert whole.policy.block_size is not None
        self.size = whole.policy.block_size
        self.counts = counts_per_block(sampler.denoising_steps, whole.length, self.size)
        self.canvas, self.going = whole, torch.arange(len(whole.ids), device=whole.ids.device)
        self.number = self.within = 0
        # The number by which draws are keyed leaves room for one token per step, and for editing.
        self.stride = self.size if editing_threshold is None else self.size + EDITING_STEPS
        self.edited_steps = torch.zeros_like(self.going)
        """How many steps of this block each row has made since its last mask."""
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
        canvas, block, number = self.canvas, self.block, self.number * self.stride + self.within
        # Behind the scheduled steps there are only those of editing.
        scheduled = min(self.within, len(self.counts) - 1)
        positions = canvas.positions(block)
        nearest = positions.clamp(0, canvas.length - 1)
        step = Step(canvas, nearest, canvas.masked(block), number, self.counts[scheduled])
        draw = canvas.draw(self._logits(positions), nearest, number, self.sampler)
        chosen = self.choose(draw, step) & step.masked
        goes_on = (step.masked & ~chosen).any(1)
        if self.editing_threshold is not None:
            chosen |= self._edits(draw, step, positions)
            goes_on = self.edited_steps < EDITING_STEPS
        canvas.reveal_where(block, chosen, draw, number, done=self.number * len(self.counts) + scheduled)
        self.within += 1
        if not bool(goes_on.any()):
            self._end_block()

    def _edits(self, draw: Draw, step: Step, positions: Int[Tensor, "rows block"]) -> Bool[Tensor, "rows block"]:
        """Which revealed tokens of the block are written anew. A row without any is done with the block."""
        assert self.editing_threshold is not None
        may_edit = (positions == step.positions) & ~step.masked & (self.edited_steps < EDITING_STEPS)[:, None]
        is_other = draw.tokens != self.canvas.ids[:, self.block]
        edited = may_edit & is_other & (draw.confidence > self.editing_threshold)
        is_full = ~step.masked.any(1)
        self.edited_steps += torch.where(is_full & ~edited.any(1), EDITING_STEPS, is_full)
        return edited

    def _logits(self, positions: Int[Tensor, "rows block"]) -> Float[Tensor, "rows block vocab"]:
        """The first step of a block also computes the block before, whose last tokens are not in the cache yet."""
        canvas, columns = self.canvas, range(self.kept, self.block.stop)
        # What is computed now, up to this block, is finished.
        self.kept = self.block.start
        if self.cache is not None:
            return canvas.logits(positions, cache=self.cache, columns=columns)
        # The prompts come with the first block. Runs of equal ones are computed once: all that follows them is blank.
        runs = canvas.prompt_runs
        if runs is not None:
            canvas, positions = canvas.rows(runs.first), positions[runs.first]
        self.cache = KeyValueCache(canvas.attention_mask, is_padded=canvas.is_padded, grows=True)
        logits = canvas.logits(positions, cache=self.cache, columns=columns)
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
        rest = self.canvas.end_rows(self.block.stop)
        self.number, self.within = self.number + 1, 0
        self.edited_steps = torch.zeros_like(rest)
        if len(rest) < len(self.going):
            self.write_back()
            self.going, self.canvas = self.going[rest], self.canvas.rows(rest)
            assert self.cache is not None
            self.cache.select(rest)


def counts_per_block(denoising_steps: int | None, completion_length: int, block_size: int) -> list[int]:
    """How many positions each step of a whole block reveals, if a completion takes ``denoising_steps``. A block that
    the prompt begins, or that the completion's end cuts short, is done in fewer.

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
