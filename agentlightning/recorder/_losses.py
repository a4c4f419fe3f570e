"""Lost generations: how many, why, whose, and what the store has yet to hear of them."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from threading import Lock

from agentlightning.generation import Loss
from agentlightning.recorder._counters import LOST, QUEUE_FULL, STOPPED, Whose
from agentlightning.recorder._trouble import TroubleLog
from agentlightning.sender import LostCalls

__all__ = ["Losses"]

# The most rollouts whose losses wait to be reported by name; those of further ones are counted without a name.
LOST_NAMES_LIMIT = 1 << 16


class Losses:
    """The lost generations of a process. `reject`, `count_late` and `counts` are for any thread."""

    def __init__(self, trouble: TroubleLog) -> None:
        self._trouble = trouble
        self._counts: dict[str, int] = dict.fromkeys(LOST, 0)
        self._rejected = self._rejected_in_reports = self._late = 0
        self._rejected_at = (0, 0)
        self._new: dict[str, Loss] = {}
        self._lock = Lock()
        self._named: Counter[tuple[str | None, str | None, str]] = Counter()
        self.reports: list[Loss] = []
        """Reports that the store may not have yet."""
        self.unconfirmed: list[LostCalls] = []
        """Losses by rollout and attempt that the store may not have yet."""

    def counts(self) -> dict[str, int]:
        """Count the lost generations, by the reason."""
        return {**self._counts, QUEUE_FULL: self._rejected, STOPPED: self._counts[STOPPED] + self._late}

    def reject(self, whose: Whose, full: str) -> None:
        """Count a generation for which there is no room; `full` says so."""
        self.name(QUEUE_FULL, [whose])
        now = time.time_ns()
        self._rejected_at = (self._rejected_at[0] if self._rejected > self._rejected_in_reports else now, now)
        self._rejected += 1
        self._trouble.warn(QUEUE_FULL, f"{full}; generations lost so far: {self._rejected}")

    def count_late(self, why: str) -> None:
        """Count a generation that comes when no thread is left to write a report of it."""
        self._late += 1
        self._trouble.warn("late", f"the recorder accepts no more generations: {why}; lost so far: {self._late}")

    def add(self, kind: str, whose: Sequence[Whose], detail: str) -> None:
        """Count generations that the writing thread loses."""
        count = len(whose)
        self.name(kind, whose)
        self._counts[kind] += count
        lost = f"generations lost so far ({kind}): {self._counts[kind]}"
        self._trouble.warn(kind, f"{lost}; the last because {detail}")
        now = time.time_ns()
        loss = self._new.setdefault(kind, _loss(0, f"{kind}: {detail}", now, now))
        loss.count += count
        loss.last_at = now

    def name(self, kind: str, whose: Iterable[Whose]) -> None:
        """Note whose generations are lost, without counting them."""
        with self._lock:
            for each in whose:
                key = (*each, kind)
                names = len(self._named) + len(self.unconfirmed)
                known = key in self._named or names < LOST_NAMES_LIMIT
                self._named[key if known else (None, None, kind)] += 1

    def make_reports(self) -> None:
        """Add what is new to `reports`, unchanged from then on: a failed attempt may have written them."""
        rejected, at = self._rejected, self._rejected_at
        if rejected > self._rejected_in_reports:
            self.reports.append(_loss(rejected - self._rejected_in_reports, QUEUE_FULL, *at))
            self._rejected_in_reports = rejected
        self.reports += self._new.values()
        self._new = {}

    def collect_named(self) -> None:
        """Add what is new to `unconfirmed`, unchanged from then on: a failed attempt may have told them."""
        with self._lock:
            named, self._named = self._named, Counter()
        self.unconfirmed += [
            LostCalls(rollout_id=rollout_id, attempt_id=attempt_id, count=count, reason=kind)
            for (rollout_id, attempt_id, kind), count in named.items()
        ]


def _loss(count: int, reason: str, first_at: int, last_at: int) -> Loss:
    return Loss(
        count=count,
        reason=reason,
        first_at=first_at,
        last_at=last_at,
        host=os.uname().nodename,
        pid=os.getpid(),
    )
