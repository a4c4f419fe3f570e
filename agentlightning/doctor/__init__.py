"""Is it on, and if not, why: what `agl doctor` says.

Every check gives findings; a finding that is a problem comes with what to do about it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

__all__ = ["Finding", "Mark", "Unreachable", "all_is_well"]


class Mark(Enum):
    """How a finding is to be taken."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        subject: what was looked at, in a word or two.
        mark: whether it is as it should be.
        text: what was found.
        advice: what to do about it; every problem has one.
    """

    subject: str
    mark: Mark
    text: str
    advice: str | None = None

    def as_dict(self) -> dict[str, str | None]:
        """For JSON."""
        return {"subject": self.subject, "mark": self.mark.value, "text": self.text, "advice": self.advice}


class Unreachable(Exception):
    """What was to be asked gave no answer. The message says why; the second argument says what to do."""


def all_is_well(findings: Iterable[Finding]) -> bool:
    """Whether there is no problem among them; a note is none."""
    return all(finding.mark is not Mark.PROBLEM for finding in findings)
