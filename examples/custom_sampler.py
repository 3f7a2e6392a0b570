"""A sampler of your own: entropy-bounded decoding (arXiv 2505.24857). YAML names it by its dotted path.

Run it from this folder: `dmpo-lightning fit --config sudoku_tiny.yaml --model.sampler=custom_sampler.EntropyBounded`.
"""

from torch.distributions import Categorical

from dmpo_lightning import Sampler
from dmpo_lightning.samplers import Canvas


class EntropyBounded(Sampler):
    """Reveals the surest tokens of each step, as many as have little to say about each other."""

    def __init__(self, bound: float = 0.1, temperature: float = 1.0) -> None:
        super().__init__(temperature=temperature)
        self.bound = bound

    def sample(self, policy, prompt_ids, prompt_mask, *, completion_length, keys):
        canvas = Canvas.blank(policy, prompt_ids, prompt_mask, completion_length, keys)
        positions = canvas.positions(canvas.whole)
        for step in range(completion_length):
            masked = canvas.masked(canvas.whole)
            # Ranks that share their weights go on together.
            if not policy.anywhere(bool(masked.any())):
                break
            logits = canvas.logits(positions)
            entropy, order = Categorical(logits=logits).entropy().masked_fill(~masked, float("inf")).sort(dim=1)
            # The sum of the entropies but the largest bounds what the tokens say about each other, in nats.
            chosen = masked.scatter(1, order, entropy.cumsum(1) - entropy <= self.bound) & masked
            canvas.reveal_where(canvas.whole, chosen, canvas.draw(logits, positions, step, self), step)
        return canvas.samples()
