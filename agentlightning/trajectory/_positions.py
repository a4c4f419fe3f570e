"""Values of single positions of a row, put together from its calls: routed experts, and sampling masks."""

from __future__ import annotations

import json
from array import array
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from agentlightning.generation import RoutedExperts, SamplingMask

__all__ = ["KnownExperts", "KnownMask", "first_position", "missing_experts", "place_experts", "place_masks"]

UNKNOWN = -1
"""The stand-in for each expert at a position that no call gave."""


class KnownExperts(NamedTuple):
    """Experts of a call.

    Attributes:
        start: the position of the first one.
        stop: the position before which the call's ids are those of the row.
    """

    experts: RoutedExperts
    start: int
    stop: int


class KnownMask(NamedTuple):
    """The ids that those of an answer were chosen from.

    Attributes:
        start, stop: the positions of the first of these ids, and behind the last one that the row has.
    """

    mask: SamplingMask
    start: int
    stop: int


@lru_cache(1_000)
def first_position(sampling_params: str | None) -> int:
    """Return the position of the first id that vLLM returns experts of: a client may leave out what it has already.

    Args:
        sampling_params: JSON, as in a `Generation`.
    """
    try:
        start = json.loads(sampling_params or "{}").get("routed_experts_prompt_start", 0)
    except (AttributeError, ValueError):
        return 0
    return start if isinstance(start, int) and start > 0 else 0


def place_experts(known: Sequence[KnownExperts], length: int) -> RoutedExperts | None:
    """Put experts together by position: at each of `length` those of the first call that has them, or `UNKNOWN`.

    Returns:
        None where no call has any, or where they are of models of different shapes.
    """
    if not known:
        return None
    _, layers, experts = known[0].experts.shape
    width = layers * experts
    ids = array("h", [UNKNOWN]) * (length * width)
    # Backwards, so that what the first call has is what stays.
    for each, start, stop in reversed(known):
        if each.shape[1:] != (layers, experts):
            return None
        stop = min(stop, start + each.shape[0], length)
        if start < stop:
            ids[start * width : stop * width] = each.ids[: (stop - start) * width]
    return RoutedExperts((length, layers, experts), ids)


def missing_experts(experts: RoutedExperts | None) -> int | None:
    """Count the positions that no call gave; None without experts."""
    if experts is None:
        return None
    _, layers, each = experts.shape
    # All experts of a position are known, or none.
    return experts.ids[:: layers * each].count(UNKNOWN) if layers * each else 0


def place_masks(known: Sequence[KnownMask], length: int) -> SamplingMask:
    """Put masks together by position; a position that was not sampled has nothing to choose from."""
    counts, ids = array("I", bytes(4 * length)), array("i")
    for mask, start, stop in known:
        ends = mask.offsets
        for place in range(stop - start):
            counts[start + place] = ends[place + 1] - ends[place]
        ids += mask.ids[: ends[stop - start]]
    return SamplingMask.of_counts(counts, ids)
