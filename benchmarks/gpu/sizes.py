"""The two sizes of the benchmark: the recipe of gsm8k.yaml on LLaDA-8B, and the same code in small for a processor."""

from dataclasses import dataclass

from dmpo_lightning.models.llada import LLaDAConfig


@dataclass(frozen=True)
class Size:
    """A model, and how its rollouts are sampled, scored and trained on."""

    name: str
    d_model: int
    n_layers: int
    n_heads: int
    mlp_hidden_size: int
    vocab_size: int
    prompt_length: int
    completion_length: int
    block_length: int
    denoising_steps: int
    group_size: int
    micro_batch_size: int
    num_iterations: int
    lora_rank: int
    square: int
    """Side of the matrices whose product is the measure of the card."""
    repeats: int
    replicates: int = 4
    elbo_samples: int = 4
    temperature: float = 0.2
    learning_rate: float = 3e-6

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.prompt_length + self.completion_length

    def config(self, *, n_layers: int | None = None) -> LLaDAConfig:
        """The model's configuration, with another number of layers if asked for."""
        return LLaDAConfig(
            d_model=self.d_model,
            n_layers=n_layers or self.n_layers,
            n_heads=self.n_heads,
            mlp_hidden_size=self.mlp_hidden_size,
            vocab_size=self.vocab_size,
            mask_token_id=self.vocab_size - 1,
            eos_token_id=0,
            pad_token_id=0,
        )

    @property
    def block_weights(self) -> int:
        """Weights of the matrices in one block."""
        return 4 * self.d_model**2 + 3 * self.d_model * self.mlp_hidden_size

    def flops(self, tokens: float, *, rows: float, attended: int, head_positions: float = 0) -> float:
        """Floating-point operations of one forward: products with the blocks' weights, attention, and the head.

        Args:
            tokens: that are computed, in all rows.
            rows: rows of them.
            attended: columns that each of them attends to.
            head_positions: positions at which the head is computed.
        """
        products = 2 * tokens * self.n_layers * self.block_weights
        attention = 4 * tokens * attended * self.d_model * self.n_layers
        return products + attention + 2 * head_positions * self.d_model * self.vocab_size


TINY = Size(
    name="tiny",
    d_model=64,
    n_layers=2,
    n_heads=2,
    mlp_hidden_size=128,
    vocab_size=512,
    prompt_length=12,
    completion_length=16,
    block_length=8,
    denoising_steps=8,
    group_size=4,
    micro_batch_size=2,
    num_iterations=2,
    lora_rank=4,
    square=256,
    repeats=3,
)
EIGHT_B = Size(
    name="8b",
    d_model=4096,
    n_layers=32,
    n_heads=32,
    mlp_hidden_size=12288,
    vocab_size=126464,
    prompt_length=200,
    completion_length=256,
    block_length=32,
    denoising_steps=128,
    group_size=16,
    micro_batch_size=8,
    num_iterations=8,
    lora_rank=128,
    square=8192,
    repeats=5,
)
SIZES = {size.name: size for size in (TINY, EIGHT_B)}
