"""What autograd keeps of a forward, and what a forward needs in passing. Bytes, derived from `LLaDABlock` with SDPA.

Checked against torch's memory tracker in `tests/planning/test_planning_measured.py`.
"""

from dataclasses import dataclass

from dmpo_lightning.models.linear_log_probs import CHUNK_TOKENS, chunk_rows
from dmpo_lightning.planning.parameters import Architecture, Linear, adapted_linears
from dmpo_lightning.planning.precision import Precision
from dmpo_lightning.planning.settings import Adapter

FLOAT32 = 4.0
INT64 = 8.0


@dataclass(frozen=True)
class Activations:
    """Bytes of activations of one model under one precision; rows and tokens come as arguments."""

    architecture: Architecture
    precision: Precision
    adapter: Adapter | None = None
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
        """Kept for the backward pass of one block: two norms, attention, the MLP, and the inputs of linear layers."""
        return 2 * self._norm() + self._attention() + self._mlp() + self._linear_inputs()

    def _norm(self) -> float:
        """Its input and, to learn its scale, its result, both in the float32 it computes in; and the inverse root."""
        width, stream = self.architecture.width, self.precision.stream
        return FLOAT32 * width + FLOAT32 + self.is_full * stream * width

    def _attention(self) -> float:
        """Rotated queries and keys, values, result (also the input of the next layer), log-sum-exp of each head."""
        numbers = 2 * self.query_width + 2 * self.key_width
        return self.precision.attention * numbers + FLOAT32 * self.architecture.heads

    def _mlp(self) -> float:
        """The gate before and after its SiLU, and the other factor; the product counts as a linear layer's input."""
        return 3 * self.precision.compute * self.architecture.mlp_width

    def _linear_inputs(self) -> float:
        """Inputs kept to learn weights. The attention's result is kept anyway."""
        return self._full_inputs() if self.adapter is None else self._adapter_inputs(self.adapter)

    def _full_inputs(self) -> float:
        """The two norms' results and the MLP's product; autocast casts a float32 norm's result once per layer."""
        width, compute = self.architecture.width, self.precision.compute
        copies = 5 if compute < self.precision.stream else 2
        return compute * (copies * width + self.architecture.mlp_width)

    def _adapter_inputs(self, adapter: Adapter) -> float:
        """Each adapter's low-rank result, and its own copy of the input unless layers can share one."""
        kept = 2.0 if self.precision.autocast else self.precision.adapter
        adapted = adapted_linears(self.architecture, adapter)
        low_rank = kept * adapter.r * len(adapted)
        own_copies = adapter.dropout > 0 or kept != self.precision.compute or self.precision.autocast
        mask = (self.precision.adapter if self.on_cpu else 1.0) if adapter.dropout else 0.0
        if own_copies:
            return (low_rank + (kept + mask) * sum(linear.in_features for linear in adapted)) / self.architecture.blocks
        return low_rank / self.architecture.blocks + self._shared_inputs(adapted)

    def _shared_inputs(self, adapted: tuple[Linear, ...]) -> float:
        """Query, key and value read one tensor, gate and up another; distinguished by what the layer is called."""
        groups = {_reads(linear) for linear in adapted} - {"attention"}
        widths = {"attention norm": self.architecture.width, "mlp norm": self.architecture.width}
        return self.precision.compute * sum(widths.get(group, self.architecture.mlp_width) for group in groups)

    def backward_per_token(self) -> float:
        """Gradients alive in a block's backward pass beside what is kept: of the stream, and of the MLP's product.

        An adapter wider than what linear layers return adds the same gradient in its own type, twice with dropout.
        """
        wide = self.adapter is not None and self.precision.adapter != self.precision.compute
        again = self.precision.adapter * (2 if self.adapter and self.adapter.dropout else 1) if wide else 0.0
        mlp = (self.precision.compute + again) * self.architecture.mlp_width
        return self.precision.stream * self.architecture.width + mlp

    def tail_per_token(self) -> float:
        """Beside the blocks: token ids, rotary tables, the final norm."""
        return INT64 + 2 * FLOAT32 * self.architecture.head_size + self._norm()

    def inputs_per_token(self) -> float:
        """Block inputs, all that checkpointing keeps."""
        return self.precision.stream * self.architecture.width * self.architecture.blocks

    def passing_per_token(self) -> float:
        """Alive at once in a block without gradient: its input, ids, rotary tables, the stream, a norm's result, and
        the larger of rotating the queries and of the MLP.
        """
        width, compute = self.architecture.width, self.precision.compute
        stream = 2 * self.precision.stream * width + compute * width
        stream += 2 * INT64 + 2 * FLOAT32 * self.architecture.head_size
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
    """Bytes of the output head at a number of positions. Scores exist a tile at a time; see `linear_log_probs`."""

    vocab_size: int
    width: int
    precision: Precision
    is_learned: bool = False

    def _tile(self, positions: float) -> float:
        """Scores in float32, and in the type of a matrix product that is narrower."""
        rows = min(positions, chunk_rows(self.vocab_size))
        narrow = self.precision.compute if self.precision.compute < FLOAT32 else 0.0
        return rows * min(self.vocab_size, CHUNK_TOKENS) * (max(FLOAT32, self.precision.compute) + narrow)

    def scoring(self, positions: float) -> float:
        """Of log-probs without gradient."""
        return self._tile(positions)

    def forward(self, positions: float) -> float:
        """Of log-probs with gradient; of a frozen head the mean weight vectors are summed up beside a tile."""
        if self.is_learned:
            return self._tile(positions)
        rows = min(positions, chunk_rows(self.vocab_size))
        return self._tile(positions) + 2 * FLOAT32 * rows * self.width

    def backward(self, positions: float) -> float:
        """Of a frozen head the gradient that goes out; of a learned one also its own, and a tile."""
        if not self.is_learned:
            return positions * self.width * (FLOAT32 + self.precision.compute)
        tokens = min(self.vocab_size, CHUNK_TOKENS)
        own = self.precision.weight * self.vocab_size + 2 * FLOAT32 * tokens
        return self._tile(positions) + (own + FLOAT32 * positions) * self.width

    def sampling(self, positions: float, temperature: float) -> float:
        """Of a draw: logits, shifted ones (at temperature 1 their exponentials), tempered ones beside them; cumulative
        ones are kept within a bucket of the vocabulary only.
        """
        copies = 2.0 if temperature in (0.0, 1.0) else 3.0
        copies += min(1.0, 512 / self.vocab_size) if temperature else 0.0
        return positions * self.vocab_size * copies * FLOAT32
