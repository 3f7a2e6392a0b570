"""The published decoding of LLaDA, written plainly: the baseline of `benchmarks.samplers` and the oracle of the tests.

The algorithm is that of LLaDA (arXiv 2502.09992) and Fast-dLLM (arXiv 2505.22618), as d1, wd1 and DMPO sample with it.
What one denoising step does, and no more:

1. Forward over the whole sequence, or over the columns the cache does not hold: ``[block start, end)`` with the prefix
   cache, the block with the dual cache. The cache keeps keys as projected, *before* rotation: the prefix cache is
   continued by a concatenation; the dual cache has the columns overwritten that a boolean matrix marks, which every
   layer searches for them, row by row, and once more for the end of the rotary tables of the queries. Then every layer
   rotates all keys of the sequence again, in float32. The rotary tables are built once. RMSNorm is a chain of plain
   operations (square, mean, reciprocal root, two products), not one fused kernel.
2. Head at every position that was fed in, prompt and later blocks included.
3. At temperature 0, the arg-max of each position. Above it, the logits in float64, a float64 uniform u for each of
   them, and the arg-max of exp(logits) / (-log u)^temperature (Gumbel). The later steps of a block with the prefix
   cache do all this twice and throw the first result away, as the published function does.
4. Softmax of the logits in float64, a second cast, and the probability of each chosen token (``random`` remasking: one
   uniform per position instead). This, too, at every position that was fed in.
5. A loop over rows, each with its own top-k among its candidates, the masked positions up to the end of the block;
   threshold and factor compare them one by one.
6. A look at the block: it is finished when no row has a mask left.

With a cache, each block starts with a forward over everything, whose logits serve its first step. Guidance runs a
second half of the batch in which the prompt is masked, without a cache.

In two points this one says more: left padding is masked and takes no position (it used to be ignored), so that
padded rows can be compared, and ids may be banned.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dmpo_lightning.models.layers import RMSNorm
from dmpo_lightning.models.llada import LLaDAForMaskedDiffusion, LLaDALayer

Cache = Literal["none", "prefix", "dual"]
Remasking = Literal["low_confidence", "random"]
KeysValues = list[tuple[Tensor, Tensor]]
"""Unrotated keys, and values, of each layer: ``[rows heads columns head_size]``."""


@dataclass
class Generated:
    """Completions, the step that revealed each position (over all blocks, from 0), and what they cost."""

    completion_ids: Int[Tensor, "rows length"]
    reveal_step: Int[Tensor, "rows length"]
    forwards: int


@dataclass
class Plain:
    """A model fed with the sequences of one call: rotary tables ``[rows or 1, 1, columns, head_size]`` and key mask."""

    model: LLaDAForMaskedDiffusion
    cos: Tensor
    sin: Tensor
    key_mask: Bool[Tensor, "rows 1 1 columns"] | None

    @classmethod
    def of(cls, model: LLaDAForMaskedDiffusion, attention_mask: Bool[Tensor, "rows columns"]) -> "Plain":
        """Positions count attended columns; without padding the rows share their tables and no mask is made."""
        padded = not attention_mask.all()
        positions = (attention_mask if padded else attention_mask[:1]).long().cumsum(-1).sub(1).clamp(min=0)
        cos, sin = rotary(positions, model.config.d_model // model.config.n_heads, model.config.rope_theta)
        return cls(model, cos, sin, attention_mask[:, None, None] if padded else None)

    def logits(
        self, ids: Int[Tensor, "rows fed"], columns: slice, past: KeysValues | None
    ) -> tuple[Float[Tensor, "rows fed vocab"], KeysValues]:
        """Logits at all of ``columns``, which ``ids`` fill, and the keys and values they were computed with."""
        transformer, present = self.model.model.transformer, []
        x, replaced = transformer["wte"](ids), None
        if past is not None and past[0][0].shape[2] > columns.start:  # the dual cache
            replaced = torch.zeros(len(ids), past[0][0].shape[2], dtype=torch.bool, device=ids.device)
            replaced[:, columns] = True
        for layer, block in enumerate(transformer["blocks"]):
            attended, keys_values = self._attend(
                block, normalised(x, block.attn_norm), columns, None if past is None else past[layer], replaced
            )
            present.append(keys_values)
            x = x + block.attn_out(attended)
            h = normalised(x, block.ff_norm)
            x = x + block.ff_out(F.silu(block.ff_proj(h)) * block.up_proj(h))
        return transformer["ff_out"](normalised(x, transformer["ln_f"])), present

    def _attend(
        self,
        block: LLaDALayer,
        h: Tensor,
        columns: slice,
        past: tuple[Tensor, Tensor] | None,
        replaced: Bool[Tensor, "rows columns"] | None,
    ) -> tuple[Float[Tensor, "rows fed width"], tuple[Tensor, Tensor]]:
        query, key, value = (
            linear(h).unflatten(-1, (-1, block.head_size)).transpose(1, 2)
            for linear in (block.q_proj, block.k_proj, block.v_proj)
        )
        if past is not None and replaced is None:
            key, value = torch.cat((past[0], key), dim=2), torch.cat((past[1], value), dim=2)
        elif past is not None and replaced is not None:
            key, value = overwritten(past, key, value, replaced)
            end = int(replaced.nonzero(as_tuple=True)[1].max()) + 1
            columns = slice(end - query.shape[2], end)
        attended = F.scaled_dot_product_attention(
            rotate(query, self.cos[:, :, columns], self.sin[:, :, columns]),
            rotate(key, self.cos, self.sin),
            value,
            attn_mask=self.key_mask,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return attended.transpose(1, 2).flatten(2), (key, value)


def rotary(positions: Int[Tensor, "rows columns"], head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[rows 1 columns head_size]`` of the half-rotated layout, in float32."""
    frequency = theta ** -(torch.arange(0, head_size, 2, device=positions.device).float() / head_size)
    angle = (positions[..., None].float() * frequency).repeat(1, 1, 2)[:, None]
    return angle.cos(), angle.sin()


