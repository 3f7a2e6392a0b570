"""The brace that closes another, in long texts too: eight braces are looked up at once."""

from functools import cache

_OPEN_IS_1 = bytes.maketrans(b"{}", b"10")
_OTHERS = bytes(set(range(256)) - set(b"{}"))
_FIRST_WINDOW = 256


def closing_brace(text: str, start: int) -> int | None:
    """Place of the first ``}`` from ``start`` on that closes as many braces as were opened; None if there is none."""
    depth, window = 0, _FIRST_WINDOW
    while start < len(text):
        bits = text[start : start + window].encode("utf-8", "surrogatepass").translate(_OPEN_IS_1, _OTHERS)
        depth, number = _follow(bits, depth)
        if number is not None:
            return _place_of_brace(text, start, start + window, number)
        start, window = start + window, 2 * window
    return None


def _follow(bits: bytes, depth: int) -> tuple[int, int | None]:
    """The depth behind the braces ``bits`` (1 opens), and the number of the one that brought it to 0 from above."""
    whole = len(bits) // 8
    for number, eight in enumerate(int(bits[: 8 * whole] or b"0", 2).to_bytes(whole, "big")):
        if -8 < depth <= 8:
            depth, closed = _after_eight(depth, eight)
            if closed is not None:
                return 0, 8 * number + closed
        else:
            depth += _net(eight)
    for number, bit in enumerate(bits[8 * whole :], 8 * whole):
        depth += 1 if bit == ord("1") else -1
        if depth == 0 and bit == ord("0"):
            return 0, number
    return depth, None


@cache
def _after_eight(depth: int, eight: int) -> tuple[int, int | None]:
    for number, bit in enumerate(f"{eight:08b}"):
        depth += 1 if bit == "1" else -1
        if depth == 0 and bit == "0":
            return 0, number
    return depth, None


@cache
def _net(eight: int) -> int:
    return 2 * eight.bit_count() - 8


def _place_of_brace(text: str, low: int, high: int, number: int) -> int:
    """Place of a brace that has ``number`` others before it in ``text[low:high]``; by halving."""
    while high - low > 1:
        middle = (low + high) // 2
        count = text.count("{", low, middle) + text.count("}", low, middle)
        if number < count:
            high = middle
        else:
            low, number = middle, number - count
    return low
