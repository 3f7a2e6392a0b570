"""Block-wise unmasking of the most confident tokens first, which LLaDA calls low-confidence remasking.

The schedule is static, or parallel as far as confidence allows. Both work with or without caches of keys and values.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dmpo_lightning.models.kv_cache import KeyValueCache
from dmpo_lightning.policy import Policy
from dmpo_lightning.samplers.base import (
    Sampler,
    Samples,
    SamplingFootprint,
    check_block_length,
    check_blocks,
    reveal_counts,
)
from dmpo_lightning.samplers.block_causal import Step, check_own_blocks, decode_blocks
from dmpo_lightning.samplers.canvas import CacheMode, Canvas, Window, check_cache
from dmpo_lightning.samplers.draws import Draw, draw_at
from dmpo_lightning.samplers.transfer import (
    Remasking,
    best,
    best_of,
    check_parallel,
    remasking_scores,
    sure_enough,
)


class ConfidenceSampler(Sampler):
    """Unmasks block by block, from left to right, and within a block the most confident tokens first.

    In each step every masked position of the block draws a token, and the best of these are kept. The static schedule
    keeps a fixed number. With ``threshold`` or ``factor`` as many are kept as are sure enough, and at least one, which
    is the parallel decoding of Fast-dLLM (arXiv 2505.22618).

    A ``cache`` makes steps cheaper and approximate: within a block, the keys and values of other columns stay as they
    were in the block's first step. Block-causal models (SDAR) need none of its kinds. They are decoded in their own
    blocks, finished blocks are kept exactly, and a completion is over with the block of its first end token.

    Args:
        block_length: the number of positions per block. None takes the whole completion as one block.
        denoising_steps: the number of steps over all blocks, split evenly among them. None reveals one token per step.
            Not with ``threshold`` or ``factor``.
        remasking: ``low_confidence`` keeps the tokens of highest probability, ``random`` those at random positions,
            and ``sequential`` the first ones.
        temperature: the temperature of the exact categorical draw. 0 takes the most likely token.
        threshold: keep every token of at least this probability, in (0, 1].
        factor: keep the n most probable tokens as long as (n + 1) (1 - probability) is at most this, above 0.
        cache: ``none`` computes all columns in each step. ``prefix`` computes the block and all columns after it, and
            ``dual`` the block alone.
        refresh_window: with ``dual``, this many columns on either side of the block are computed too.
        suffix_window: only so many positions after the block exist for the model, which changes samples. None is all.
        early_exit: a completion with an end token in a finished block is over, and the rest of it becomes end tokens
            without being computed. This changes what is sampled.
        guidance: classifier-free, as in LLaDA, away from the model without the prompt. 0 is none. Not with a cache.
        top_k: see `Sampler`. Confidences are those of the whole distribution.
        top_p: see `Sampler`.

    Raises:
        ValueError: a value or a combination is impossible. `validate` checks against a completion length.
    """

    def __init__(
        self,
        *,
        block_length: int | None = None,
        denoising_steps: int | None = None,
        remasking: Remasking = "low_confidence",
        temperature: float = 1.0,
        threshold: float | None = None,
        factor: float | None = None,
        cache: CacheMode = "none",
        refresh_window: int = 0,
        suffix_window: int | None = None,
        early_exit: bool = False,
        guidance: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> None:
        super().__init__(temperature=temperature, denoising_steps=denoising_steps, top_k=top_k, top_p=top_p)
        check_block_length(block_length)
        check_cache(cache, refresh_window, suffix_window, guidance)
        check_parallel(threshold, factor, denoising_steps, remasking)
        self.block_length, self.remasking, self.cache = block_length, remasking, cache
        self.threshold, self.factor, self.guidance = threshold, factor, guidance
        self.refresh_window, self.suffix_window, self.early_exit = refresh_window, suffix_window, early_exit

    @property
    def is_static(self) -> bool:
        """Whether the number of steps is fixed beforehand."""
        return self.threshold is None and self.factor is None

    def validate(self, completion_length: int) -> None:
        super().validate(completion_length)
        check_blocks(completion_length, self.block_length, self.num_steps(completion_length))

    @property
    def _is_approximate(self) -> bool:
        return self.cache != "none" or self.suffix_window is not None or self.guidance > 0

    @property
    def order_is_independent(self) -> bool:  # type: ignore[override]
        """From left to right the order is the same for all tokens, if each step sees what a replay of it sees."""
        return self.remasking == "sequential" and self.is_static and not self._is_approximate and not self.early_exit

    def footprint(self, completion_length: int) -> SamplingFootprint:
        """A step asks for the logits of one block, and with guidance runs a second forward without the prompt."""
        is_guided = self.guidance > 0
        return replace(
            super().footprint(completion_length),
            forwards=self.num_steps(completion_length) * (2 if is_guided else 1),
            places=self.block_length or completion_length,
            guided=is_guided,
            keeps_cache=self.cache != "none",
        )

    def validate_policy(self, policy: Policy) -> None:
        check_own_blocks(self, policy, self.block_length, approximate=self._is_approximate)
        if self.cache != "none" and not policy.is_native:
            raise ValueError(
                f"`cache` {self.cache} needs a native backbone (LLaDA, iLLaDA, Dream), got "
                f"{type(policy.model).__name__}; use cache: none."
            )

    def sample(
        self,
        policy: Policy,
        prompt_ids: Int[Tensor, "rows prompt"],
        prompt_mask: Bool[Tensor, "rows prompt"],
        *,
        completion_length: int,
        keys: Int[Tensor, " rows"],
    ) -> Samples:
        self.validate_policy(policy)
        if policy.block_size is not None:
            return decode_blocks(self, policy, prompt_ids, prompt_mask, completion_length=completion_length, keys=keys)
        canvas = Canvas.blank(policy, prompt_ids, prompt_mask, completion_length)
        length = self.block_length or completion_length
        going = None  # the rows that are not over; None while that is all of them
        for start in range(0, completion_length, length):
            if going is None:
                Block(self, canvas, keys, start, length).decode()
            else:
                # Rows that are over are left out of the forwards. Where all rows of this rank are over but another rank
                # goes on, row 0 is decoded for nothing: ranks that share weights must run equally many forwards.
                at_least_one = going if len(going) else torch.zeros_like(keys[:1])
                part = canvas.rows(at_least_one, shown=len(going) > 0)
                Block(self, part, keys[at_least_one], start, length).decode()
                # Only rows that go on are written back, so that row 0 stays as it was.
                canvas.put_rows(going, part.rows(going.new_tensor(range(len(going)))))
            if self.early_exit and start + length < completion_length:
                going = canvas.end_rows(start + length)
                if not policy.anywhere(len(going) > 0):
                    break
        return canvas.samples()

    def choose(self, draw: Draw, step: Step) -> Bool[Tensor, "rows block"]:
        """What a step in a block-causal model's own block reveals."""
        if not self.is_static:
            return sure_enough(draw, step.masked, threshold=self.threshold, factor=self.factor)
        scores = remasking_scores(self.remasking, draw, step.keys, step.number, step.length, step.places)
        return best_of(scores, step.masked, step.count)

    def diagnostics(self, reveal_step: Int[Tensor, "*rows length"]) -> dict[str, Tensor]:
        """The share of places that an early exit filled in without computing them."""
        return {"sampler/places_saved_by_early_exit": (reveal_step < 0).float()} if self.early_exit else {}


