"""What every sampler has to provide, and what it returns."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

from dmpo_lightning.policy import Policy
from dmpo_lightning.samplers.draws import Confidence


@dataclass
class Samples:
    """Completions and how they came about, as the denoising steps recorded it."""

    completion_ids: Int[Tensor, "rows length"]
    reveal_step: Int[Tensor, "rows length"]
    """The denoising step that revealed each position, from 0. It is -1 where an early exit filled in the token."""
    log_prob: Float[Tensor, "rows length"]
    """The log-prob of each token in the distribution that it was drawn from, 0 where that was greedy."""


class Sampler(ABC):
    """Unmasks completions. A subclass says in which order. `RandomOrderSampler` is the shortest example.

    Ranks that share sharded weights must run equally many forwards, because each forward gathers weights from all of
    them. A sampler whose number of forwards depends on what it samples therefore asks
    ``policy.anywhere(work_is_left)`` before it stops, and runs forwards for nothing as long as that is True.

    Args:
        temperature: the temperature of the exact categorical draw. 0 takes the most likely token.
        denoising_steps: the number of steps per completion, split evenly among blocks. None reveals one token per step.
        block_length: the number of positions per block. Blocks are unmasked from left to right. None takes the whole
            completion as one block, and a block-causal model's own blocks.
        top_k: draw from so many most likely tokens, at least 1. None draws from all.
        top_p: draw from the fewest most likely tokens that hold this probability, in (0, 1]. None draws from all. It
            cuts after ``top_k``, and for Dream before it, as published.

    Raises:
        ValueError: a value is outside its range.

    Example:
        >>> from dmpo_lightning import MaskedSFT, Sampler
        >>> from dmpo_lightning.samplers import Canvas
        >>> class LeftToRight(Sampler):
        ...     def sample(self, policy, prompt_ids, prompt_mask, *, completion_length, keys):
        ...         canvas = Canvas.blank(policy, prompt_ids, prompt_mask, completion_length, keys)
        ...         positions = canvas.positions(canvas.whole)
        ...         for step in range(completion_length):
        ...             masked = canvas.masked(canvas.whole)
        ...             first = masked & (masked.cumsum(1) == 1)
        ...             drawn = canvas.draw(canvas.logits(positions), positions, step, self)
        ...             canvas.reveal_where(canvas.whole, first, drawn, step)
        ...         return canvas.samples()
        >>> module, sampler = MaskedSFT("sudoku_tiny"), LeftToRight(temperature=0.0)
        >>> module.generate("1234341221434320", completion_length=20, sampler=sampler)[0].text
        '<answer>1234341221434321</answer>'
    """

    order_is_independent = False
    """Whether the order of unmasking is independent of the tokens, so that log p(completion | order) is exact."""
    rewrites = False
    """Whether a revealed token may be written anew, so that nobody can tell what was masked when it was drawn."""
    confidence: Confidence | None = None
    """What the `Draw.confidence` of a token is. None is what the model's published decoding has."""

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        denoising_steps: int | None = None,
        block_length: int | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> None:
        # Written so that NaN, which compares as false with everything, fails.
        if not 0 <= temperature < math.inf:
            raise ValueError(f"`temperature` must be at least 0 and finite (0 = greedy), got {temperature}.")
        if denoising_steps is not None and denoising_steps < 1:
            raise ValueError(
                f"`denoising_steps` must be at least 1, or null for one token per step, got {denoising_steps}."
            )
        if block_length is not None and block_length < 1:
            raise ValueError(f"`block_length` must be at least 1, or null for one block, got {block_length}.")
        if top_k is not None and top_k < 1:
            raise ValueError(f"`top_k` must be at least 1 token, or null for all, got {top_k}.")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"`top_p` must be a probability in (0, 1], or null for all tokens, got {top_p}.")
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.denoising_steps, self.block_length = denoising_steps, block_length

    def validate(self, completion_length: int) -> None:
        """Raises ValueError where the sampler cannot unmask completions of this many tokens."""
        steps, block = self.num_steps(completion_length), self.block_length or completion_length
        # A step that reveals nothing would be a forward for nothing.
        if steps > completion_length:
            raise ValueError(
                f"`denoising_steps` must be at most `completion_length`, got {steps} and {completion_length}; "
                "use null for one token per step."
            )
        if completion_length % block:
            raise ValueError(
                f"`completion_length` must be a multiple of `block_length`, got {completion_length} and {block}."
            )
        if steps % (completion_length // block):
            raise ValueError(
                f"`denoising_steps` must be a multiple of the number of blocks, {completion_length // block} "
                f"(completion_length {completion_length} / block_length {block}), got {steps}; "
                "each block takes the same number of steps."
            )

    def validate_policy(self, policy: Policy) -> None:
        """Raises ValueError where the sampler needs something that the policy's model cannot do."""
        if policy.block_size is not None and self.block_length not in (None, policy.block_size):
            raise ValueError(
                f"`block_length` of {type(self).__name__} must be null or {policy.block_size} with "
                f"{type(policy.model).__name__}, whose blocks are its own, got {self.block_length}."
            )

    def num_steps(self, completion_length: int) -> int:
        """The number of forwards that a completion takes at most."""
        return self.denoising_steps or completion_length

    @abstractmethod
    def sample(
        self,
        policy: Policy,
        prompt_ids: Int[Tensor, "rows prompt"],
        prompt_mask: Bool[Tensor, "rows prompt"],
        *,
        completion_length: int,
        keys: Int[Tensor, " rows"],
    ) -> Samples:
        """Samples one completion of ``completion_length`` tokens per row.

        All randomness comes from the rows' ``keys``, so that a completion does not depend on which other rows there
        are. The caller provides eval mode and ``no_grad``.
        """

    def diagnostics(self, reveal_step: Int[Tensor, "*rows length"]) -> dict[str, Tensor]:
        """Numbers to log, by name, of completions whose tokens were revealed in these steps. None by itself."""
        return {}

    def __repr__(self) -> str:
        # Error messages name the sampler that does not fit, and only its options tell two of a class apart.
        options = ", ".join(f"{name}={value}" for name, value in vars(self).items())
        return f"{type(self).__name__}({options})"


def reveal_counts(positions: int, steps: int) -> list[int]:
    """How many of ``positions`` each of ``steps`` steps reveals: as evenly as possible, and larger numbers first."""
    # The remainder goes to the first steps, as in LLaDA's published sampler, so that greedy decoding draws the same
    # tokens (`benchmarks/plain.py` repeats that sampler).
    share, extra = divmod(positions, steps)
    return [share + (step < extra) for step in range(steps)]
