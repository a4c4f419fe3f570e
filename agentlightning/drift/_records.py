"""The drift of an attempt, as plain types: its counts, and its breaks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from agentlightning.drift._causes import Cause

__all__ = ["AttemptDrift", "Break", "CallDetails", "Token"]


class CallDetails(NamedTuple):
    """Details of a generation besides its `Call`: how many ids were cached, and the digest of its vocabulary."""

    cached_tokens: int | None = None
    vocabulary: bytes | None = None


class Token(NamedTuple):
    """An id with its text, if that is known, and whether the other side has another in its place."""

    id: int
    text: str | None
    differs: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Break:
    """A prompt that does not extend the context that it should extend.

    Attributes:
        generation_id: the call with this prompt.
        before_id: the call whose prompt and answer it should begin with.
        cause, is_certain, also, position, message, role: as in `Difference`.
        lost: sampled ids of this conversation that its next row cannot train.
        finished_at: when the call finished, in nanoseconds since the epoch.
        model, agent_id: the name that the client asked for, and the agent that called, if it said so.
        before, after: what stands on both sides from shortly before the first difference on, aligned.
        mismatches: what Agent Lightning 0.3 calls it: `template`, `retoken`, `others`.
        session_mismatch: what miles calls it.
    """

    generation_id: str
    before_id: str
    cause: Cause
    is_certain: bool
    also: Sequence[Cause]
    position: int
    message: int | None
    role: str | None
    lost: int
    finished_at: int
    model: str | None
    agent_id: str | None
    before: Sequence[Token]
    after: Sequence[Token]
    mismatches: Sequence[str]
    session_mismatch: str | None


@dataclass(slots=True, kw_only=True)
class AttemptDrift:
    """The calls of an attempt, and where they break the context that they should extend.

    Attributes:
        calls: number of calls with ids; a call with several choices is one.
        conversations: how many conversations these are.
        broken: how many of them have a break that nobody meant.
        rows_before: number of answers, each of which is a row if nothing is merged.
        rows_after: number of rows that they are merged to.
        rows_unbroken: number of rows that they would be merged to if nothing had broken.
        kept, lost: sampled ids that one row for each conversation can train, and those that it cannot.
        cached: ids that came from the prefix cache, of calls that continue another; None where that is unknown.
        cacheable: ids of these calls that would have come from there if no history had been changed.
        without_vocabulary: calls whose texts are unknown.
        parents: by the ids of calls, the call that each continues, exactly or not; None where it begins a conversation.
        unfit: by reason, what makes rows or answers unfit for training in other ways; see `report.UNFIT`.
    """

    rollout_id: str | None
    attempt_id: str | None
    calls: int = 0
    conversations: int = 0
    broken: int = 0
    rows_before: int = 0
    rows_after: int = 0
    rows_unbroken: int = 0
    kept: int = 0
    lost: int = 0
    cached: int | None = None
    cacheable: int = 0
    without_vocabulary: int = 0
    breaks: list[Break] = field(default_factory=list[Break])
    parents: dict[str, str | None] = field(default_factory=dict[str, "str | None"])
    unfit: dict[str, int] = field(default_factory=dict[str, int])

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> AttemptDrift:
        """Restore it from the JSON object of `as_dict`.

        Raises:
            KeyError, TypeError, ValueError: the object is something else.
        """
        values = {name: found[name] for name in cls.__slots__}
        values["breaks"] = [_break(each) for each in values["breaks"]]
        return cls(**values)


def _break(found: Mapping[str, Any]) -> Break:
    values = {name: found[name] for name in Break.__slots__}
    for name in ("before", "after"):
        values[name] = [Token(*each) for each in values[name]]
    return Break(**values)
