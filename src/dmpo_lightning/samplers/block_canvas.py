"""The canvas of block-causal models: rows moved so that the model's blocks stand in the same columns."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from dmpo_lightning.models.kv_cache import KeyValueCache
from dmpo_lightning.policy import Policy
from dmpo_lightning.samplers.base import Samples
from dmpo_lightning.samplers.canvas import Change, Observer, PromptRuns, prompt_facts, watched


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
    observer: Observer | None = None
    numbers: Int[Tensor, " rows"] | None = None
    """Of these rows among all that the observer is shown. None where nobody watches."""

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
            *watched(keys),
        )

    def rows(self, index: Int[Tensor, " selected"]) -> "BlockCanvas":
        """A copy of some rows, which can be worked on alone."""
        parts = self.keys, self.ids, self.attention_mask, self.offset
        keys, ids, mask, offset = (part[index] for part in parts)
        step, log_prob = self.reveal_step[index], self.log_prob[index]
        part = BlockCanvas(
            self.policy, keys, ids, mask, offset, self.start, self.length, step, log_prob, None, self.is_padded
        )
        if self.numbers is not None:
            part.observer, part.numbers = self.observer, self.numbers[index]
        return part

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
        return Samples(*(self._completions(part) for part in (self.ids, self.reveal_step, self.log_prob)))

    def show(
        self,
        block: slice,
        chosen: Bool[Tensor, "rows block"],
        confidence: Float[Tensor, "rows block"] | None = None,
    ) -> None:
        """Shows the observer, if there is one, what was just written to the ``chosen`` columns of a block."""
        if self.observer is None:
            return
        assert self.numbers is not None
        written = torch.zeros_like(self.ids, dtype=torch.bool)
        written[:, block] = chosen
        whole = torch.full_like(self.log_prob, torch.nan)
        if confidence is not None:
            whole[:, block] = confidence.float().masked_fill(~chosen, torch.nan)
        change = Change(self.numbers, *(self._completions(part) for part in (self.ids, written, whole)))
        # Columns behind a row's completion may be written too, which is nothing to see.
        if bool(change.written.any()):
            self.observer(change)

    def _completions(self, values: Shaped[Tensor, "rows columns"]) -> Shaped[Tensor, "rows length"]:
        """Each row's values at the columns of its completion."""
        columns = self.start + self.offset[:, None] + torch.arange(self.length, device=self.ids.device)
        return values.gather(1, columns)
