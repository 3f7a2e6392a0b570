"""The partly unmasked sequences on which one call to `Sampler.sample` works, and how to watch them grow."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from dmpo_lightning.models.kv_cache import KeyValueCache
from dmpo_lightning.policy import Policy
from dmpo_lightning.samplers.base import Sampler, Samples
from dmpo_lightning.samplers.draws import Confidence, Draw, draw_tokens, step_uniforms


@dataclass(frozen=True)
class PromptRuns:
    """Rows whose prompts are those of the row before."""

    first: Int[Tensor, " runs"]
    """The first row of each run of equal prompts."""
    of_row: Int[Tensor, " rows"]
    """The number of each row's run."""


def prompt_facts(
    prompt_ids: Int[Tensor, "rows prompt"], prompt_mask: Bool[Tensor, "rows prompt"]
) -> tuple[PromptRuns | None, bool]:
    """The runs of equal prompts, None if every row is a run, and whether any prompt is padded."""
    # Neighbours are compared, since the rollouts of one prompt stand in neighbouring rows: no sorting, no hashing.
    changes = torch.stack([(part[1:] != part[:-1]).any(1) for part in (prompt_ids, prompt_mask)]).any(0)
    # Both facts come to the host together, which waits for the device only once.
    *changed, is_padded = torch.cat((changes, ~prompt_mask.all()[None])).tolist()
    if all(changed):
        return None, is_padded
    first = [0, *(row for row, differs in enumerate(changed, 1) if differs)]
    of_row = torch.nn.functional.pad(changes, (1, 0)).cumsum(0)
    return PromptRuns(torch.tensor(first, device=prompt_ids.device), of_row), is_padded


@dataclass(frozen=True)
class Change:
    """What was written to some completions at once. The tensors are to be read and not kept."""

    rows: Int[Tensor, " rows"]
    """The numbers of these completions, counted from 0 over all calls to `Sampler.sample` inside `observed`."""
    completion_ids: Int[Tensor, "rows length"]
    """The completions as they are now. Mask tokens stand where nothing has been revealed."""
    written: Bool[Tensor, "rows length"]
    confidence: Float[Tensor, "rows length"]
    """The `Confidence` of what was written. NaN where nothing was, or where it was not drawn."""


Observer = Callable[[Change], None]


@dataclass
class _Watch:
    observer: Observer
    begun: int = 0
    """How many completions were begun while it watched."""


