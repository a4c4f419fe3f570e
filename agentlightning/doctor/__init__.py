"""The checks of `agl doctor`. Each gives findings; a finding that is a problem says what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

__all__ = ["Finding", "Mark", "Unreachable", "all_is_well"]


class Mark(Enum):
    """The seriousness of a finding."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        subject: the thing that was checked, in a word or two.
        mark: how serious it is.
        text: what was found.
        advice: what to do about it; every problem has one.
    """

    subject: str
    mark: Mark
    text: str
    advice: str | None = None

    def as_dict(self) -> dict[str, str | None]:
        """Convert to JSON data."""
        return {"subject": self.subject, "mark": self.mark.value, "text": self.text, "advice": self.advice}


class Unreachable(Exception):
    """A server or a store gave no answer. The message says why; the second argument says what to do."""


def all_is_well(findings: Iterable[Finding]) -> bool:
    """Tell whether no finding is a problem. Notes do not count as problems."""
    return all(finding.mark is not Mark.PROBLEM for finding in findings)
