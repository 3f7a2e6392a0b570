"""What the configurations of the native models check, so that no model is built as another one than it is."""

from collections.abc import Collection, Mapping
from typing import Any

_SHARED: Mapping[str, Collection[object]] = {
    "partial_rotary_factor": (None, 1.0),
    "use_sliding_window": (None, False),
    "use_mrope": (None, False),
    "is_causal": (None, False),
    "num_experts": (None, 0),
}
"""Keys by which relatives of these models differ from them, and the values by which they do not."""


def check_switches(family: str, published: Mapping[str, object], stated: Mapping[str, Any]) -> None:
    """Checks switches that are built in one setting alone, the one that all ``published`` models have.

    Raises:
        ValueError: a ``stated`` key of a configuration sets one of them otherwise, or one that would make a relative of
            the model out of it, such as layers that see a window alone.
    """
    allowed = {**_SHARED, **{name: (value,) for name, value in published.items()}}
    for name, values in allowed.items():
        if name in stated and stated[name] not in values:
            raise ValueError(
                f"{family} with {name}={stated[name]!r} is not supported; published checkpoints have "
                f"{published.get(name)!r}."
            )
    if other := set(stated.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError(f"{family} with layers of the types {sorted(other)} is not supported; all must see all.")


def check_heads(config: Any, stated: Mapping[str, Any]) -> None:
    """Raises ValueError for numbers of heads that do not divide the width, or each other, or into even head sizes."""
    heads, width, key_heads = config.num_attention_heads, config.hidden_size, config.num_key_value_heads
    # Even head sizes, because rotary positions pair a head's dimensions.
    if width % heads or heads % key_heads or (width // heads) % 2:
        raise ValueError(
            "`num_attention_heads` must divide `hidden_size` into even head sizes and be a multiple of "
            f"`num_key_value_heads`, got {heads}, {width} and {key_heads}."
        )
    if stated.get("head_dim") not in (None, width // heads):
        raise ValueError(
            f"`head_dim` must be `hidden_size` / `num_attention_heads` = {width // heads}, got {stated['head_dim']}."
        )


def head_size(config: Any) -> int:
    """The size of a head, which a configuration states as ``head_dim`` or divides its width into."""
    stated: int | None = getattr(config, "head_dim", None)
    return stated or config.hidden_size // config.num_attention_heads


def rotary_base(family: str, stated: Mapping[str, Any], default: float) -> float:
    """The base of rotary positions, which transformers 5 writes among the ``rope_parameters``.

    Args:
        family: the family's name, for the error.
        stated: the keys of a configuration.
        default: the value of ``rope_theta``, which holds where the rotary parameters state no other.

    Raises:
        ValueError: positions are scaled (YaRN and the like) or rotated in part, which no published model of these
            families has.
    """
    base = default
    for name in ("rope_scaling", "rope_parameters"):
        rope = stated.get(name) or {}
        plain = rope.get("rope_type", rope.get("type", "default")) == "default"
        if not plain or rope.get("factor", 1.0) != 1.0 or rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(f"{family} with scaled rotary positions is not supported, got {rope}.")
        base = rope.get("rope_theta", base)
    return base