_watch: ContextVar[_Watch | None] = ContextVar("watch", default=None)


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Inside, the observer is shown each change of every canvas that a sampler of this thread begins.

    It is no argument of `Sampler.sample`, so that samplers of one's own can be watched without knowing of it, and
    nothing is computed where nobody watches.
    """
    token = _watch.set(_Watch(observer))
    try:
        yield
    finally:
        _watch.reset(token)


@dataclass
class Canvas:
    """Prompts with their growing completions.

    A *column* counts from the first one of the canvas, and a *position* from the first token of a row's completion. In
    the rows of a bidirectional model all completions begin at the same column. Rows of a block-causal model are moved,
    so that the model's blocks stand in the same columns: a prompt that ends within a block ends behind others.
    """

    policy: Policy
    keys: Int[Tensor, " rows"]
    ids: Int[Tensor, "rows columns"]
    attention_mask: Bool[Tensor, "rows columns"]
    is_padded: bool
    """Whether any row is. Without padding attention gets no mask, which its fastest kernels do not take."""
    first: Int[Tensor, " rows"]
    """The column of each completion's first token."""
    start: int
    """The column where the block of the completions' first tokens begins, in every row."""
    length: int
    """The number of tokens of a completion."""
    reveal_step: Int[Tensor, "rows columns"]
    """The denoising step that revealed each column, -1 where none has."""
    log_prob: Float[Tensor, "rows columns"]
    numbers: Int[Tensor, " rows"]
    """The numbers of these rows among all that an observer is shown."""
    observer: Observer | None
    prompt_runs: PromptRuns | None
    """The runs of a blank canvas whose neighbouring rows have prompts in common."""

    @classmethod
    def blank(
        cls,
        policy: Policy,
        prompt_ids: Int[Tensor, "rows prompt"],
        prompt_mask: Bool[Tensor, "rows prompt"],
        length: int,
        keys: Int[Tensor, " rows"],
    ) -> "Canvas":
        """The prompts followed by completions of ``length`` mask tokens."""
        runs, is_padded = prompt_facts(prompt_ids, prompt_mask)
        if policy.block_size is None:
            start = prompt_ids.shape[1]
            first = torch.full_like(keys, start)
            ids = torch.nn.functional.pad(prompt_ids, (0, length), value=policy.facts.mask_token_id)
            attended = torch.nn.functional.pad(prompt_mask.bool(), (0, length), value=True)
        else:
            ids, attended, first, start = _aligned(policy, prompt_ids, prompt_mask, length, policy.block_size)
            is_padded = not bool(attended.all())
        watch, begun = _watch.get(), 0
        if watch is not None:
            begun, watch.begun = watch.begun, watch.begun + len(keys)
        return cls(
            policy,
            keys,
            ids,
            attended,
            is_padded,
            first,
            start,
            length,
            reveal_step=torch.full_like(ids, -1),
            log_prob=torch.zeros_like(ids, dtype=torch.float32),
            numbers=torch.arange(begun, begun + len(keys), device=keys.device),
            observer=None if watch is None else watch.observer,
            prompt_runs=runs,
        )

    def rows(self, index: Int[Tensor, " selected"], *, shown: bool = True) -> "Canvas":
        """A copy of some rows, which can be worked on alone. An observer sees what happens to it if it is ``shown``."""
        names = "keys", "ids", "attention_mask", "first", "reveal_step", "log_prob", "numbers"
        parts = {name: getattr(self, name)[index] for name in names}
        return replace(self, prompt_runs=None, observer=self.observer if shown else None, **parts)

    def put_rows(self, index: Int[Tensor, " selected"], part: "Canvas") -> None:
        """Writes a copy that `rows` made back into the same rows."""
        self.ids[index], self.reveal_step[index], self.log_prob[index] = part.ids, part.reveal_step, part.log_prob

    @property
    def whole(self) -> slice:
        """The columns of all completions."""
        return slice(self.start, self.ids.shape[1])

    def positions(self, block: slice) -> Int[Tensor, "rows block"]:
        """The position of each column of a block. It lies outside of the completion where the column does."""
        return torch.arange(block.start, block.stop, device=self.ids.device) - self.first[:, None]

    def masked(self, block: slice) -> Bool[Tensor, "rows block"]:
        """Where the completions' columns of a block are not revealed yet."""
        positions = self.positions(block)
        return (positions >= 0) & (positions < self.length) & (self.reveal_step[:, block] < 0)

    def logits(
        self,
        positions: Int[Tensor, "*at"],
        rows: Int[Tensor, "*at"] | None = None,
        *,
        cache: KeyValueCache | None = None,
        columns: range | None = None,
    ) -> Float[Tensor, "*at vocab"]:
        """Logits at positions ``[rows positions]`` of every row, or at pairs of ``rows`` and positions of any shape.

        With a ``cache`` only ``columns`` are computed, and the others are as they were when they were computed last.
        """
        if rows is None:
            rows = torch.arange(len(self.ids), device=self.ids.device)[:, None]
        flat = rows * self.ids.shape[1] + self.first[rows] + positions
        # A cache knows the padding of all columns.
        mask = self.attention_mask if self.is_padded and cache is None else None
        return self.policy.logits(self.ids, mask, flat, cache=cache, columns=columns)

    def draw(
        self,
        logits: Float[Tensor, "*at vocab"],
        positions: Int[Tensor, "*at"],
        step: int,
        sampler: Sampler,
        rows: Int[Tensor, "*at"] | None = None,
    ) -> Draw:
        """Draws a token at each of the positions that `logits` was asked for, from the uniforms of this step.

        Options are those of the ``sampler``. What it leaves open is as in the published decoding of the model's family.
        """
        uniform = step_uniforms(self.keys, step, self.length)
        uniform = uniform.gather(1, positions) if rows is None else uniform[rows, positions]
        # SDAR, TraDo's JetEngine and Dream rank tokens by the probability that they were drawn with, LLaDA does not.
        has_blocks = self.policy.block_size is not None
        is_dream = self.policy.lookback > 0 and not has_blocks
        published: Confidence = "drawn" if is_dream or has_blocks else "model"
        options = {name: getattr(sampler, name) for name in ("temperature", "top_k", "top_p")}
        return draw_tokens(logits, uniform, top_p_first=is_dream, confidence=sampler.confidence or published, **options)

    def reveal(self, positions: Int[Tensor, "rows positions"], draw: Draw, step: int) -> None:
        """Writes tokens that were drawn for some positions of every row, and says that the step is done."""
        columns = positions + self.first[:, None]
        self.ids.scatter_(1, columns, draw.tokens)
        self.reveal_step.scatter_(1, columns, step)
        self.log_prob.scatter_(1, columns, draw.log_prob)
        if self.observer is not None:
            written = torch.zeros_like(self.ids, dtype=torch.bool).scatter_(1, columns, True)
            confidence = torch.full_like(self.log_prob, torch.nan).scatter_(1, columns, draw.confidence.float())
            self._show(written, confidence)
        self.policy.note_step(step)

    def reveal_where(
        self, block: slice, chosen: Bool[Tensor, "rows block"], draw: Draw, step: int, *, done: int | None = None
    ) -> None:
        """Writes the ``chosen`` ones of the tokens that were drawn for all columns of a block.

        It says that the step is done. Where steps are numbered with gaps, ``done`` is how many came before.
        """
        # Written as a choice over the whole block: picking columns out would wait for the device to count them.
        for target, value in (
            (self.ids[:, block], draw.tokens),
            (self.reveal_step[:, block], torch.full_like(draw.tokens, step)),
            (self.log_prob[:, block], draw.log_prob),
        ):
            target.copy_(torch.where(chosen, value, target))
        if self.observer is not None:
            self._show_block(block, chosen, draw.confidence.float())
        self.policy.note_step(step if done is None else done)

    def mask_where(self, block: slice, chosen: Bool[Tensor, "rows block"]) -> None:
        """Masks the ``chosen`` columns of a block again."""
        self.ids[:, block].masked_fill_(chosen, self.policy.facts.mask_token_id)
        self.reveal_step[:, block].masked_fill_(chosen, -1)
        if self.observer is not None:
            self._show_block(block, chosen)

    def end_rows(self, column: int) -> Int[Tensor, " going"]:
        """Fills rows that revealed an end token before this column with end tokens from there on.

        Returns the numbers of the rows that go on.
        """
        ends = torch.tensor(self.policy.facts.end_token_ids, device=self.ids.device)
        # A prompt may hold end tokens too, by which it closes a turn. Those were revealed by no step.
        over = ((self.reveal_step[:, :column] >= 0) & torch.isin(self.ids[:, :column], ends)).any(1)
        going = (~over).nonzero().squeeze(1)
        # There may be no end tokens at all to fill rows with.
        if len(going) == len(over):
            return going
        behind = slice(column, self.ids.shape[1])
        self.ids[:, behind] = torch.where(over[:, None], ends[:1], self.ids[:, behind])
        if self.observer is not None:
            self._show_block(behind, over[:, None].expand_as(self.ids[:, behind]))
        return going

    def idle(self) -> None:
        """A forward for nothing: other ranks go on, and theirs gather weights from this rank too."""
        self.policy.logits(self.ids[:1], self.attention_mask[:1], torch.zeros_like(self.ids[:1, :1]))

    def samples(self) -> Samples:
        """The completions as they are now."""
        return Samples(*(self._completions(part) for part in (self.ids, self.reveal_step, self.log_prob)))

    def _completions(self, values: Shaped[Tensor, "rows columns"]) -> Shaped[Tensor, "rows length"]:
        """Each row's values at the columns of its completion."""
        return values.gather(1, self.first[:, None] + torch.arange(self.length, device=self.ids.device))

    def _show_block(
        self, block: slice, chosen: Bool[Tensor, "rows block"], confidence: Float[Tensor, "rows block"] | None = None
    ) -> None:
        written = torch.zeros_like(self.ids, dtype=torch.bool)
        written[:, block] = chosen
        whole = torch.full_like(self.log_prob, torch.nan)
        if confidence is not None:
            whole[:, block] = confidence.masked_fill(~chosen, torch.nan)
        self._show(written, whole)

    def _show(self, written: Bool[Tensor, "rows columns"], confidence: Float[Tensor, "rows columns"]) -> None:
        assert self.observer is not None
        change = Change(self.numbers, *(self._completions(part) for part in (self.ids, written, confidence)))
        # Columns behind a row's completion may be written too, which is nothing to see.
        if bool(change.written.any()):
            self.observer(change)


