"""Counters of a recorder, and the reasons why generations are lost."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["LOST", "NOT_BUILT", "QUEUE_FULL", "REFUSED", "STOPPED", "WRITE_SECONDS", "Counters", "Whose"]

Whose = tuple[str | None, str | None]
"""The rollout and the attempt that a generation belongs to; None where its call named none."""
QUEUE_FULL, NOT_BUILT, REFUSED, STOPPED = LOST = ("queue full", "not built", "refused", "stopped")
"""Reasons why generations are lost: the queue is full, our code failed before or in the store, or the process ended."""
WRITE_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""The upper bounds of the buckets that count writes by their duration."""


@dataclass(slots=True)
class Counters:
    """The fate of everything that was recorded since the process started.

    Attributes:
        generations, prompt_tokens, output_tokens: what the store has.
        queue_bytes: what waits now.
        lost: generations that the store does not have, by one of `LOST`.
        writes: number of transactions in each bucket: one bucket for each of `WRITE_SECONDS`, and one for the rest.
        write_seconds: how long all of them took together.
        failed_writes: how often writing to the store failed; each write is retried.
        trouble: why writing fails now; None while it works.
    """

    generations: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    queue_bytes: int = 0
    lost: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LOST, 0))
    writes: list[int] = field(default_factory=lambda: [0] * (len(WRITE_SECONDS) + 1))
    write_seconds: float = 0.0
    failed_writes: int = 0
    trouble: str | None = None
