"""What every sampler is, and the single-token draw they share."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dmpo_lightning.functional.randomness import Purpose, fold_in, inverse_cdf, uniforms
from dmpo_lightning.policy import Policy, full_attention_mask


@dataclass
class Samples:
    """Completions and how they came about."""

    completion_ids: Int[Tensor, "rows length"]
    reveal_step: Int[Tensor, "rows length"]
    """The denoising step that revealed each position, from 0."""
    log_prob: Float[Tensor, "rows length"]
    """Log-probability of each token in the step that revealed it, at the sampling temperature (0 for greedy)."""


class Sampler(ABC):
    """Unmasks completions. Subclasses say in which order; see `RandomOrderSampler` for the shortest.

    Args:
        temperature: of the exact categorical draw; 0 takes the most likely token.
        denoising_steps: forwards per completion; None takes one token per step.

    Raises:
        ValueError: a negative temperature, fewer than one step.
    """

    order_is_independent = False
    """True where the order of unmasking does not depend on the tokens, so that log p(completion | order) is exact."""

    def __init__(self, *, temperature: float = 1.0, denoising_steps: int | None = None) -> None:
        if temperature < 0:
            raise ValueError(f"`temperature` must be at least 0 (0 = greedy), got {temperature}.")
        if denoising_steps is not None and denoising_steps < 1:
            raise ValueError(
                f"`denoising_steps` must be at least 1, or null for one token per step, got {denoising_steps}."
            )
        self.temperature = temperature
        self.denoising_steps = denoising_steps

    def validate(self, completion_length: int) -> None:
        """Raises ValueError where the sampler cannot unmask completions of this length."""
        steps = self.denoising_steps
        if steps is not None and steps > completion_length:
            raise ValueError(
                f"`denoising_steps` must be at most `completion_length`, got {steps} and {completion_length}; use "
                f"null for one token per step."
            )

    def num_steps(self, completion_length: int) -> int:
        """Forwards per completion."""
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
        """Completions of ``completion_length`` tokens, one per key; the caller provides eval mode and no_grad."""

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in vars(self).items())
        return f"{type(self).__name__}({options})"


@dataclass
class Canvas:
    """The partly unmasked sequences of one call to `Sampler.sample`."""

    policy: Policy
    ids: Int[Tensor, "rows total"]
    attention_mask: Bool[Tensor, "rows total"]
    prompt_length: int
    reveal_step: Int[Tensor, "rows length"]
    log_prob: Float[Tensor, "rows length"]

    @classmethod
    def blank(cls, policy: Policy, prompt_ids: Tensor, prompt_mask: Tensor, completion_length: int) -> "Canvas":
        """The prompts followed by completions of mask tokens."""
        shape = (prompt_ids.shape[0], completion_length)
        return cls(
            policy,
            torch.cat((prompt_ids, prompt_ids.new_full(shape, policy.facts.mask_token_id)), dim=1),
            full_attention_mask(prompt_mask, completion_length),
            prompt_ids.shape[1],
            prompt_ids.new_full(shape, -1),
            torch.zeros(shape, device=prompt_ids.device),
        )

    def logits_at(self, places: Int[Tensor, "rows places"]) -> Float[Tensor, "rows places vocab"]:
        """Logits at places of the completion (0 is its first token)."""
        offset = (
            torch.arange(self.ids.shape[0], device=self.ids.device)[:, None] * self.ids.shape[1] + self.prompt_length
        )
        return self.policy.logits(self.ids, self.attention_mask, places + offset)

    def reveal(self, places: Int[Tensor, "rows places"], draw: "Draw", step: int) -> None:
        """Writes drawn tokens at places of the completion."""
        self.ids.scatter_(1, places + self.prompt_length, draw.tokens)
        self.reveal_step.scatter_(1, places, step)
        self.log_prob.scatter_(1, places, draw.log_prob)

    def samples(self) -> Samples:
        """The finished completions."""
        return Samples(self.ids[:, self.prompt_length :], self.reveal_step, self.log_prob)


@dataclass
class Draw:
    """One candidate token per place."""

    tokens: Int[Tensor, "rows places"]
    log_prob: Float[Tensor, "rows places"]
    """At the sampling temperature; 0 for greedy."""
    confidence: Float[Tensor, "rows places"]
    """Probability of the token at temperature 1, whatever the sampling temperature."""

    def at(self, index: Int[Tensor, "rows chosen"]) -> "Draw":
        """The draws at some of the places."""
        return Draw(self.tokens.gather(1, index), self.log_prob.gather(1, index), self.confidence.gather(1, index))


def draw_tokens(
    logits: Float[Tensor, "rows places vocab"],
    places: Int[Tensor, "rows places"],
    *,
    temperature: float,
    keys: Int[Tensor, " rows"],
    step: int,
    completion_length: int,
) -> Draw:
    """Exact draws from softmax(logits / temperature), one keyed uniform per (row, step, position)."""
    probabilities = logits.softmax(-1)
    if temperature == 0:
        tokens = logits.argmax(-1)
        confidence = probabilities.gather(-1, tokens[..., None]).squeeze(-1)
        return Draw(tokens, torch.zeros_like(confidence), confidence)
    uniform = uniforms(fold_in(fold_in(keys, Purpose.TOKEN), step), completion_length).gather(1, places)
    tempered = probabilities if temperature == 1 else (logits / temperature).softmax(-1)
    tokens = inverse_cdf(tempered, uniform)
    chosen = tempered.gather(-1, tokens[..., None]).squeeze(-1)
    return Draw(tokens, chosen.log(), probabilities.gather(-1, tokens[..., None]).squeeze(-1))


def reveal_counts(places: int, steps: int) -> list[int]:
    """How many of ``places`` each of ``steps`` steps reveals: as even as can be, the larger ones first."""
    share, extra = divmod(places, steps)
    return [share + (step < extra) for step in range(steps)]
