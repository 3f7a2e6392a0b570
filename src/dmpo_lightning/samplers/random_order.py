"""Unmasking in a uniformly random order."""

from dataclasses import replace

from jaxtyping import Bool, Int
from torch import Tensor

from dmpo_lightning.functional.masking import position_ranks
from dmpo_lightning.functional.randomness import Purpose, fold_in, uniforms
from dmpo_lightning.policy import Policy
from dmpo_lightning.samplers.base import Sampler, Samples, SamplingFootprint, reveal_counts
from dmpo_lightning.samplers.canvas import Canvas
from dmpo_lightning.samplers.draws import draw_tokens, step_uniforms


class RandomOrderSampler(Sampler):
    """Reveals the positions of the whole completion in a uniformly random order, which no token influences.

    At temperature 1 and with one token per step this samples the any-order model exactly. At every temperature above 0,
    `TrajectoryEstimator` gives exact log-probs for it.
    """

    order_is_independent = True

    def footprint(self, completion_length: int) -> SamplingFootprint:
        """A step asks for logits only at the places that it reveals."""
        most = max(reveal_counts(completion_length, self.num_steps(completion_length)))
        return replace(super().footprint(completion_length), places=most)

    def sample(
        self,
        policy: Policy,
        prompt_ids: Int[Tensor, "rows prompt"],
        prompt_mask: Bool[Tensor, "rows prompt"],
        *,
        completion_length: int,
        keys: Int[Tensor, " rows"],
    ) -> Samples:
        canvas = Canvas.blank(policy, prompt_ids, prompt_mask, completion_length)
        order = position_ranks(uniforms(fold_in(keys, Purpose.ORDER), completion_length)).argsort(-1)
        start = 0
        for step, count in enumerate(reveal_counts(completion_length, self.num_steps(completion_length))):
            places = order[:, start : start + count]
            uniform = step_uniforms(keys, step, completion_length).gather(1, places)
            draw = draw_tokens(canvas.logits(places), uniform, temperature=self.temperature)
            canvas.reveal(places, draw, step)
            start += count
        return canvas.samples()
