"""Bytes per number, by what the number is: a weight, an adapter's, of the residual stream, of what autograd keeps."""

from dataclasses import dataclass

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Per weight: 4 bits, one 8-bit scale per 64 weights, one float32 scale per 256 of those (double quantisation)."""

_BYTES = {"float64": 8.0, "float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "half": 2.0, "float": 4.0, "double": 8.0}


@dataclass(frozen=True)
class Precision:
    """Bytes per number under a checkpoint's ``dtype``, a Trainer precision and a quantisation.

    Args:
        weight: of base weights, except those of quantised layers.
        block_linear: of the weights of the blocks' linear layers.
        adapter: of the weights of an adapter.
        stream: of the residual stream between layers.
        compute: of what linear layers return, which is most of what autograd keeps.
        attention: of queries, keys, values and their result.
        autocast: whether the Trainer casts inputs of layers, rather than the weights once and for all.
    """

    weight: float
    block_linear: float
    adapter: float
    stream: float
    compute: float
    attention: float
    autocast: bool

    @classmethod
    def of(cls, *, dtype: str, trainer: str | int | None, quantization: str | None = None) -> "Precision":
        """What the three settings make of each kind of number.

        A ``*-true`` half precision converts the whole module. Otherwise PEFT keeps adapters in float32. Under a
        quantisation PEFT raises all other weights to float32, and bitsandbytes returns the type it was given. Then
        activations are float32 too, even under autocast, and only ``bf16-true`` makes them small.

        Raises:
            ValueError: an unknown ``dtype``.
        """
        if dtype not in _BYTES:
            raise ValueError(f"`dtype` must be one of {', '.join(_BYTES)}, got {dtype!r}.")
        name = str(trainer or "32-true")
        autocast = name in ("16-mixed", "bf16-mixed", "16", "bf16")
        whole = {"16-true": 2.0, "bf16-true": 2.0, "64-true": 8.0, "64": 8.0}.get(name)
        quantized = quantization is not None
        # PEFT prepares a quantised model by raising all that is not quantised to float32.
        weight = whole or (4.0 if quantized else _BYTES[dtype])
        return cls(
            weight=weight,
            block_linear=NF4_BYTES if quantized else weight,
            adapter=whole or max(4.0, weight),
            stream=weight,
            compute=2.0 if autocast and not quantized else weight,
            attention=2.0 if autocast else weight,
            autocast=autocast,
        )
