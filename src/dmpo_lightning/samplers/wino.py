"""Wide-in, narrow-out decoding (WINO, arXiv 2507.18578): many tokens at once, the doubtful ones taken back."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dmpo_lightning.functional.masking import position_ranks
from dmpo_lightning.models.layers import padded_position_ids
from dmpo_lightning.policy import Policy
from dmpo_lightning.samplers.base import Sampler, Samples
from dmpo_lightning.samplers.canvas import Canvas
from dmpo_lightning.samplers.draws import log_odds

ACCEPTED_SHARE, FEWEST_CAP, HIGHEST_CAP = 0.7, 5, 20
"""A step accepts at most this share of a block's masked positions. It may always accept 5, and never more than 20."""


class WinoSampler(Sampler):
    """Unmasks block by block. Each step reveals all tokens above a low threshold and takes back what fails a check.

    The check costs no forward of its own. Each position of the block has a *shadow*: a mask token, appended to the
    sequence, that stands at the same position and sees all other shadows and everything but the token revealed there.
    Its logits therefore say how likely that token is in the light of all others. Fewer tokens are taken back than the
    step before revealed, so a block takes at most ``block_length`` steps.

    Args:
        block_length: see `Sampler`.
        threshold: reveal tokens above this probability, in (0, 1], and in any case the best one.
        verification_threshold: take back tokens to which their shadow gives less than this probability, in (0, 1].
        temperature: the temperature of the exact categorical draw. 0 takes the most likely token.
        top_k: see `Sampler`.
        top_p: see `Sampler`.

    Raises:
        ValueError: a value is impossible. At the first call: the model is not native, or it is shifted (Dream). There
            the logits of a token come from the column before it, whose shadow sees the token itself.

    Example:
        >>> from dmpo_lightning import MaskedSFT, WinoSampler
        >>> sampler = WinoSampler(threshold=0.5, verification_threshold=0.8)
        >>> MaskedSFT("sudoku_tiny").generate("1234341221434320", completion_length=20, sampler=sampler)[0].text
        '<answer>1234341221434321</answer>'
    """

    def __init__(
        self,
        *,
        block_length: int | None = None,
        threshold: float = 0.6,
        verification_threshold: float = 0.9,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> None:
        super().__init__(temperature=temperature, block_length=block_length, top_k=top_k, top_p=top_p)
        for name, value in (("threshold", threshold), ("verification_threshold", verification_threshold)):
            if not 0 < value <= 1:
                raise ValueError(f"`{name}` must be a probability in (0, 1], got {value}.")
        self.threshold, self.verification_threshold = threshold, verification_threshold

    def validate_policy(self, policy: Policy) -> None:
        if not policy.is_native or policy.lookback or policy.block_size is not None:
            raise ValueError(
                "WinoSampler needs a native bidirectional backbone whose logits stand at their own position (LLaDA), "
                f"got {type(policy.model).__name__}; use ConfidenceSampler(threshold=...)."
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
        length = self.block_length or completion_length
        for start in range(0, completion_length, length):
            ShadowedBlock(self, canvas, start, length).decode()
        return canvas.samples()


@dataclass
class ShadowedBlock:
    """The decoding of one block, in one call to `WinoSampler.sample`."""

    sampler: WinoSampler
    canvas: Canvas
    start: int
    length: int

    def decode(self) -> None:
        """Unmasks all of the block's positions, in at most as many steps as it has positions."""
        canvas, first = self.canvas, self.canvas.start + self.start
        block = slice(first, first + self.length)
        positions = canvas.positions(block)
        # The first step has none before it. Nothing is revealed yet that it could take back.
        revealed_before = torch.full_like(canvas.keys, self.length)
        for step in range(self.start, self.start + self.length):
            masked = canvas.masked(block)
            if not canvas.policy.anywhere(bool(masked.any())):
                break
            logits = self._logits(block, masked)
            draw = canvas.draw(logits, positions, step, self.sampler)
            chosen = accepted(draw.log_odds, masked, self.sampler.threshold)
            # Nothing is written yet: what is verified are the tokens that earlier steps revealed.
            verified = log_odds(logits, canvas.ids[:, block])
            # Else the logits would be alive beside those of the next step.
            del logits
            doubtful = taken_back(
                verified, masked, chosen, revealed_before, threshold=self.sampler.verification_threshold
            )
            canvas.reveal_where(block, chosen, draw, step)
            canvas.mask_where(block, doubtful)
            revealed_before = chosen.sum(1)

    def _logits(self, block: slice, masked: Bool[Tensor, "rows block"]) -> Float[Tensor, "rows block vocab"]:
        """Logits at each masked column of the block itself, and for each revealed column at its shadow."""
        canvas, (count, total) = self.canvas, self.canvas.ids.shape
        shadows = canvas.ids.new_full((count, self.length), canvas.policy.facts.mask_token_id)
        # In columns of the extended sequence, of which the shadows are the last ones.
        columns = torch.arange(self.length, device=masked.device) + torch.where(masked, block.start, total)
        rows = torch.arange(count, device=masked.device)[:, None]
        position_ids = padded_position_ids(canvas.ids, canvas.attention_mask)
        return canvas.policy.logits(
            torch.cat((canvas.ids, shadows), dim=1),
            shadow_attention(canvas.attention_mask, block.start, self.length),
            rows * (total + self.length) + columns,
            position_ids=torch.cat((position_ids, position_ids[:, block]), dim=1),
        )


def shadow_attention(
    attention_mask: Bool[Tensor, "rows total"], first: int, length: int
) -> Bool[Tensor, "rows extended extended"]:
    """Who sees whom once shadows of the ``length`` columns from ``first`` on are appended, True where seen.

    A shadow sees all shadows, and every column except the one that it stands for. Nothing else sees a shadow, so that
    the model's other logits are what they would be without any.
    """
    rows, total = attention_mask.shape
    own = torch.eye(length, dtype=torch.bool, device=attention_mask.device)
    seen = attention_mask[:, None, :].repeat(1, total + length, 1)
    seen[:, total:, first : first + length] &= ~own
    # The shadows see each other, as they do in the published code, although all that they show each other is a mask
    # token at a position.
    shadows = torch.cat((own.new_zeros(total, length), own.new_ones(length, length))).expand(rows, -1, -1)
    return torch.cat((seen, shadows), dim=2)


def accepted(
    odds: Float[Tensor, "rows block"], masked: Bool[Tensor, "rows block"], threshold: float
) -> Bool[Tensor, "rows block"]:
    """Chooses the best candidates of a probability above the threshold: no more than the step's cap, and in any case
    the best one. ``odds`` are the log-odds of the candidates.
    """
    candidates = odds.masked_fill(~masked, -torch.inf)
    # In float64, so that the product is cut down to the same whole number as a product of Python numbers.
    cap = (masked.sum(1).double() * ACCEPTED_SHARE).long().clamp(FEWEST_CAP, HIGHEST_CAP)
    count = (candidates.sigmoid() > threshold).sum(1).clamp(min=1).minimum(cap)
    return (position_ranks(-candidates) < count[:, None]) & masked


def taken_back(
    verified: Float[Tensor, "rows block"],
    masked: Bool[Tensor, "rows block"],
    chosen: Bool[Tensor, "rows block"],
    revealed_before: Int[Tensor, " rows"],
    *,
    threshold: float,
) -> Bool[Tensor, "rows block"]:
    """Chooses the revealed tokens whose verified probability is below the threshold, the worst first.

    ``verified`` are the log-odds that the shadows give to the tokens. Fewer are chosen than the step before revealed,
    which bounds the number of steps. Rows that reveal a single token in this step take none back.
    """
    verified = verified.masked_fill(masked, torch.inf)
    worst = position_ranks(verified) < (revealed_before - 1)[:, None]
    return (verified.sigmoid() < threshold) & ~masked & worst & (chosen.sum(1, keepdim=True) > 1)
