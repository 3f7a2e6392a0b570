"""Unmasking in a uniformly random order."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dmpo_lightning.functional.masking import position_ranks
from dmpo_lightning.functional.randomness import Purpose, fold_in, uniforms
from dmpo_lightning.policy import Policy
from dmpo_lightning.samplers.base import Sampler, Samples, reveal_counts
from dmpo_lightning.samplers.block_causal import Step, decode_blocks
from dmpo_lightning.samplers.canvas import Canvas
from dmpo_lightning.samplers.draws import Draw
from dmpo_lightning.samplers.transfer import best_of


class RandomOrderSampler(Sampler):
    """Reveals the positions in a uniformly random order, which no token influences.

    At temperature 1 and with one token per step this samples the any-order model exactly. At every temperature above 0,
    `TrajectoryEstimator` gives exact log-probs for it, with blocks or without. A block-causal model is decoded in its
    own blocks, and a completion is over with the block of its first end token.

    Args:
        temperature: the temperature of the exact categorical draw. 0 takes the most likely token.
        denoising_steps: see `Sampler`.
        block_length: see `Sampler`. The order is random within each block, as in the published recipe with 32.
        top_k: see `Sampler`.
        top_p: see `Sampler`.

    Raises:
        ValueError: a value is impossible. `validate` checks against a completion length.

    Example:
        >>> from dmpo_lightning import RandomOrderSampler
        >>> RandomOrderSampler(denoising_steps=8).order_is_independent
        True
    """

    order_is_independent = True

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
            return decode_blocks(self, canvas, self._choose)
        order = self._order(keys, completion_length)
        start = 0
        for step, count in enumerate(self._counts(completion_length)):
            positions = order[:, start : start + count]
            draw = canvas.draw(canvas.logits(positions), positions, step, self)
            canvas.reveal(positions, draw, step)
            start += count
        return canvas.samples()

    def _choose(self, draw: Draw, step: Step) -> Bool[Tensor, "rows block"]:
        """What a step in a block-causal model's own block reveals."""
        noise = uniforms(fold_in(step.canvas.keys, Purpose.ORDER), step.canvas.length).gather(1, step.positions)
        return best_of(-noise, step.masked, step.count)

    def _order(self, keys: Int[Tensor, " rows"], completion_length: int) -> Int[Tensor, "rows length"]:
        """The positions in the order in which each row reveals them."""
        length = self.block_length or completion_length
        ranks = position_ranks(uniforms(fold_in(keys, Purpose.ORDER), completion_length))
        # Positions are compared with those of their own block alone, so that whole blocks stay in order.
        within = ranks.unflatten(1, (-1, length)).argsort(-1)
        return (within + torch.arange(0, completion_length, length, device=keys.device)[:, None]).flatten(1)

    def _counts(self, completion_length: int) -> list[int]:
        """How many positions each step reveals, block after block."""
        length = self.block_length or completion_length
        blocks = completion_length // length
        return reveal_counts(length, self.num_steps(completion_length) // blocks) * blocks