def _aligned(
    policy: Policy,
    prompt_ids: Int[Tensor, "rows prompt"],
    prompt_mask: Bool[Tensor, "rows prompt"],
    length: int,
    block_size: int,
) -> tuple[Int[Tensor, "rows columns"], Bool[Tensor, "rows columns"], Int[Tensor, " rows"], int]:
    """Ids and attention mask of rows that are moved so that the blocks of all stand in the same columns.

    Columns are those of the longest prompt's whole blocks, then the rest of the prompts with the completions. Prompts
    that are shorter by whole blocks are padded on the left by them. Also returns each completion's first column, and
    the column where the block of these begins.
    """
    lengths = prompt_mask.sum(1)
    offset = lengths % block_size
    whole = lengths - offset
    start, most = int(whole.max()), int(offset.max())
    columns = torch.arange(start + most + length, device=prompt_ids.device)
    first = start + offset
    ends = first[:, None]
    # The column from which a prompt's token comes. Columns of the completion get mask tokens instead.
    source = (columns - ends + prompt_ids.shape[1]).clamp(0, prompt_ids.shape[1] - 1)
    ids = torch.where(columns < ends, prompt_ids.gather(1, source), policy.facts.mask_token_id)
    attended = (columns >= (start - whole)[:, None]) & (columns < ends + length)
    return ids, attended, first, start
