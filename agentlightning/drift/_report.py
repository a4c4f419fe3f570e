"""A report on the drift of many attempts, which are added one by one: memory does not grow with their number."""

from __future__ import annotations

from collections import Counter
from typing import Any

from agentlightning.drift._causes import ABOUT, CAUSES, MEANT, Cause
from agentlightning.drift._other_names import MISMATCHES, SESSION_MISMATCHES
from agentlightning.drift._records import AttemptDrift, Break
from agentlightning.drift._unfit import UNFIT

__all__ = ["Report"]

_SUMS = (
    "calls",
    "conversations",
    "broken",
    "rows_before",
    "rows_after",
    "rows_unbroken",
    "kept",
    "lost",
    "cacheable",
    "without_vocabulary",
)


class Report:
    """The drift of attempts.

    Attributes:
        attempts: how many were added.
        sums: the sums of what they count, by the names in `AttemptDrift`.
        cached: of `cacheable` ids; None where that is unknown.
        causes: number of breaks by cause, in the order of `CAUSES`, without those that did not occur.
        certain: of these, how many are certain.
        behind: how often a cause would break a prompt once the one that is counted is gone, in the same order.
        examples: a break for each cause, with its rollout: the first certain one, or else the first.
        unfit: by reason, in the order of `UNFIT`.
    """

    def __init__(self) -> None:
        self.attempts = 0
        self.cached: int | None = None
        self.sums: Counter[str] = Counter()
        self.certain: Counter[Cause] = Counter()
        self.examples: dict[Cause, tuple[AttemptDrift, Break]] = {}
        self._causes: Counter[Cause] = Counter()
        self._behind: Counter[Cause] = Counter()
        self._unfit: Counter[str] = Counter()
        self._mismatches: Counter[str] = Counter()
        self._session_mismatches: Counter[str] = Counter()
        self._attempts_broken = 0

    @property
    def causes(self) -> dict[Cause, int]:
        return {cause: self._causes[cause] for cause in CAUSES if self._causes[cause]}

    @property
    def behind(self) -> dict[Cause, int]:
        return {cause: self._behind[cause] for cause in CAUSES if self._behind[cause]}

    @property
    def unfit(self) -> dict[str, int]:
        return {name: self._unfit[name] for name in UNFIT if self._unfit[name]}

    @property
    def drifted(self) -> int:
        """Number of breaks that nobody meant."""
        return sum(count for cause, count in self._causes.items() if cause not in MEANT)

    @property
    def share_broken(self) -> float:
        """Share of the conversations that have such a break."""
        return _share(self.sums["broken"], self.sums["conversations"]) or 0.0

    def add(self, attempt: AttemptDrift) -> None:
        """Add an attempt."""
        self.attempts += 1
        self._attempts_broken += attempt.broken > 0
        for name in _SUMS:
            self.sums[name] += getattr(attempt, name)
        if attempt.cached is not None:
            self.cached = (self.cached or 0) + attempt.cached
        self._unfit.update(attempt.unfit)
        types: set[str] = set()
        for each in attempt.breaks:
            self._causes[each.cause] += 1
            self.certain[each.cause] += each.is_certain
            self._behind.update(each.also)
            self._mismatches.update(each.mismatches)
            types |= {each.session_mismatch} if each.session_mismatch else set()
            known = self.examples.get(each.cause)
            if known is None or (each.is_certain and not known[1].is_certain):
                self.examples[each.cause] = attempt, each
        self._session_mismatches.update(types)

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON, with the names that Agent Lightning 0.3 and miles have for it."""
        sums, drifted = self.sums, self.drifted
        turns = sums["calls"] - sums["conversations"]
        return {
            "attempts": self.attempts,
            **{name: sums[name] for name in _SUMS},
            "cached": self.cached,
            "breaks": drifted,
            "share_broken": self.share_broken,
            "causes": [
                {
                    "cause": cause,
                    "title": ABOUT[cause].title,
                    "is_meant": cause in MEANT,
                    "count": count,
                    "certain": self.certain[cause],
                    "also": self._behind[cause],
                    "cure": ABOUT[cause].cure,
                    "example": _example(*self.examples[cause]),
                }
                for cause, count in self.causes.items()
            ],
            "unfit": self.unfit,
            **{f"training/{name}_mismatch_triplets": self._mismatches[name] for name in MISMATCHES},
            **{f"training/{name}_mismatch_ratio": _share(self._mismatches[name], turns) or 0.0 for name in MISMATCHES},
            "tito_session_mismatch_rate": _share(self._attempts_broken, self.attempts) or 0.0,
            **{
                f"tito_session_mismatch_rate/{name}": _share(self._session_mismatches[name], self.attempts) or 0.0
                for name in SESSION_MISMATCHES
            },
        }


def _example(attempt: AttemptDrift, found: Break) -> dict[str, Any]:
    sides = {
        name: [token._asdict() for token in side] for name, side in (("before", found.before), ("after", found.after))
    }
    return {
        "rollout_id": attempt.rollout_id,
        "attempt_id": attempt.attempt_id,
        **{name: getattr(found, name) for name in ("generation_id", "before_id", "is_certain", "also", "position")},
        **{name: getattr(found, name) for name in ("message", "role", "lost")},
        **sides,
    }


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
