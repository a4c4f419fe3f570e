"""Completeness of a rollout's calls: which may still arrive, and which are lost. The caller owns the transaction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, exists, select

from agentlightning.completeness import Completeness, Shortfall
from agentlightning.rollout_records import FINISHED, RolloutStatus
from agentlightning.sender import UnfinishedCalls
from agentlightning.store import changes, rollouts, rows, tables, watermarks
from agentlightning.store.changes import Moment
from agentlightning.store.watermarks import Watermark

__all__ = ["FELL_SILENT", "SECONDS_A_SILENT_SERVER_COUNTS", "Endings", "endings", "lost_calls", "of_rollout"]

SECONDS_A_SILENT_SERVER_COUNTS = 900.0
"""The time after its last report in which a silent sender may still answer: cut off, it keeps calls in memory."""
FELL_SILENT = "it fell silent while it answered"
UNDER_WAY = ("preparing", "running")

_SPANS, _GENERATIONS, _LOST = tables.spans.c, tables.generations.c, tables.lost_calls.c


@dataclass(frozen=True, slots=True)
class Endings:
    """State of rollouts that are waited for.

    Attributes:
        states: their states, and when they ended, by id; without those that no store knows.
        seen: the moment up to which changes are in `states`.
        ended: the ids of those that have ended, in the order in which they were asked for.
    """

    states: Mapping[str, tuple[RolloutStatus, float | None]]
    seen: Moment
    ended: Sequence[str]

    @property
    def are_all(self) -> bool:
        """True if all that are known have ended."""
        return len(self.ended) == len(self.states)


def endings(
    connection: Connection, rollout_ids: Sequence[str], recorded: bool, before: Endings | None = None
) -> Endings:
    """Find out which rollouts have ended.

    Args:
        recorded: only those whose calls every live sender has written.
        before: what was known in an earlier transaction: then only what has changed since is read, of all rollouts.
    """
    # First: what is committed meanwhile is read again next time.
    seen = changes.now_at(connection)
    if before is None or before.seen.deletions != seen.deletions:
        states = rollouts.statuses(connection, rollout_ids)
    else:
        wanted = frozenset(rollout_ids)
        changed = changes.changed_rollouts(connection, before.seen)
        states = {**before.states, **{name: state for name, state in changed.items() if name in wanted}}
    until = watermarks.recorded_until(connection) if recorded else float("inf")
    found: list[str] = []
    for each in rollout_ids:
        status, end_time = states.get(each, (None, None))
        if status in FINISHED and (end_time is None or end_time <= until):
            found.append(each)
    return Endings(states, seen, found)


def of_rollout(connection: Connection, rollout_id: str, attempt_id: str | None = None) -> Completeness:
    """Tell whether a rollout, or one of its attempts, has ended and all of its calls are stored, or why not.

    Args:
        attempt_id: `latest` for the latest; None for the rollout.
    """
    if attempt_id == "latest":
        attempt_id = rollouts.attempt_id_of(connection, rows.storable(rollout_id) or "", attempt_id)
        if attempt_id is None:
            return Completeness(None, False)
    status, started, end_time = _life(connection, rollout_id, attempt_id)
    found = Completeness(status, end_time is not None)
    senders = watermarks.all_of(connection)
    for each in senders:
        calls = _count(each.under_way, rollout_id, attempt_id)
        if each.state == "live":
            if calls:
                found.under_way.append(_shortfall(each, calls=calls))
            if end_time is not None and (each.recorded_until is None or each.recorded_until < end_time):
                late = None if each.recorded_until is None else end_time - each.recorded_until
                found.behind.append(_shortfall(each, seconds=late))
        elif each.state == "silent":
            if calls:
                found.lost.append(_shortfall(each, calls=calls, reason=FELL_SILENT))
            if _may_have_lost(each, started, end_time):
                found.silent.append(_shortfall(each, seconds=each.silent_for))
    found.lost.extend(_losses(connection, rollout_id, attempt_id, senders))
    found.unrecorded.extend(_unrecorded(connection, rollout_id, attempt_id))
    return found


def lost_calls(connection: Connection, rollout_id: str) -> Counter[str | None]:
    """Count the lost calls of a rollout by attempt; those that name no attempt, which may be of any, by None.

    Lost are those that their sender reports, and those that a sender was answering when it fell silent.
    """
    query = select(_LOST.attempt_id, _LOST["count"]).where(_LOST.rollout_id == rows.storable(rollout_id))
    found: Counter[str | None] = Counter()
    for attempt_id, count in connection.execute(query):
        found[rows.text_of(attempt_id)] += count
    for sender in watermarks.all_of(connection):
        if sender.state == "silent":
            for each in sender.under_way:
                if each.rollout_id == rollout_id:
                    found[each.attempt_id] += each.count
    return found


def _life(
    connection: Connection, rollout_id: str, attempt_id: str | None
) -> tuple[str | None, float | None, float | None]:
    """Return the status, the start and the end of a rollout or an attempt; None where the queue does not have it."""
    row = rollouts.find(connection, rows.storable(rollout_id) or "")
    if row is None:
        return None, None, None
    is_over = row.status in FINISHED
    if attempt_id is None:
        return row.status, row.start_time, row.end_time if is_over else None
    attempt = rollouts.find_attempt(connection, row.rollout_id, rows.storable(attempt_id) or "")
    if attempt is None:
        return None, None, None
    # An attempt that timed out or became unresponsive has no end of its own: its agent may still be at work.
    end_time = attempt.end_time if attempt.status not in UNDER_WAY else None
    return attempt.status, attempt.start_time, row.end_time if end_time is None and is_over else end_time


def _may_have_lost(each: Watermark, started: float | None, end_time: float | None) -> bool:
    """Tell whether a silent sender may have answered calls between a start and an end without storing them."""
    if started is None:
        return False
    first = each.registered_at if each.recorded_until is None else each.recorded_until
    last = each.reported_at + SECONDS_A_SILENT_SERVER_COUNTS
    return started < last and (end_time is None or end_time > first)


def _count(calls: Iterable[UnfinishedCalls], rollout_id: str, attempt_id: str | None) -> int:
    """Count the calls of a rollout, or of an attempt; a call that names no attempt may be of any."""
    return sum(
        each.count
        for each in calls
        if each.rollout_id == rollout_id and (attempt_id is None or each.attempt_id in (None, attempt_id))
    )


def _losses(
    connection: Connection, rollout_id: str, attempt_id: str | None, senders: Iterable[Watermark]
) -> list[Shortfall]:
    query = select(_LOST.sender_key, _LOST.attempt_id, _LOST["count"], _LOST.reason).where(
        _LOST.rollout_id == rows.storable(rollout_id)
    )
    counts: Counter[tuple[int, str]] = Counter()
    for row in connection.execute(query):
        if attempt_id is None or row.attempt_id is None or rows.text_of(row.attempt_id) == attempt_id:
            counts[row.sender_key, rows.text_of(row.reason)] += row._mapping["count"]
    by_key = {each.sender_key: each for each in senders}
    return [
        _shortfall(by_key[key], calls=count, reason=reason) for (key, reason), count in counts.items() if key in by_key
    ]


def _unrecorded(connection: Connection, rollout_id: str, attempt_id: str | None) -> list[str]:
    """List the answers that spans of a rollout name and no recorded call has, in the order of their spans."""
    wanted: list[Any] = [rollout_id, *([] if attempt_id is None else [attempt_id])]
    # Spans have these ids unencoded, so no span has an id that a database cannot store.
    if any(rows.storable(each) != each for each in wanted):
        return []
    is_recorded = exists().where(_GENERATIONS.response_id == _SPANS.response_id)
    query = (
        select(_SPANS.response_id)
        .where(_SPANS.rollout_id == rollout_id, _SPANS.response_id.is_not(None), ~is_recorded)
        .order_by(_SPANS.sequence_id, _SPANS.key)
    )
    if attempt_id is not None:
        query = query.where(_SPANS.attempt_id == attempt_id)
    return [*dict.fromkeys(rows.text_of(each) for each in connection.execute(query).scalars())]


def _shortfall(each: Watermark, **fields: Any) -> Shortfall:
    return Shortfall(each.sender_id, each.host, each.pid, **fields)
