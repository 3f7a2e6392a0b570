"""Bytes that autograd keeps of a forward, and bytes that a forward needs in passing.

The terms follow `LLaDALayer` with scaled dot-product attention. `tests/planning/test_planning_measured.py` compares
them with what torch measures.
"""

from dataclasses import dataclass

from dmpo_lightning.models.head import CHUNK_TOKENS, chunk_rows
from dmpo_lightning.models.lora import LoRA
from dmpo_lightning.planning.parameters import Architecture, Linear, adapted_linears
from dmpo_lightning.planning.precision import Precision
from dmpo_lightning.samplers import SamplingFootprint

FLOAT32 = 4.0
INT64 = 8.0


@dataclass(frozen=True)
class Activations:
    """Bytes per token of one model's activations under one precision."""

    architecture: Architecture
    precision: Precision
    adapter: LoRA | None = None
    on_cpu: bool = False

    @property
    def query_width(self) -> int:
        """Numbers per token in all query heads."""
        return self.architecture.heads * self.architecture.head_size

    @property
    def key_width(self) -> int:
        """Numbers per token in all key heads."""
        return self.architecture.key_heads * self.architecture.head_size

    @property
    def is_full(self) -> bool:
        """Whether all weights are trained, so that each layer keeps its input."""
        return self.adapter is None

    def saved_per_token(self) -> float:
        """What one block keeps for its backward pass: of two norms, attention, the MLP and its linear layers."""
        return 2 * self._norm() + self._attention() + self._mlp() + self._linear_inputs()

    def _norm(self) -> float:
        """A norm keeps its input and the inverse root in float32, in which it computes.

        It also keeps its result where its scale is learned.
        """
        width, stream = self.architecture.width, self.precision.stream
        return FLOAT32 * width + FLOAT32 + self.is_full * stream * width

    def _attention(self) -> float:
        """Attention keeps rotated queries and keys, values, its result, and each head's log-sum-exp.

        Its result is the input of the next linear layer too, which is therefore not counted there.
        """
        numbers = 2 * self.query_width + 2 * self.key_width
        kept = self.precision.attention * numbers + FLOAT32 * self.architecture.heads
        if not self.architecture.normalises_heads:
            return kept
        # Norms of single heads keep what the norms of whole states do.
        normalised, heads = self.query_width + self.key_width, self.architecture.heads + self.architecture.key_heads
        return kept + FLOAT32 * (normalised + heads) + self.is_full * self.precision.stream * normalised

    def _mlp(self) -> float:
        """The MLP keeps its gate before and after the SiLU, and the other factor.

        Their product counts as the input of a linear layer.
        """
        return 3 * self.precision.compute * self.architecture.mlp_width

    def _linear_inputs(self) -> float:
        """Linear layers keep what their trained weights are multiplied with."""
        return self._full_inputs() if self.adapter is None else self._adapter_inputs(self.adapter)

    def _full_inputs(self) -> float:
        """Inputs where all weights are trained: the results of the two norms, and the MLP's product.

        Autocast casts a norm's float32 result once for each of the five layers that read it.
        """
        width, compute = self.architecture.width, self.precision.compute
        copies = 5 if compute < self.precision.stream else 2
        return compute * (copies * width + self.architecture.mlp_width)

    def _adapter_inputs(self, adapter: LoRA) -> float:
        """Inputs of adapters: the low-rank result of each, and its input.

        Adapters on layers that read the same tensor share it, unless dropout or another type makes each a copy.
        """
        # Under autocast adapters multiply in half precision, though their weights are float32.
        kept = 2.0 if self.precision.autocast else self.precision.adapter
        adapted = adapted_linears(self.architecture, adapter)
        low_rank = kept * adapter.r * len(adapted)
        own_copies = adapter.dropout > 0 or kept != self.precision.compute or self.precision.autocast
        # Dropout keeps its mask: a GPU's kernel as booleans, a processor's in the type of the input.
        mask = (self.precision.adapter if self.on_cpu else 1.0) if adapter.dropout else 0.0
        if own_copies:
            return (low_rank + (kept + mask) * sum(linear.in_features for linear in adapted)) / self.architecture.blocks
        return low_rank / self.architecture.blocks + self._shared_inputs(adapted)

    def _shared_inputs(self, adapted: tuple[Linear, ...]) -> float:
        """Query, key and value read one tensor, gate and up another. Layers are told apart by their names."""
        # The result of attention is kept by attention itself, see `_attention`.
        groups = {_reads(linear) for linear in adapted} - {"attention"}
        widths = {"attention norm": self.architecture.width, "mlp norm": self.architecture.width}
        return self.precision.compute * sum(widths.get(group, self.architecture.mlp_width) for group in groups)

    def backward_per_token(self) -> float:
        """Gradients alive in a block's backward pass beside what is kept: those of the stream and the MLP's product.

        An adapter that is wider than what linear layers return adds the second in its own type, twice with dropout.
        """
        wide = self.adapter is not None and self.precision.adapter != self.precision.compute
        again = self.precision.adapter * (2 if self.adapter and self.adapter.dropout else 1) if wide else 0.0
        mlp = (self.precision.compute + again) * self.architecture.mlp_width
        return self.precision.stream * self.architecture.width + mlp

    def tail_per_token(self) -> float:
        """What is kept beside the blocks: token ids, rotary tables, and the final norm."""
        return INT64 + 2 * FLOAT32 * self.architecture.head_size + self._norm()

    def inputs_per_token(self) -> float:
        """The inputs of all blocks, which are what checkpointing keeps."""
        return self.precision.stream * self.architecture.width * self.architecture.blocks

    def passing_per_token(self) -> float:
        """What is alive at once in a block without gradient.

        These are its input, ids, rotary tables, the stream and a norm's result, and beside them the larger of two
        moments: the rotation of the queries, or the MLP.
        """
        width, compute = self.architecture.width, self.precision.compute
        stream = 2 * self.precision.stream * width + compute * width
        stream += 2 * INT64 + 2 * FLOAT32 * self.architecture.head_size
        # `apply_rotary` holds a product, a rolled copy and the sum in float32, and a cast of an input that is narrower.
        rotation = (3 if compute == FLOAT32 else 4) * FLOAT32 * self.query_width
        attention = compute * (self.query_width + 2 * self.key_width) + rotation
        return stream + max(attention, 3 * compute * self.architecture.mlp_width)


