"""The table of senders, with the calls of each minute of the last hour as bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agentlightning.sender import Sender
from agentlightning.store.senders import MINUTE, SenderReport

__all__ = ["SenderRow", "sender_row"]

MINUTES = 60
SECONDS_PER_MINUTE = 60
NANOSECONDS = 1e9


@dataclass(frozen=True, slots=True)
class SenderRow:
    """A sender's last hour.

    Attributes:
        seen, started: seconds since the epoch.
        age: seconds since the process started.
        silent: seconds since the sender was last heard from.
        generations, prompt_tokens, output_tokens, lost: counts of the last hour.
        lag, longest_lag: seconds from the end of a generation to its arrival; None without generations.
        bars: generations in each minute, the current one last, as percentages of the busiest.
        busiest: generations in the busiest minute.
    """

    sender: Sender
    seen: float
    started: float
    age: float
    silent: float
    generations: int
    prompt_tokens: int
    output_tokens: int
    lost: int
    lag: float | None
    longest_lag: float | None
    bars: Sequence[float]
    busiest: int

    @property
    def per_minute(self) -> float:
        """Generations per minute since the process started, at most in the last hour; a part of a minute is a whole."""
        return self.generations / min(max(self.age / SECONDS_PER_MINUTE, 1), MINUTES)


def sender_row(seen: SenderReport, now: int) -> SenderRow:
    """Summarise a sender's hour up to `now`, in nanoseconds since the epoch."""
    last = now // MINUTE
    by_minute = {each.minute: each for each in seen.minutes if last - MINUTES < each.minute <= last}
    counts = [by_minute[each].generations if each in by_minute else 0 for each in range(last - MINUTES + 1, last + 1)]
    total, busiest = sum(counts), max(counts)
    minutes = by_minute.values()
    return SenderRow(
        sender=seen.sender,
        seen=seen.seen_at / NANOSECONDS,
        started=seen.sender.started_at / NANOSECONDS,
        age=max(now - seen.sender.started_at, 0) / NANOSECONDS,
        silent=max(now - seen.seen_at, 0) / NANOSECONDS,
        generations=total,
        prompt_tokens=sum(each.prompt_tokens for each in minutes),
        output_tokens=sum(each.output_tokens for each in minutes),
        lost=seen.lost,
        lag=sum(each.lag_sum for each in minutes) / total / NANOSECONDS if total else None,
        longest_lag=max(each.lag_max for each in minutes) / NANOSECONDS if total else None,
        bars=[round(100 * each / busiest, 1) if busiest else 0.0 for each in counts],
        busiest=busiest,
    )
