"""Block-wise unmasking of the most confident tokens first (LLaDA's low-confidence remasking), with a static
schedule.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dmpo_lightning.functional.randomness import Purpose, fold_in, uniforms
from dmpo_lightning.policy import Policy
from dmpo_lightning.samplers.base import Canvas, Draw, Sampler, Samples, draw_tokens, reveal_counts

Remasking = Literal["low_confidence", "random"]


class ConfidenceSampler(Sampler):
    """Blocks from left to right; in each step every masked position of the block draws a token, and the best are kept.

    Args:
        block_length: positions per block; None takes the whole completion as one block.
        denoising_steps: over all blocks, split evenly; None takes one token per step.
        remasking: ``low_confidence`` keeps the tokens of highest probability, ``random`` keeps random positions.
        temperature: of the exact categorical draw; 0 takes the most likely token.

    Raises:
        ValueError: impossible values; `validate` checks them against a completion length.
    """

    def __init__(
        self,
        *,
        block_length: int | None = None,
        denoising_steps: int | None = None,
        remasking: Remasking = "low_confidence",
        temperature: float = 1.0,
    ) -> None:
        super().__init__(temperature=temperature, denoising_steps=denoising_steps)
        if block_length is not None and block_length < 1:
            raise ValueError(f"`block_length` must be at least 1, or null for one block, got {block_length}.")
        if remasking not in ("low_confidence", "random"):
            raise ValueError(f"`remasking` must be low_confidence or random, got {remasking!r}.")
        self.block_length = block_length
        self.remasking = remasking

    def validate(self, completion_length: int) -> None:
        super().validate(completion_length)
        block = self.block_length or completion_length
        if completion_length % block:
            raise ValueError(
                f"`completion_length` must be a multiple of `block_length`, got {completion_length} and {block}."
            )
        blocks = completion_length // block
        if self.num_steps(completion_length) % blocks:
            raise ValueError(
                f"`denoising_steps` must be a multiple of the number of blocks, {blocks} (completion_length "
                f"{completion_length} / "
                f"block_length {block}), got {self.denoising_steps}; each block takes the same number of steps."
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
        canvas = Canvas.blank(policy, prompt_ids, prompt_mask, completion_length)
        block = self.block_length or completion_length
        steps = self.num_steps(completion_length) * block // completion_length
        for start in range(0, completion_length, block):
            masked = torch.arange(start, start + block, device=keys.device).expand(len(keys), -1)
            for step, count in enumerate(reveal_counts(block, steps), start=start // block * steps):
                masked = self._denoise(canvas, masked, count, keys, step)
        return canvas.samples()

    def _denoise(self, canvas: Canvas, masked: Tensor, count: int, keys: Tensor, step: int) -> Int[Tensor, "rows rest"]:
        """Reveals ``count`` of the block's masked places; returns those that stay masked, in order."""
        length = canvas.reveal_step.shape[1]
        draw = draw_tokens(
            canvas.logits_at(masked),
            masked,
            temperature=self.temperature,
            keys=keys,
            step=step,
            completion_length=length,
        )
        ranking = self._score(draw, masked, keys, step, length).argsort(dim=1, descending=True, stable=True)
        chosen, rest = ranking[:, :count], ranking[:, count:].sort(dim=1).values
        canvas.reveal(masked.gather(1, chosen), draw.at(chosen), step)
        return masked.gather(1, rest)

    def _score(self, draw: Draw, masked: Tensor, keys: Tensor, step: int, length: int) -> Float[Tensor, "rows places"]:
        if self.remasking == "low_confidence":
            return draw.confidence
        return uniforms(fold_in(fold_in(keys, Purpose.REMASKING), step), length).gather(1, masked)
