"""The longest common prefix of two sequences, found by comparing slices, which takes no longer than copying them."""

from __future__ import annotations

from typing import TYPE_CHECKING, AnyStr, cast

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ID_BYTES", "common_ids", "common_length"]

ID_BYTES = 4
"""Bytes of a token id, where a sequence of ids is kept as bytes."""
FIRST_STEP = 1 << 12


def common_length(one: AnyStr, other: AnyStr, low: int = 0) -> int:
    """Count the characters or bytes with which two sequences begin alike, of which `low` are known to be equal."""
    has = cast("Callable[[AnyStr, int], bool]", one.startswith)
    high = min(len(one), len(other))
    low = min(low, high)
    # All first: most sequences continue the other one.
    if has(other[low:high], low):
        return high
    # In steps that double: most of what is compared at once is then compared only once.
    step = FIRST_STEP
    while low + step < high and has(other[low : low + step], low):
        low, step = low + step, 2 * step
    high = min(high, low + step) - 1
    while low < high:
        middle = (low + high + 1) // 2
        if has(other[low:middle], low):
            low = middle
        else:
            high = middle - 1
    return low


def common_ids(one: bytes, other: bytes, low: int = 0) -> int:
    """Count the ids with which two sequences begin alike, of which `low` are known to be equal."""
    return common_length(one, other, low * ID_BYTES) // ID_BYTES
