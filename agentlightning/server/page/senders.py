"""Who writes here: what they have written in each minute of the last hour, as bars."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agentlightning.sender import Sender
from agentlightning.store.senders import MINUTE, SenderReport

__all__ = ["Charted", "charted"]

MINUTES = 60
NANOSECONDS = 1e9


@dataclass(frozen=True, slots=True)
class Charted:
    """A sender in the last hour.

    Attributes:
        seen, started: seconds since the epoch.
        silent: how long nothing was heard of it, in seconds.
        generations, prompt_tokens, output_tokens, lost: how many in that hour.
        lag, longest_lag: seconds, from when one had finished until it was here; None where there was none.
        bars: of each minute up to this one how many generations, from 0 to 100 of the most in one.
        busiest: how many there were in that.
    """

    sender: Sender
    seen: float
    started: float
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
        """Generations, on average over the hour."""
        return self.generations / MINUTES


def charted(seen: SenderReport, now: int) -> Charted:
    """What a sender has done in the hour until `now`, in nanoseconds since the epoch."""
    last = now // MINUTE
    by_minute = {each.minute: each for each in seen.minutes if last - MINUTES < each.minute <= last}
    counts = [by_minute[each].generations if each in by_minute else 0 for each in range(last - MINUTES + 1, last + 1)]
    total, busiest = sum(counts), max(counts)
    minutes = by_minute.values()
    return Charted(
        sender=seen.sender,
        seen=seen.seen_at / NANOSECONDS,
        started=seen.sender.started_at / NANOSECONDS,
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