def rotate(x: Float[Tensor, "rows heads columns size"], cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + (-x2, x1) sin, where x1 and x2 are the halves of x; in float32."""
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def normalised(x: Float[Tensor, "*at width"], norm: RMSNorm) -> Float[Tensor, "*at width"]:
    """x / sqrt(mean(x^2) + eps) in float32, cast back and scaled, operation by operation."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
    return norm.weight * wide.to(x.dtype)


def overwritten(
    past: tuple[Tensor, Tensor], key: Tensor, value: Tensor, replaced: Bool[Tensor, "rows columns"]
) -> tuple[Tensor, Tensor]:
    """The cache with fresh keys and values in the columns that ``replaced`` marks in each row."""
    for row in range(len(replaced)):
        where = replaced[row].nonzero(as_tuple=True)[0]
        if len(where) > 0:
            past[0][row, :, where] = key[row, :, : len(where)]
            past[1][row, :, where] = value[row, :, : len(where)]
    return past


def draw_tokens(
    logits: Float[Tensor, "rows fed vocab"], temperature: float, generator: torch.Generator | None
) -> Int[Tensor, "rows fed"]:
    """Arg-max of exp(logits) / (-log u)^temperature in float64, at every position; of the logits at temperature 0."""
    if temperature == 0:
        return logits.argmax(-1)
    wide = logits.to(torch.float64)
    uniform = torch.rand(wide.shape, dtype=torch.float64, device=wide.device, generator=generator)
    return (wide.exp() / (-uniform.log()) ** temperature).argmax(-1)


def confidence_of(
    tokens: Int[Tensor, "rows fed"],
    logits: Float[Tensor, "rows fed vocab"],
    remasking: Remasking,
    generator: torch.Generator | None,
) -> Float[Tensor, "rows fed"]:
    """Probability of each token in float64 (at temperature 1, whatever it was drawn at), or a uniform number."""
    if remasking == "random":
        return torch.rand(tokens.shape, device=tokens.device, generator=generator)
    return logits.to(torch.float64).softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)


def transfer_rows(
    confidence: Float[Tensor, "rows fed"],
    candidates: Bool[Tensor, "rows fed"],
    *,
    count: Int[Tensor, " rows"] | None = None,
    threshold: float | None = None,
    factor: float | None = None,
) -> Bool[Tensor, "rows fed"]:
    """Which candidates are revealed, row by row; exactly one of the three rules is given.

    ``count``: that many of each row, the most confident. ``threshold``: all at least that confident, and the best one.
    ``factor``: the best i that are, from the first to the i-th, at least 1 - factor / (rank + 1) confident; the best
    one passes always, and a row's last candidate is revealed although it fails if all before it passed (as published).
    """
    scores = torch.where(candidates, confidence, -torch.inf)
    chosen = torch.zeros_like(candidates)
    numbers = candidates.sum(1) if count is None else count
    for row in range(len(scores)):
        number = int(numbers[row])
        if number == 0:
            continue
        values, places = scores[row].topk(number)
        if threshold is not None:
            passes = [rank for rank in range(number) if rank == 0 or values[rank] >= threshold]
            places = places[passes]
        elif factor is not None:
            places = places[: passing_ranks(values, factor)]
        chosen[row, places] = True
    return chosen


def passing_ranks(descending: Float[Tensor, " candidates"], factor: float) -> int:
    """How many of one row's candidates the factor reveals."""
    number = len(descending)
    for rank in range(1, number):
        if descending[rank] < 1 - factor / (rank + 2):
            return number if rank == number - 1 else rank
    return number


def reveal_table(masked: Bool[Tensor, "rows block"], steps: int) -> Int[Tensor, "rows {steps}"]:
    """Positions to reveal in each of ``steps`` steps: as even as can be, the larger numbers first."""
    number = masked.sum(1, keepdim=True)
    return number // steps + (torch.arange(steps, device=masked.device) < number % steps)


