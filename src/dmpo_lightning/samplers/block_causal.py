"""Decoding of block-causal models: block after block, with keys and values of finished blocks kept exactly."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dmpo_lightning.models.kv_cache import KeyValueCache
from dmpo_lightning.policy import Policy
from dmpo_lightning.samplers.base import Samples, reveal_counts
from dmpo_lightning.samplers.canvas import PromptRuns, prompt_facts
from dmpo_lightning.samplers.draws import Draw, draw_at


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

    temperature: float
    denoising_steps: int | None

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


@dataclass
class BlockCanvas:
    """Prompts with their growing completions, moved so that the blocks of all rows stand in the same columns.

    Columns are those of the longest prompt's whole blocks, then the rest of the prompts with the completions. Prompts
    that are shorter by whole blocks are padded on the left by them.
    """

    policy: Policy
    keys: Int[Tensor, " rows"]
    ids: Int[Tensor, "rows columns"]
    attention_mask: Bool[Tensor, "rows columns"]
    offset: Int[Tensor, " rows"]
    """How many tokens of each prompt stand in the same block as its completion's first."""
    start: int
    """The column where that block begins, in every row."""
    length: int
    """The number of tokens of a completion."""
    reveal_step: Int[Tensor, "rows columns"]
    log_prob: Float[Tensor, "rows columns"]
    prompt_runs: PromptRuns | None
    is_padded: bool

    @classmethod
    def of(
        cls,
        policy: Policy,
        prompt_ids: Int[Tensor, "rows prompt"],
        prompt_mask: Bool[Tensor, "rows prompt"],
        length: int,
        keys: Int[Tensor, " rows"],
    ) -> "BlockCanvas":
        """The prompts followed by completions of mask tokens."""
        assert policy.block_size is not None
        runs, _ = prompt_facts(prompt_ids, prompt_mask)
        lengths = prompt_mask.sum(1)
        offset = lengths % policy.block_size
        whole = lengths - offset
        start, most = int(whole.max()), int(offset.max())
        columns = torch.arange(start + most + length, device=keys.device)
        ends = (start + offset)[:, None]
        # The column from which a prompt's token comes. Columns of the completion get mask tokens instead.
        source = (columns - ends + prompt_ids.shape[1]).clamp(0, prompt_ids.shape[1] - 1)
        ids = torch.where(columns < ends, prompt_ids.gather(1, source), policy.facts.mask_token_id)
        attended = (columns >= (start - whole)[:, None]) & (columns < ends + length)
        return cls(
            policy,
            keys,
            ids,
            attended,
            offset,
            start,
            length,
            torch.full_like(ids, -1),
            torch.zeros_like(ids, dtype=torch.float32),
            runs,
            not bool(attended.all()),
        )

    def rows(self, index: Int[Tensor, " selected"]) -> "BlockCanvas":
        """A copy of some rows, which can be worked on alone."""
        parts = self.keys, self.ids, self.attention_mask, self.offset
        keys, ids, mask, offset = (part[index] for part in parts)
        step, log_prob = self.reveal_step[index], self.log_prob[index]
        return BlockCanvas(
            self.policy, keys, ids, mask, offset, self.start, self.length, step, log_prob, None, self.is_padded
        )

    def put_rows(self, index: Int[Tensor, " selected"], part: "BlockCanvas") -> None:
        """Writes a copy that `rows` made back into the same rows."""
        self.ids[index], self.reveal_step[index], self.log_prob[index] = part.ids, part.reveal_step, part.log_prob

    def blank(self, block: slice) -> Bool[Tensor, "rows block"]:
        """Where the completion's columns of a block are not revealed yet."""
        places = torch.arange(block.start, block.stop, device=self.ids.device) - self.start - self.offset[:, None]
        return (places >= 0) & (places < self.length) & (self.reveal_step[:, block] < 0)

    def places(self, block: slice) -> Int[Tensor, "rows block"]:
        """The place of each column of a block in its row's completion, or the nearest one."""
        columns = torch.arange(block.start, block.stop, device=self.ids.device)
        return (columns - self.start - self.offset[:, None]).clamp(0, self.length - 1)

    def logits(self, block: slice, cache: KeyValueCache, first: int) -> Float[Tensor, "rows block vocab"]:
        """Logits of a block. All columns from ``first`` on are computed and written to the cache."""
        rows = torch.arange(len(self.ids), device=self.ids.device)[:, None]
        positions = rows * self.ids.shape[1] + torch.arange(block.start, block.stop, device=self.ids.device)
        return self.policy.logits(self.ids, None, positions, cache=cache, columns=range(first, block.stop))

    def idle(self) -> None:
        """A forward for nothing: other ranks go on, and theirs gather weights from this rank too."""
        self.policy.logits(self.ids[:1], self.attention_mask[:1], torch.zeros_like(self.ids[:1, :1]))

    def samples(self) -> Samples:
        """The completions, each from where its own row has it."""
        columns = self.start + self.offset[:, None] + torch.arange(self.length, device=self.ids.device)
        parts = (self.ids, self.reveal_step, self.log_prob)
        ids, step, log_prob = (part.gather(1, columns) for part in parts)
        return Samples(ids, step, log_prob)


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
        temperature = self.sampler.temperature
        draw = draw_at(self._logits(), step.keys, number, step.length, step.places, temperature=temperature)
        chosen = self.sampler.choose(draw, step) & step.masked
        for target, value in (
            (canvas.ids, draw.tokens),
            (canvas.reveal_step, torch.full_like(draw.tokens, number)),
            (canvas.log_prob, draw.log_prob),
        ):
            # Written as a choice over the whole block: picking places out would wait for the device to count them.
            target[:, block] = torch.where(chosen, value, target[:, block])
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
