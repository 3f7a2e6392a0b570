"""Block-wise unmasking of the most confident tokens first, which LLaDA calls low-confidence remasking.

The schedule is static, or parallel as far as confidence allows. Both work with or without caches of keys and values.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dmpo_lightning.functional.randomness import Purpose, fold_in, uniforms
from dmpo_lightning.models.kv_cache import KeyValueCache
from dmpo_lightning.policy import Policy
from dmpo_lightning.samplers.base import Sampler, Samples, reveal_counts
from dmpo_lightning.samplers.block_causal import Step, decode_blocks
from dmpo_lightning.samplers.canvas import Canvas
from dmpo_lightning.samplers.draws import Confidence, Draw
from dmpo_lightning.samplers.transfer import above_threshold, best_of, within_factor
from dmpo_lightning.tasks.base import check_choice

CacheMode = Literal["none", "prefix", "dual"]
Remasking = Literal["low_confidence", "random", "sequential"]


class ConfidenceSampler(Sampler):
    """Unmasks block by block, from left to right, and within a block the most confident tokens first.

    In each step every masked position of the block draws a token, and the best of these are kept. The static schedule
    keeps a fixed number. With ``threshold`` or ``factor`` as many are kept as are sure enough, and at least one, which
    is the parallel decoding of Fast-dLLM (arXiv 2505.22618).

    A ``cache`` makes steps cheaper and approximate: within a block, the keys and values of other columns stay as they
    were in the block's first step. Block-causal models (SDAR) need none of its kinds. They are decoded in their own
    blocks, finished blocks are kept exactly, and a completion is over with the block of its first end token.

    Args:
        block_length: see `Sampler`.
        denoising_steps: see `Sampler`. With ``threshold`` only in a block-causal model's own blocks, where a step keeps
            at least as many tokens as without, as SDAR and LLaDA2.0 do. Not with ``factor``.
        remasking: ``low_confidence`` keeps the tokens of highest probability, ``random`` those at random positions,
            and ``sequential`` the first ones.
        temperature: the temperature of the exact categorical draw. 0 takes the most likely token.
        threshold: keep every token of at least this probability, in (0, 1]. In a block-causal model's own blocks it has
            to be above it, as published, so that 1 reveals one token per step.
        factor: keep the n most probable tokens as long as (n + 1) (1 - probability) is at most this, above 0.
        cache: ``none`` computes all columns in each step. ``prefix`` computes the block and all columns after it, and
            ``dual`` the block alone.
        editing_threshold: in a block-causal model's own blocks, with ``threshold``: write a revealed token anew where
            another one is drawn with more than this probability, in (0, 1], until nothing changes or for 16 steps after
            the block's last mask, as LLaDA2.1 does. The prompt stays as it is.
        early_exit: a completion with an end token in a finished block is over, and the rest of it becomes end tokens
            without being computed. This changes what is sampled.
        top_k: see `Sampler`. In TraDo's greedy evaluation it is 1, which makes all drawn tokens equally sure.
        top_p: see `Sampler`.
        confidence: the probability of a token as it was ``drawn``, after temperature, ``top_k`` and ``top_p``, or that
            of the ``model`` at temperature 1, as always at temperature 0. None is what the model's family publishes:
            ``drawn`` for block-causal models (SDAR, TraDo, DiRL) and Dream, ``model`` for LLaDA and all others.

    Raises:
        ValueError: a value or a combination is impossible. `validate` checks against a completion length.

    Example:
        >>> from dmpo_lightning import ConfidenceSampler
        >>> ConfidenceSampler(block_length=32, denoising_steps=64, temperature=0.2).num_steps(128)
        64
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
        editing_threshold: float | None = None,
        cache: CacheMode = "none",
        early_exit: bool = False,
        top_k: int | None = None,
        top_p: float | None = None,
        confidence: Confidence | None = None,
    ) -> None:
        super().__init__(
            temperature=temperature,
            denoising_steps=denoising_steps,
            block_length=block_length,
            top_k=top_k,
            top_p=top_p,
        )
        check_choice("cache", cache, get_args(CacheMode))
        check_choice("remasking", remasking, get_args(Remasking))
        if confidence is not None:
            check_choice("confidence", confidence, get_args(Confidence))
        if threshold is not None and factor is not None:
            raise ValueError("Set `threshold` or `factor`, not both.")
        for name, value in (("threshold", threshold), ("editing_threshold", editing_threshold)):
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"`{name}` must be a probability in (0, 1], got {value}.")
        if editing_threshold is not None and threshold is None:
            raise ValueError("`editing_threshold` needs `threshold` as well, by which tokens are revealed.")
        if factor is not None and not 0 < factor < math.inf:
            raise ValueError(f"`factor` must be positive and finite, got {factor}.")
        self.remasking, self.cache, self.early_exit = remasking, cache, early_exit
        self.threshold, self.factor, self.confidence = threshold, factor, confidence
        self.editing_threshold = editing_threshold
        if (not self.is_static and remasking != "low_confidence") or (
            factor is not None and denoising_steps is not None
        ):
            raise ValueError(
                f"`threshold` and `factor` choose the number of steps and compare confidence; leave out "
                f"denoising_steps (got {denoising_steps}) and use remasking: low_confidence (got {remasking})."
            )

    @property
    def is_static(self) -> bool:
        """Whether the number of steps is fixed beforehand."""
        return self.threshold is None and self.factor is None

    @property
    def order_is_independent(self) -> bool:  # type: ignore[override]
        """From left to right the order is the same for all tokens, if each step sees what a replay of it sees."""
        return self.remasking == "sequential" and self.is_static and self.cache == "none" and not self.early_exit

    @property
    def rewrites(self) -> bool:  # type: ignore[override]
        """See `Sampler.rewrites`."""
        return self.editing_threshold is not None

    def validate_policy(self, policy: Policy) -> None:
        super().validate_policy(policy)
        if self.cache != "none" and (not policy.is_native or policy.block_size is not None):
            raise ValueError(
                f"`cache` {self.cache} needs a native bidirectional backbone (LLaDA, iLLaDA, Dream), got "
                f"{type(policy.model).__name__}; use cache: none. Finished blocks of SDAR are kept exactly anyway."
            )
        is_scheduled = self.threshold is not None and self.denoising_steps is not None
        if policy.block_size is None and (is_scheduled or self.editing_threshold is not None):
            raise ValueError(
                "`denoising_steps` beside `threshold`, and `editing_threshold`, are for block-causal backbones (SDAR, "
                f"LLaDA2), got {type(policy.model).__name__}; leave them out."
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
        canvas = Canvas.blank(policy, prompt_ids, prompt_mask, completion_length, keys)
        if policy.block_size is not None:
            return decode_blocks(self, canvas, self._choose, editing_threshold=self.editing_threshold)
        length = self.block_length or completion_length
        going = None  # the rows that are not over; None while that is all of them
        for start in range(0, completion_length, length):
            if going is None:
                Block(self, canvas, start, length).decode()
            else:
                # Rows that are over are left out of the forwards. Where all rows of this rank are over but another rank
                # goes on, row 0 is decoded for nothing: ranks that share weights must run equally many forwards.
                part = canvas.rows(going if len(going) else torch.zeros_like(keys[:1]), shown=len(going) > 0)
                Block(self, part, start, length).decode()
                # Only rows that go on are written back, so that row 0 stays as it was.
                canvas.put_rows(going, part.rows(torch.arange(len(going), device=keys.device)))
            if self.early_exit and start + length < completion_length:
                going = canvas.end_rows(canvas.start + start + length)
                if not policy.anywhere(len(going) > 0):
                    break
        return canvas.samples()

    def _choose(self, draw: Draw, step: Step) -> Bool[Tensor, "rows block"]:
        """What a step in a block-causal model's own block reveals."""
        if self.threshold is not None:
            # Exceeded, as in the published code of SDAR and LLaDA2. In that of Fast-dLLM it is reached.
            sure = above_threshold(draw.confidence, step.masked, math.nextafter(self.threshold, 2.0))
            return sure | best_of(draw.log_odds, step.masked, step.count)
        if not self.is_static:
            return self.sure_enough(draw, step.masked)
        return best_of(self.scores(draw, step.canvas, step.positions, step.number), step.masked, step.count)

    def scores(
        self, draw: Draw, canvas: Canvas, positions: Int[Tensor, "rows positions"], step: int
    ) -> Float[Tensor, "rows positions"]:
        """The scores by which candidates are kept, the highest first: confidence, chance, or from left to right."""
        if self.remasking == "low_confidence":
            return draw.log_odds
        if self.remasking == "sequential":
            return -positions.double()
        noise = uniforms(fold_in(fold_in(canvas.keys, Purpose.REMASKING), step), canvas.length)
        return noise.gather(1, positions)

    def sure_enough(self, draw: Draw, masked: Bool[Tensor, "rows block"]) -> Bool[Tensor, "rows block"]:
        """The candidates that ``threshold`` or ``factor`` keeps, at least one in each row."""
        if self.threshold is not None:
            return above_threshold(draw.confidence, masked, self.threshold)
        assert self.factor is not None
        return within_factor(draw.confidence, masked, self.factor)

    def diagnostics(self, reveal_step: Int[Tensor, "*rows length"]) -> dict[str, Tensor]:
        """The share of positions that an early exit filled in without computing them."""
        return {"sampler/positions_saved_by_early_exit": (reveal_step < 0).float()} if self.early_exit else {}


@dataclass
class Block:
    """The decoding of one block, in one call to `ConfidenceSampler.sample`."""

    sampler: ConfidenceSampler
    canvas: Canvas
    start: int
    length: int
    kept: KeyValueCache | None = None
    """Keys and values of all columns, as this block's first step computed them, None without a cache."""

    def decode(self) -> None:
        """Unmasks all of the block's positions."""
        if self.sampler.is_static:
            self._decode_static()
        else:
            self._decode_parallel()

    def _decode_static(self) -> None:
        """A fixed number of steps, each of which reveals equally many tokens in every row.

        ``masked`` holds the positions that are still masked, ``[rows positions]``. It stays a rectangle, so that each
        step computes the logits of these positions alone.
        """
        steps = self.sampler.num_steps(self.canvas.length) * self.length // self.canvas.length
        masked = self.canvas.positions(self._columns)
        for step, count in enumerate(reveal_counts(self.length, steps)):
            # Counted over all blocks, so that no two steps of a completion share their draws.
            key_step = self.start // self.length * steps + step
            logits = self._logits_of_all(masked) if step == 0 else self._logits(masked)
            draw = self.canvas.draw(logits, masked, key_step, self.sampler)
            del logits  # else they would be alive beside those of the next step
            scores = self.sampler.scores(draw, self.canvas, masked, key_step)
            # Of equal scores the left one comes first, so the rest goes back to its order from left to right.
            ranking = scores.argsort(dim=1, descending=True, stable=True)
            chosen, rest = ranking[:, :count], ranking[:, count:].sort(dim=1).values
            self.canvas.reveal(masked.gather(1, chosen), draw.at(chosen), key_step)
            masked = masked.gather(1, rest)

    def _decode_parallel(self) -> None:
        """As many steps as the most doubtful row takes. Each reveals what is sure enough, in every row at least one.

        Draws are keyed by the number of the step, which counts from the first position of the block. A completion
        therefore does not depend on how many steps other rows took in this block or in earlier ones.
        """
        canvas, sampler, columns = self.canvas, self.sampler, self._columns
        positions = canvas.positions(columns)
        # The logits get no name, which would keep them alive beside those of the next step.
        draw = canvas.draw(self._logits_of_all(positions), positions, self.start, sampler)
        chosen = sampler.sure_enough(draw, torch.ones_like(positions, dtype=torch.bool))
        canvas.reveal_where(columns, chosen, draw, self.start)
        for step in range(self.start + 1, self.start + self.length):
            masked = canvas.masked(columns)
            # Rows have different numbers of masked positions, so these are listed in pairs of row and position. The
            # list has to be counted, for which the host waits for the device: once per step, and nothing else waits.
            rows, offsets = masked.nonzero(as_tuple=True)
            if not canvas.policy.anywhere(len(rows) > 0):
                break
            # Other ranks go on, and their forwards gather weights from this rank too.
            if not len(rows):
                self._logits(*torch.zeros(2, 1, dtype=torch.long, device=masked.device))
                continue
            at = self.start + offsets
            draw = canvas.draw(self._logits(at, rows), at, step, sampler, rows).spread(masked)
            canvas.reveal_where(columns, sampler.sure_enough(draw, masked), draw, step)

    @property
    def _columns(self) -> slice:
        first = self.canvas.start + self.start
        return slice(first, first + self.length)

    def _logits_of_all(self, positions: Int[Tensor, "rows block"]) -> Float[Tensor, "rows block vocab"]:
        """Logits of the block's first step, which computes every column and fills the cache, if there is one.

        Before the first token of all, the completions of one prompt are all the same mask tokens. Runs of equal prompts
        are then computed once, and logits and cache are copied to all of their rows.
        """
        canvas, shared = self.canvas, self.canvas.prompt_runs if self.start == 0 else None
        if shared is not None:
            canvas, positions = canvas.rows(shared.first), positions[shared.first]
        if self.sampler.cache != "none":
            self.kept = KeyValueCache(canvas.attention_mask, is_padded=canvas.is_padded)
        logits = canvas.logits(positions, cache=self.kept, columns=range(canvas.ids.shape[1]))
        if shared is None:
            return logits
        if self.kept is not None:
            self.kept.select(shared.of_row)
        return logits[shared.of_row]

    def _logits(self, positions: Tensor, rows: Tensor | None = None) -> Float[Tensor, "*at vocab"]:
        """Logits of a later step, at positions of every row, or at pairs of row and position.

        With a cache it computes only what that is not to keep: ``prefix`` keeps the columns before the block, ``dual``
        those on both sides of it.
        """
        total = self.canvas.ids.shape[1]
        columns = range(self._columns.start, self._columns.stop if self.sampler.cache == "dual" else total)
        return self.canvas.logits(positions, rows, cache=self.kept, columns=columns)
