"""The output head, computed where it is needed only: logits, or log-probs of targets without keeping their logits.

The logits (here: scores) of 126464 tokens at a thousand positions take half a gigabyte, and autograd would keep several
tensors of that size. So scores are computed in tiles of some positions and some tokens, and forgotten right away.

Sums over the vocabulary are carried from tile to tile and rescaled when a larger score turns up, as in FlashAttention
(arXiv 2205.14135). The sums also yield the gradient with respect to the hidden states, so that a frozen head needs no
second look at the scores. That idea follows Cut Your Losses (arXiv 2411.09009).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 2**25
"""How many bytes of float32 scores exist at once."""
CHUNK_TOKENS = 8192
"""How many tokens of the vocabulary have scores at once."""


def target_log_probs(
    head: nn.Module,
    hidden: Float[Tensor, "*at width"],
    targets: Int[Tensor, "*at"],
    *,
    logit_bias: Float[Tensor, " vocab"] | None = None,
    temperature: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> Float[Tensor, "*at"]:
    """Float32 log-probs of ``targets`` under softmax((head(hidden) + logit_bias) / temperature).

    About ``chunk_bytes`` of scores exist at a time. A linear head without a bias takes `linear_log_probs`. Any other is
    called in chunks of positions, which the backward pass computes again instead of keeping them.
    """
    x, ids = hidden.flatten(0, -2), targets.flatten()
    # Some sharding strategies gather the head's weights in a hook, at each call. Ranks differ in their number of
    # positions but must gather equally often, so such a head is called once, for all positions.
    hooked = _has_hooks(head)
    if type(head) is nn.Linear and head.bias is None and not hooked:
        options: dict[str, Any] = {"logit_bias": logit_bias, "temperature": temperature, "chunk_bytes": chunk_bytes}
        return linear_log_probs(x, head.weight, ids, **options).view(targets.shape)

    def score(x: Tensor, ids: Tensor) -> Tensor:
        logits = head(x)
        return log_probs_of(logits if logit_bias is None else logits + logit_bias, ids, temperature)

    if hooked or logit_bias is None:
        return score(x, ids).view(targets.shape)
    rows = max(1, chunk_bytes // (4 * len(logit_bias)))
    parts = [checkpoint(score, *part, use_reentrant=False) for part in zip(x.split(rows), ids.split(rows), strict=True)]
    return torch.cat(parts).view(targets.shape)


def log_probs_of(
    logits: Float[Tensor, "*at vocab"], targets: Int[Tensor, "*at"], temperature: float = 1.0
) -> Float[Tensor, "*at"]:
    """Float32 log-probability of each target under softmax(logits / temperature)."""
    scaled = logits.float() if temperature == 1 else logits.float() / temperature
    return -F.cross_entropy(scaled.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)


def _has_hooks(head: nn.Module) -> bool:
    """Whether calling the head does more than its class says: by hooks, or by a ``forward`` put on the instance."""
    return any(part._forward_pre_hooks or part._forward_hooks or "forward" in vars(part) for part in head.modules())


def linear_log_probs(
    hidden: Float[Tensor, "positions width"],
    weight: Float[Tensor, "vocab width"],
    targets: Int[Tensor, " positions"],
    *,
    logit_bias: Float[Tensor, " vocab"] | None = None,
    temperature: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Float[Tensor, " positions"]:
    """Float32 log-probs of ``targets`` under softmax((hidden W' + logit_bias) / temperature).

    A tile holds ``chunk_tokens`` tokens at as many positions as ``chunk_bytes`` allow. Its product is computed in the
    dtype of ``hidden``, or in that of autocast where it is on, and everything after it in float32.

    With a frozen head the forward pass forms the gradient of each log-prob with respect to its hidden state and keeps
    that. With a head that learns, the backward pass computes the scores again. ``logit_bias`` gets no gradient. Minus
    infinity in it bans a token.
    """
    device = hidden.device.type
    # A Function of one's own is not seen by autocast, so that the casts it would make are made here.
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    tile = chunk_rows(len(weight), chunk_bytes, chunk_tokens), chunk_tokens
    return _LinearLogProbs.apply(hidden.to(dtype), weight.to(dtype), logit_bias, targets, temperature, tile)


def chunk_rows(vocab_size: int, chunk_bytes: int = CHUNK_BYTES, chunk_tokens: int = CHUNK_TOKENS) -> int:
    """How many positions' float32 scores of ``chunk_tokens`` tokens fit into ``chunk_bytes``, and one at least."""
    return max(1, chunk_bytes // (4 * min(vocab_size, chunk_tokens)))


class _LinearLogProbs(torch.autograd.Function):
    """`linear_log_probs` on tensors of one dtype. ``tile`` is how many positions and how many tokens a tile has."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        logit_bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        tile: tuple[int, int],
    ) -> Tensor:
        head = _Head(weight, logit_bias, temperature, tile[1])
        # Where the head learns, its own gradient needs the scores anyway, so the backward pass computes them again and
        # takes the gradient of the hidden states from them as well.
        ctx.learns_head = ctx.needs_input_grad[1]
        keeps_gradient = ctx.needs_input_grad[0] and not ctx.learns_head
        parts = [
            head.log_probs(x, ids, with_gradient=keeps_gradient)
            for x, ids in zip(hidden.split(tile[0]), targets.split(tile[0]), strict=True)
        ]
        log_probs, log_sums, gradients = (torch.cat(column) for column in zip(*parts, strict=True))
        if ctx.learns_head:
            ctx.save_for_backward(hidden, weight, logit_bias, targets, log_sums)
            ctx.temperature, ctx.tile = temperature, tile
        else:
            ctx.save_for_backward(gradients)
        return log_probs

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator,unused-ignore]
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.learns_head:
            (gradient,) = ctx.saved_tensors
            return (incoming[:, None] * gradient).to(gradient.dtype), *[None] * 5
        hidden, weight, logit_bias, targets, log_sums = ctx.saved_tensors
        head = _Head(weight, logit_bias, ctx.temperature, ctx.tile[1])
        return *head.gradients(hidden, targets, log_sums, incoming, rows=ctx.tile[0]), *[None] * 4


@dataclass(frozen=True)
class _Head:
    """A linear head that is asked for the scores of a few tokens of its vocabulary at a time."""

    weight: Tensor
    logit_bias: Tensor | None
    temperature: float
    chunk_tokens: int

    def tiles(self) -> Iterator[slice]:
        return (slice(start, start + self.chunk_tokens) for start in range(0, len(self.weight), self.chunk_tokens))

    def scores(self, hidden: Tensor, tokens: slice) -> Tensor:
        """``[positions tokens]``, float32 at least, in memory that nobody else reads: callers write over it."""
        scores = F.linear(hidden, self.weight[tokens])
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if self.logit_bias is not None:
            scores += self.logit_bias[tokens]
        return scores if self.temperature == 1 else scores.div_(self.temperature)

    def log_probs(self, hidden: Tensor, targets: Tensor, *, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs of the targets, log-sum-exps over the vocabulary, and d log-prob / d hidden where it is asked for.

        Without ``with_gradient`` the last is empty.
        """
        # With s the target's score and lse_o the log-sum-exp over all *other* tokens, log p = logsigmoid(s - lse_o) and
        # d log p / d s = sigmoid(lse_o - s). This keeps its digits where the target is all but certain; s - lse, over
        # all tokens, would there be the difference of two numbers that agree in almost all of theirs.
        others, own, mean = self._others(hidden, targets, with_mean=with_gradient)
        log_sums, margin = torch.logaddexp(own, others), own - others
        if not with_gradient:
            return F.logsigmoid(margin), log_sums, hidden[:0]
        # d log p / d hidden = (1 - p) (the target's weight vector - the others' mean weight vector) / temperature.
        direction = self.weight[targets].to(mean.dtype).sub_(mean)
        gradient = direction.mul_(torch.sigmoid(-margin)[:, None] / self.temperature)
        return F.logsigmoid(margin), log_sums, gradient.to(hidden.dtype)

    def _others(self, hidden: Tensor, targets: Tensor, *, with_mean: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Log-sum-exp of all scores but the target's, the target's own score, and the others' mean weight vector.

        The mean is weighted by the probabilities of the other tokens, and empty without ``with_mean``.
        """
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        limits = torch.finfo(dtype)
        # The highest score so far starts at the lowest finite number, and not at minus infinity: a tile in which every
        # token is banned would otherwise subtract infinities, which is NaN.
        top = hidden.new_full((len(hidden), 1), limits.min, dtype=dtype)
        own, total = torch.full_like(top, -torch.inf), torch.zeros_like(top)
        mean = torch.zeros_like(hidden if with_mean else hidden[:0], dtype=dtype)
        for tokens in self.tiles():
            scores = self.scores(hidden, tokens)
            own = _take_out(scores, targets[:, None] - tokens.start, own)
            highest = torch.maximum(top, scores.amax(-1, keepdim=True))
            # What was summed so far was relative to the old highest score.
            rescaled = (top - highest).exp_()
            scores = scores.sub_(highest).exp_()
            total, top = total * rescaled + scores.sum(-1, keepdim=True), highest
            if with_mean:
                mean.mul_(rescaled).add_(scores.to(hidden.dtype) @ self.weight[tokens])
            del scores  # else it would live on while the next tile's scores are made
        if with_mean:
            mean /= total.clamp(min=limits.tiny)
        return (top + total.log()).squeeze(-1), own.squeeze(-1), mean

    def gradients(
        self, hidden: Tensor, targets: Tensor, log_sums: Tensor, incoming: Tensor, *, rows: int
    ) -> tuple[Tensor, Tensor]:
        """Gradients of ``incoming`` times the log-probs, with respect to hidden states and weight.

        Scores are computed again, and exp(score - log-sum-exp) is the probability of each token.
        """
        by_hidden = torch.zeros_like(hidden, dtype=log_sums.dtype)
        by_weight = torch.empty_like(self.weight)
        # Tokens in the outer loop: a tile of the weight's gradient is then summed over all positions in float32, and
        # only one tile at a time exists in float32.
        for tokens in self.tiles():
            tile = torch.zeros_like(self.weight[tokens], dtype=log_sums.dtype)
            for start in range(0, len(hidden), rows):
                at = slice(start, start + rows)
                by_score = self.scores(hidden[at], tokens).sub_(log_sums[at, None]).exp_()
                _subtract_one(by_score, targets[at, None] - tokens.start)
                # So far it is p - 1 at the target and p elsewhere, the gradient of *minus* the log-prob.
                by_score *= incoming[at, None] / -self.temperature
                narrow = by_score.to(hidden.dtype)
                tile += narrow.T @ hidden[at]
                by_hidden[at] += narrow @ self.weight[tokens]
            by_weight[tokens] = tile
        return by_hidden.to(hidden.dtype), by_weight


def _take_out(scores: Tensor, columns: Tensor, own: Tensor) -> Tensor:
    """Takes each row's score at ``columns`` out of a tile, where the tile has that column.

    Minus infinity takes its place. Returns the scores taken out, and ``own`` for rows whose column lies elsewhere.
    """
    # Every row gathers and scatters at some column, so that no row has to be chosen, which would wait for the device.
    inside = columns.clamp(0, scores.shape[1] - 1)
    values, exists = scores.gather(-1, inside), inside == columns
    scores.scatter_(-1, inside, values.masked_fill(exists, -torch.inf))
    return torch.where(exists, values, own)


def _subtract_one(values: Tensor, columns: Tensor) -> None:
    """Subtracts one from each row's value at ``columns``, where the tile has that column."""
    inside = columns.clamp(0, values.shape[1] - 1)
    values.scatter_add_(-1, inside, (inside == columns).to(values.dtype).neg_())
