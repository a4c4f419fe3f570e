"""Measure what a test costs on any machine, busy or idle: in units of fixed work, without the starts of servers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

__all__ = ["REFERENCE_SECONDS", "fixed_work", "not_counted", "seconds_not_counted"]

REFERENCE_SECONDS = 0.025
"""Time of `fixed_work` on the machine on which the tiers' limits were set: two cores, otherwise idle."""
_ROUNDS = 300_000
_not_counted = 0.0


def fixed_work() -> float:
    """Do the same work as ever; returns the seconds that it took here and now, beside all else that runs."""
    begun = time.perf_counter()
    total = 0
    for number in range(_ROUNDS):
        total += number * number % 7
    return time.perf_counter() - begun


@contextlib.contextmanager
def not_counted() -> Iterator[None]:
    """Leave what is done in this block out of what the test costs: the start of a server."""
    global _not_counted
    begun = time.perf_counter()
    try:
        yield
    finally:
        _not_counted += time.perf_counter() - begun


def seconds_not_counted() -> float:
    """All that `not_counted` has left out in this process so far."""
    return _not_counted
