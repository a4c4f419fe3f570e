"""Completeness of a rollout's calls: whether all are stored, and if not, what is missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Completeness", "Shortfall"]


@dataclass(frozen=True, slots=True)
class Shortfall:
    """A process that records, and what it has not stored. What does not apply is None.

    Attributes:
        sender_id, host, pid: the process.
        calls: number of generations.
        seconds: how far its watermark is behind the rollout's end, or how long it has been silent.
        reason: why calls are lost.
    """

    sender_id: str
    host: str
    pid: int
    calls: int | None = None
    seconds: float | None = None
    reason: str | None = None

    @property
    def name(self) -> str:
        """The process in words."""
        return f"process {self.pid} on {self.host}"


@dataclass(frozen=True, slots=True)
class Completeness:
    """The state of a rollout, or of an attempt: whether it has ended and all of its calls are stored.

    Attributes:
        status: its status; None where the queue does not have it, so that its end is unknown.
        ended: whether it has ended.
        under_way: calls of it that a server has begun and not ended.
        behind: servers that may still have calls of it in their queues.
        silent: servers that ended or were cut off without a word while it ran, or up to 15 minutes before, so that
            calls of it may be lost.
        lost: calls of it that a server could not store, or had under way when it fell silent.
        unrecorded: answers that a span of it names and no recorded call has: the call was lost, or another server
            answered it.
    """

    status: str | None
    ended: bool
    under_way: list[Shortfall] = field(default_factory=list[Shortfall])
    behind: list[Shortfall] = field(default_factory=list[Shortfall])
    silent: list[Shortfall] = field(default_factory=list[Shortfall])
    lost: list[Shortfall] = field(default_factory=list[Shortfall])
    unrecorded: list[str] = field(default_factory=list[str])

    @property
    def complete(self) -> bool:
        """True if it has ended and nothing is missing."""
        return self.ended and not any((self.under_way, self.behind, self.silent, self.lost, self.unrecorded))

    def reasons(self) -> list[str]:
        """Say in sentences why it is not complete; empty if it is."""
        found: list[str] = []
        if self.status is None:
            found.append("the queue does not have it, so its end is unknown")
        elif not self.ended:
            found.append(f"it has not ended: its status is {self.status}")
        found += [f"{each.name} is still answering {_calls(each)}" for each in self.under_way]
        found += [f"{each.name} has not yet written all that it answered{_late(each)}" for each in self.behind]
        found += [f"{each.name} fell silent {each.seconds:.0f} s ago: calls may be lost" for each in self.silent]
        found += [f"{each.name} lost {_calls(each)}: {each.reason}" for each in self.lost]
        found += [f"a span names the answer {each!r}, which is not recorded" for each in self.unrecorded]
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for JSON, and `complete`."""
        return {"complete": self.complete, **asdict(self)}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Completeness:
        """Restore it from the JSON object of `as_dict`.

        Raises:
            KeyError, TypeError: the object is not one.
        """
        lists = {
            name: [Shortfall(**each) for each in found[name]] for name in ("under_way", "behind", "silent", "lost")
        }
        return cls(found["status"], found["ended"], **lists, unrecorded=list(found["unrecorded"]))


def _calls(each: Shortfall) -> str:
    return "1 call" if each.calls == 1 else f"{each.calls} calls"


def _late(each: Shortfall) -> str:
    return "" if each.seconds is None else f" (it is {each.seconds:.1f} s behind)"
