"""The partly unmasked sequences on which one call to `Sampler.sample` works, and how to watch them grow."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dmpo_lightning.models.kv_cache import KeyValueCache
from dmpo_lightning.policy import Policy, full_attention_mask
from dmpo_lightning.samplers.base import Samples
from dmpo_lightning.samplers.draws import Draw

CacheMode = Literal["none", "prefix", "dual"]


def check_cache(cache: str, refresh_window: int, suffix_window: int | None, guidance: float) -> None:
    """Raises ValueError for a kind of cache that does not exist, or options out of range or that do not go with it."""
    if cache not in ("none", "prefix", "dual"):
        raise ValueError(f"`cache` must be none, prefix or dual, got {cache!r}.")
    if refresh_window < 0 or (refresh_window and cache != "dual"):
        raise ValueError(f"`refresh_window` must be at least 0 and goes with cache: dual, got {refresh_window}.")
    if suffix_window is not None and suffix_window < 0:
        raise ValueError(f"`suffix_window` must be at least 0, or null for all, got {suffix_window}.")
    if not 0 <= guidance < math.inf or (guidance and cache != "none"):
        raise ValueError(
            f"`guidance` must be at least 0 and finite, and needs cache: none, got {guidance} with {cache}."
        )


@dataclass(frozen=True)
class Window:
    """What a forward computes and what it attends to, in columns of the canvas, which count from the prompt's first."""

    columns: range
    """The columns that are computed. All others come from the cache."""
    visible: int
    """The columns below this number are attended to. To the model, the others do not exist."""


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
    """What was written to some completions at once. The tensors are the sampler's own, to be read and not kept."""

    rows: Int[Tensor, " rows"]
    """The numbers of these completions, counted from 0 over all calls to `Sampler.sample` inside `observed`."""
    completion_ids: Int[Tensor, "rows length"]
    """As they are now. Mask tokens stand where nothing has been revealed."""
    written: Bool[Tensor, "rows length"]
    confidence: Float[Tensor, "rows length"]
    """The probability at temperature 1 of what was written. NaN where nothing was, or where it was not drawn."""


Observer = Callable[[Change], None]


@dataclass
class _Watch:
    """An observer, and how many completions were begun before its eyes."""

    observer: Observer
    begun: int = 0

    def begin(self, keys: Tensor) -> Int[Tensor, " rows"]:
        """The numbers of as many new completions as there are ``keys``."""
        self.begun += len(keys)
        return torch.arange(self.begun - len(keys), self.begun, device=keys.device)


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


def watched(keys: Tensor) -> tuple[Observer | None, Int[Tensor, " rows"] | None]:
    """Who watches as many new completions as there are ``keys``, and their numbers. None twice where nobody does."""
    watch = _watch.get()
    return (None, None) if watch is None else (watch.observer, watch.begin(keys))


