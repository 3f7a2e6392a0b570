"""What the configurations of the native models check: nothing that a checkpoint asks for is ignored without a word."""

from collections.abc import Mapping
from typing import Any


def check_switches(family: str, published: Mapping[str, object], stated: Mapping[str, Any]) -> None:
    """Checks switches that are built in one setting alone, the one that all ``published`` models have.

    Raises:
        ValueError: a ``stated`` key of a configuration sets one of them otherwise.
    """
    for name, value in published.items():
        if stated.get(name, value) != value:
            raise ValueError(
                f"{family} with {name}={stated[name]!r} is not supported; published checkpoints have {value!r}."
            )


def check_heads(config: Any) -> None:
    """Raises ValueError for numbers of heads that do not divide the width, or each other, or into even head sizes."""
    heads, width, key_heads = config.num_attention_heads, config.hidden_size, config.num_key_value_heads
    # Even head sizes, because rotary positions pair a head's dimensions.
    if width % heads or heads % key_heads or (width // heads) % 2:
        raise ValueError(
            "`num_attention_heads` must divide `hidden_size` into even head sizes and be a multiple of "
            f"`num_key_value_heads`, got {heads}, {width} and {key_heads}."
        )


def rotary_base(family: str, stated: Mapping[str, Any], default: float) -> float:
    """The base of rotary positions, which transformers 5 writes among the ``rope_parameters``.

    Args:
        family: the family's name, for the error.
        stated: the keys of a configuration.
        default: the value of ``rope_theta``, which holds where the rotary parameters state no other.

    Raises:
        ValueError: positions are scaled (YaRN and the like), which no published model of these families has.
    """
    rope = stated.get("rope_scaling") or stated.get("rope_parameters") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default" or rope.get("factor", 1.0) != 1.0:
        raise ValueError(f"{family} with scaled rotary positions is not supported, got {rope}.")
    return rope.get("rope_theta", default)