def _reads(linear: Linear) -> str:
    if any(mark in linear.leaf for mark in ("q_proj", "k_proj", "v_proj", "query", "key", "value")):
        return "attention norm"
    if linear.leaf in ("attn_out", "o_proj"):
        return "attention"
    return "mlp norm" if linear.leaf in ("ff_proj", "up_proj", "gate_proj") else "mlp product"


@dataclass(frozen=True)
class Head:
    """Bytes of the output head at a number of positions.

    For log-probs its scores exist a tile at a time (see `linear_log_probs`), for drawing tokens all at once.
    """

    vocab_size: int
    width: int
    precision: Precision
    is_learned: bool = False

    def _tile(self, positions: float) -> float:
        """The scores of one tile in float32, and beside them in the type of a matrix product that is narrower."""
        rows = min(positions, chunk_rows(self.vocab_size))
        # A product in half precision is cast to float32, and both exist for a moment.
        narrow = self.precision.compute if self.precision.compute < FLOAT32 else 0.0
        return rows * min(self.vocab_size, CHUNK_TOKENS) * (max(FLOAT32, self.precision.compute) + narrow)

    def scoring(self, positions: float) -> float:
        """Log-probs without gradient need one tile."""
        return self._tile(positions)

    def forward(self, positions: float) -> float:
        """Log-probs with gradient. A frozen head also sums up mean weight vectors, which become the gradient."""
        if self.is_learned:
            return self._tile(positions)
        rows = min(positions, chunk_rows(self.vocab_size))
        return self._tile(positions) + 2 * FLOAT32 * rows * self.width

    def backward(self, positions: float) -> float:
        """A frozen head holds the gradient that goes out. A learned one makes the tiles again and holds its own too."""
        if not self.is_learned:
            return positions * self.width * (FLOAT32 + self.precision.compute)
        tokens = min(self.vocab_size, CHUNK_TOKENS)
        own = self.precision.weight * self.vocab_size + 2 * FLOAT32 * tokens
        return self._tile(positions) + (own + FLOAT32 * positions) * self.width

    def logits(self, positions: float) -> float:
        """Float32 logits of the whole vocabulary."""
        return positions * self.vocab_size * FLOAT32

    def sampling(self, positions: float, asked: SamplingFootprint) -> float:
        """The logits at ``positions``, and what is made of them until tokens are drawn.

        A draw holds the logits and their exponentials, and at temperatures other than 1 also the tempered ones.
        Cumulative probabilities exist within a bucket of the vocabulary only.
        """
        copies = 2.0 if asked.temperature in (0.0, 1.0) else 3.0
        # 512 is the size of a bucket in `inverse_cdf`, within which alone probabilities are cumulated.
        copies += min(1.0, 512 / self.vocab_size) if asked.temperature else 0.0
        if asked.sorts:
            # Sorted probabilities, their sums, a boolean for each, and their tokens in int64.
            copies += 4.25
        return copies * self.logits(positions)