@dataclass
class Block:
    """The decoding of one block, in one call to `ConfidenceSampler.sample`."""

    sampler: ConfidenceSampler
    canvas: Canvas
    keys: Int[Tensor, " rows"]
    start: int
    length: int
    kept: KeyValueCache | None = None
    """Keys and values of all columns, as this block's first step computed them, None without a cache."""

    def decode(self) -> None:
        """Unmasks all of the block's places."""
        if self.sampler.is_static:
            self._decode_static()
        else:
            self._decode_parallel()

    def _decode_static(self) -> None:
        """A fixed number of steps, each of which reveals equally many tokens in every row.

        ``masked`` holds the places that are still masked, ``[rows places]``. It stays a rectangle, so that each step
        computes the logits of these places alone.
        """
        steps = self.sampler.num_steps(self.canvas.length) * self.length // self.canvas.length
        masked = self._all_places()
        for step, count in enumerate(reveal_counts(self.length, steps)):
            # Counted over all blocks, so that no two steps of a completion share their draws.
            key_step = self.start // self.length * steps + step
            draw = self._draw(
                self._logits_of_all(masked) if step == 0 else self._logits(None, masked), masked, key_step
            )
            scores = remasking_scores(self.sampler.remasking, draw, self.keys, key_step, self.canvas.length, masked)
            ranking = best(scores, masked.shape[1])
            # The rest goes back to its order from left to right, by which `best` decides between equal scores.
            chosen, rest = ranking[:, :count], ranking[:, count:].sort(dim=1).values
            self.canvas.reveal(masked.gather(1, chosen), draw.at(chosen), key_step)
            masked = masked.gather(1, rest)

    def _decode_parallel(self) -> None:
        """As many steps as the most doubtful row takes. Each reveals what is sure enough, in every row at least one.

        Draws are keyed by the number of the step, which counts from the first place of the block. A completion
        therefore does not depend on how many steps other rows took in this block or in earlier ones.
        """
        places = self._all_places()
        draw = self._draw(self._logits_of_all(places), places, self.start)
        self._reveal_sure(draw, torch.ones_like(places, dtype=torch.bool), self.start)
        for step in range(self.start + 1, self.start + self.length):
            masked = self.canvas.reveal_step[:, self.start : self.start + self.length] < 0
            # Rows have different numbers of masked places, so these are listed in pairs of row and place. The list has
            # to be counted, for which the host waits for the device: once per step, and nothing else in a step waits.
            rows, offsets = masked.nonzero(as_tuple=True)
            if not self.canvas.policy.anywhere(len(rows) > 0):
                break
            # Other ranks go on, and their forwards gather weights from this rank too.
            if not len(rows):
                self._logits(*torch.zeros(2, 1, dtype=torch.long, device=masked.device))
                continue
            # The logits get no name, which would keep them alive beside those of the next step.
            draw = self._draw(self._logits(rows, self.start + offsets), self.start + offsets, step, rows)
            self._reveal_sure(draw.spread(masked), masked, step)

    def _all_places(self) -> Int[Tensor, "rows block"]:
        places = torch.arange(self.start, self.start + self.length, device=self.keys.device)
        return places.expand(len(self.keys), -1)

    def _reveal_sure(self, draw: Draw, masked: Bool[Tensor, "rows block"], step: int) -> None:
        chosen = sure_enough(draw, masked, threshold=self.sampler.threshold, factor=self.sampler.factor)
        self.canvas.reveal_where(self.start, chosen, draw, step)

    def _logits_of_all(self, places: Int[Tensor, "rows block"]) -> Float[Tensor, "rows block vocab"]:
        """Logits of the block's first step, which computes every column and fills the cache, if there is one.

        Before the first token of all, the completions of one prompt are all the same mask tokens. Runs of equal prompts
        are then computed once, and logits and cache are copied to all of their rows.
        """
        canvas, window = self.canvas, self._window(first=True)
        shared = canvas.prompt_runs if self.start == 0 else None
        if shared is not None:
            canvas, places = canvas.rows(shared.first), places[shared.first]
        if self.sampler.cache != "none":
            self.kept = KeyValueCache(canvas.attention_mask[:, : window.visible], is_padded=canvas.is_padded)
        logits = self._guided(canvas, None, places, window)
        if shared is None:
            return logits
        if self.kept is not None:
            self.kept.select(shared.of_row)
        return logits[shared.of_row]

    def _logits(self, rows: Tensor | None, places: Tensor) -> Float[Tensor, "*at vocab"]:
        """Logits of a later step, at places of every row, or at pairs of row and place."""
        return self._guided(self.canvas, rows, places, self._window(first=False))

    def _guided(
        self, canvas: Canvas, rows: Tensor | None, places: Tensor, window: Window
    ) -> Float[Tensor, "*at vocab"]:
        logits = canvas.logits(places, rows, window, self.kept)
        if not self.sampler.guidance:
            return logits
        # Banned tokens are minus infinity on both sides, whose difference is NaN; they keep their minus infinity.
        away = logits - canvas.without_prompt().logits(places, rows, window)
        return torch.where(logits.isneginf(), logits, logits + self.sampler.guidance * away)

    def _window(self, *, first: bool) -> Window:
        """What a step computes and sees.

        Without a cache, and in the block's first step, that is all visible columns. Later steps compute only what the
        cache is not to keep: ``prefix`` keeps the columns before the block, ``dual`` those on both sides of it, but for
        the ``refresh_window`` next to the block.
        """
        sampler, canvas = self.sampler, self.canvas
        total, start = canvas.ids.shape[1], canvas.prompt_length + self.start
        stop = start + self.length
        visible = total if sampler.suffix_window is None else min(stop + sampler.suffix_window, total)
        if first or sampler.cache == "none":
            return Window(range(visible), visible)
        if sampler.cache == "prefix":
            return Window(range(start, visible), visible)
        near = sampler.refresh_window
        return Window(range(max(start - near, 0), min(stop + near, visible)), visible)

    def _draw(self, logits: Tensor, places: Tensor, step: int, rows: Tensor | None = None) -> Draw:
        options = self.sampler.draw_options
        return draw_at(logits, self.keys, step, self.canvas.length, places, options=options, rows=rows)