@dataclass
class Canvas:
    """The sequences of one call of `generate`, partly unmasked, and how they are to be unmasked; see there."""

    plain: Plain
    ids: Int[Tensor, "rows columns"]
    reveal_step: Int[Tensor, "rows columns"]
    prompt_length: int
    mask_token_id: int
    temperature: float
    remasking: Remasking
    threshold: float | None
    factor: float | None
    banned: Int[Tensor, " ids"]
    generator: torch.Generator | None
    forwards: int = 0

    def step(self, columns: slice, past: KeysValues | None, end: int, count: Tensor) -> KeysValues:
        """One forward over ``columns`` and one transfer to their masked positions before ``end``."""
        fed = self.ids[:, columns]
        logits, present = self.plain.logits(fed, columns, past)
        logits.index_fill_(-1, self.banned, -torch.inf)
        if past is not None and past[0][0].shape[2] == columns.start:  # the prefix cache
            draw_tokens(logits, self.temperature, self.generator)
        tokens = draw_tokens(logits, self.temperature, self.generator)
        confidence = confidence_of(tokens, logits, self.remasking, self.generator)
        candidates = fed == self.mask_token_id
        candidates[:, end - columns.start :] = False
        if self.threshold is None and self.factor is None:
            chosen = transfer_rows(confidence, candidates, count=count)
        else:
            chosen = transfer_rows(confidence, candidates, threshold=self.threshold, factor=self.factor)
        fed[chosen] = tokens[chosen]
        self.reveal_step[:, columns][chosen] = self.forwards
        self.forwards += 1
        return present

    def masked(self, start: int, end: int) -> Bool[Tensor, "rows block"]:
        """Where the block still holds mask tokens."""
        return self.ids[:, start:end] == self.mask_token_id


@torch.no_grad()
def generate(
    model: LLaDAForMaskedDiffusion,
    prompt_ids: Int[Tensor, "rows prompt"],
    prompt_mask: Bool[Tensor, "rows prompt"],
    *,
    completion_length: int,
    block_length: int,
    mask_token_id: int,
    denoising_steps: int | None = None,
    temperature: float = 0.0,
    remasking: Remasking = "low_confidence",
    threshold: float | None = None,
    factor: float | None = None,
    cache: Cache = "none",
    ban: Float[Tensor, " vocab"] | None = None,
    generator: torch.Generator | None = None,
) -> Generated:
    """Completions of prompts that hold no mask token, block by block from left to right.

    Args:
        model: in eval mode.
        prompt_ids: padded on the left.
        prompt_mask: True where attended.
        completion_length: a multiple of ``block_length``.
        block_length: positions per block.
        mask_token_id: fills the completions at the start.
        denoising_steps: of the static schedule, over all blocks; None takes one token per step. Unused with
            ``threshold`` or ``factor``.
        temperature: of the Gumbel draw; 0 takes the most likely token.
        remasking: what the confidence is, a probability or a random number.
        threshold: see `transfer_rows`.
        factor: see `transfer_rows`.
        cache: whose keys and values are kept within a block: nobody's, the prefix's, or everybody's but the block's.
        ban: minus infinity at the ids that are never to be drawn, 0 elsewhere.
        generator: of the Gumbel noise and the random confidences.
    """
    ids = F.pad(prompt_ids, (0, completion_length), value=mask_token_id)
    attention_mask = F.pad(prompt_mask.bool(), (0, completion_length), value=True)
    canvas = Canvas(
        plain=Plain.of(model, attention_mask),
        ids=ids,
        reveal_step=torch.full_like(ids, -1),
        prompt_length=prompt_ids.shape[1],
        mask_token_id=mask_token_id,
        temperature=temperature,
        remasking=remasking,
        threshold=threshold,
        factor=factor,
        banned=ids.new_empty(0) if ban is None else ban.isneginf().nonzero().squeeze(1),
        generator=generator,
    )
    dynamic = threshold is not None or factor is not None
    steps = completion_length if dynamic or denoising_steps is None else denoising_steps
    for start in range(prompt_ids.shape[1], ids.shape[1], block_length):
        unmask_block(canvas, start, start + block_length, steps * block_length // completion_length, cache)
    completion = slice(prompt_ids.shape[1], None)
    return Generated(canvas.ids[:, completion], canvas.reveal_step[:, completion], canvas.forwards)


def unmask_block(canvas: Canvas, start: int, end: int, steps: int, cache: Cache) -> None:
    """Denoises until no row has a mask in columns ``[start, end)``; that takes all ``steps`` in the static schedule."""
    counts = reveal_table(canvas.masked(start, end), steps)
    columns, past = slice(0, canvas.ids.shape[1]), None
    for step in range(steps):
        present = canvas.step(columns, past, end, counts[:, step])
        if not canvas.masked(start, end).any():
            return
        if past is None and cache == "prefix":
            columns = slice(start, canvas.ids.shape[1])
            past = [(key[:, :, :start], value[:, :, :start]) for key, value in present]
        elif past is None and cache == "dual":
            columns, past = slice(start, end), present