@dataclass
class Canvas:
    """Prompts with their growing completions. A *place* counts from the first token of a completion."""

    policy: Policy
    ids: Int[Tensor, "rows total"]
    attention_mask: Bool[Tensor, "rows total"]
    is_padded: bool
    """Whether any prompt is. Without padding attention gets no mask, which its fastest kernels do not take."""
    prompt_length: int
    reveal_step: Int[Tensor, "rows length"]
    """The denoising step that revealed each place, -1 where none has yet."""
    log_prob: Float[Tensor, "rows length"]
    prompt_runs: "PromptRuns | None" = None
    """Of a blank canvas whose neighbouring rows have prompts in common."""
    observer: Observer | None = None
    numbers: Int[Tensor, " rows"] | None = None
    """Of these rows among all that the observer is shown. None where nobody watches."""

    @classmethod
    def blank(cls, policy: Policy, prompt_ids: Tensor, prompt_mask: Tensor, completion_length: int) -> "Canvas":
        """The prompts followed by completions of mask tokens."""
        shape = (prompt_ids.shape[0], completion_length)
        runs, is_padded = prompt_facts(prompt_ids, prompt_mask)
        return cls(
            policy,
            torch.cat((prompt_ids, prompt_ids.new_full(shape, policy.facts.mask_token_id)), dim=1),
            full_attention_mask(prompt_mask, completion_length),
            is_padded,
            prompt_ids.shape[1],
            prompt_ids.new_full(shape, -1),
            torch.zeros(shape, dtype=torch.float32, device=prompt_ids.device),
            runs,
            *watched(prompt_ids),
        )

    def rows(self, index: Int[Tensor, " selected"], *, shown: bool = True) -> "Canvas":
        """A copy of some rows, which can be worked on alone. An observer sees what happens to it if it is ``shown``."""
        parts = (self.ids, self.attention_mask), (self.reveal_step, self.log_prob)
        (ids, mask), (step, log_prob) = ([part[index] for part in pair] for pair in parts)
        part = Canvas(self.policy, ids, mask, self.is_padded, self.prompt_length, step, log_prob)
        if self.numbers is not None and shown:
            part.observer, part.numbers = self.observer, self.numbers[index]
        return part

    def put_rows(self, index: Int[Tensor, " selected"], part: "Canvas") -> None:
        """Writes a copy that `rows` made back into the same rows."""
        self.ids[index], self.reveal_step[index], self.log_prob[index] = part.ids, part.reveal_step, part.log_prob

    def without_prompt(self) -> "Canvas":
        """The same completions behind prompts of mask tokens, which is what guidance moves away from."""
        # Masked out, not cut off, so that every completion keeps its columns and positions.
        ids = self.ids.clone()
        ids[:, : self.prompt_length] = self.policy.facts.mask_token_id
        return replace(self, ids=ids)

    @property
    def length(self) -> int:
        """The number of tokens of a completion."""
        return self.reveal_step.shape[1]

    def logits(
        self,
        places: Int[Tensor, "*at"],
        rows: Int[Tensor, "*at"] | None = None,
        window: Window | None = None,
        cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "*at vocab"]:
        """Logits at places ``[rows places]`` of every row, or at pairs of ``rows`` and ``places`` of any shape.

        Without a ``window`` all columns are computed and visible.
        """
        visible = self.ids.shape[1] if window is None else window.visible
        # Flat indices count in the part of the canvas that is handed to the model, which is `visible` columns wide.
        if rows is None:
            rows = torch.arange(self.ids.shape[0], device=self.ids.device)[:, None]
        positions = rows * visible + self.prompt_length + places
        ids, mask = self.ids[:, :visible], self.attention_mask[:, :visible] if self.is_padded else None
        columns = None if window is None else window.columns
        return self.policy.logits(ids, mask, positions, cache=cache, columns=columns)

    def reveal(self, places: Int[Tensor, "rows places"], draw: Draw, step: int) -> None:
        """Writes tokens that were drawn for some places of every row."""
        self.ids.scatter_(1, places + self.prompt_length, draw.tokens)
        self.reveal_step.scatter_(1, places, step)
        self.log_prob.scatter_(1, places, draw.log_prob)
        if self.observer is not None:
            written = torch.zeros_like(self.reveal_step, dtype=torch.bool).scatter_(1, places, True)
            confidence = torch.full_like(self.log_prob, torch.nan).scatter_(1, places, draw.confidence.float())
            self._show(written, confidence)
        self.policy.note_step(step)

    def reveal_where(self, start: int, chosen: Bool[Tensor, "rows block"], draw: Draw, step: int) -> None:
        """Writes the ``chosen`` ones of the tokens that were drawn for all places of the block from ``start`` on."""
        stop = start + chosen.shape[1]
        first = self.prompt_length
        # Written as a choice over the whole block: picking chosen places out waits for the device to count them.
        for target, value in (
            (self.ids[:, first + start : first + stop], draw.tokens),
            (self.reveal_step[:, start:stop], torch.full_like(draw.tokens, step)),
            (self.log_prob[:, start:stop], draw.log_prob),
        ):
            target.copy_(torch.where(chosen, value, target))
        if self.observer is not None:
            self._show_block(start, chosen, draw.confidence.float())
        self.policy.note_step(step)

    def mask_where(self, start: int, chosen: Bool[Tensor, "rows block"]) -> None:
        """Masks the ``chosen`` places of the block from ``start`` on again."""
        stop = start + chosen.shape[1]
        first = self.prompt_length
        self.ids[:, first + start : first + stop].masked_fill_(chosen, self.policy.facts.mask_token_id)
        self.reveal_step[:, start:stop].masked_fill_(chosen, -1)
        if self.observer is not None and bool(chosen.any()):
            self._show_block(start, chosen, torch.full(chosen.shape, torch.nan, device=chosen.device))

    def end_rows(self, start: int) -> Int[Tensor, " going"]:
        """Fills rows that have an end token before place ``start`` with end tokens from there on.

        Returns the numbers of the rows that go on.
        """
        ends = torch.tensor(self.policy.facts.end_token_ids, device=self.ids.device)
        completions = self.ids[:, self.prompt_length :]
        over = torch.isin(completions[:, :start], ends).any(1)
        completions[:, start:] = torch.where(over[:, None], ends[:1], completions[:, start:])
        if self.observer is not None and bool(over.any()):
            filled = over[:, None].expand(-1, self.length - start)
            self._show_block(start, filled, torch.full(filled.shape, torch.nan, device=filled.device))
        return (~over).nonzero().squeeze(1)

    def _show_block(
        self, start: int, chosen: Bool[Tensor, "rows block"], confidence: Float[Tensor, "rows block"]
    ) -> None:
        block = slice(start, start + chosen.shape[1])
        written = torch.zeros_like(self.reveal_step, dtype=torch.bool)
        written[:, block] = chosen
        whole = torch.full_like(self.log_prob, torch.nan)
        whole[:, block] = confidence.masked_fill(~chosen, torch.nan)
        self._show(written, whole)

    def _show(self, written: Bool[Tensor, "rows length"], confidence: Float[Tensor, "rows length"]) -> None:
        assert self.observer is not None
        assert self.numbers is not None
        self.observer(Change(self.numbers, self.ids[:, self.prompt_length :], written, confidence))

    def samples(self) -> Samples:
        """The finished completions."""
        return Samples(self.ids[:, self.prompt_length :], self.reveal_step, self.log_prob)
