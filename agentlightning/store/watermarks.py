"""Watermarks: up to which moment each sender has written everything that had ended. The caller owns the transaction.

A sender's times are by its own clock, and rollouts end by the store's. The store answers each report with its time, and
the sender returns that answer with its next report, together with its own time when the answer arrived. The store's
clock had passed its time by then, so the difference of the two is never too large, however long a message took on its
way, and a moment that is converted by it is never too late. A difference taken when a report arrives would be too large
by the time that the report was on its way, and would call a sender complete before it is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, func, select

from agentlightning.sender import Progress, UnfinishedCalls
from agentlightning.store import rows, tables
from agentlightning.store.database import change, found, insert_if_new, is_single_writer, now
from agentlightning.store.documents import to_json

__all__ = ["SECONDS_UNTIL_SILENT", "State", "Watermark", "all_of", "note_start", "recorded_until", "register", "report"]

SECONDS_UNTIL_SILENT = 30.0
"""The time that a sender that reports once a second may be silent until it counts as gone.

As long as a sender waits for the answer of an `agl store` before it gives up, so that a slow store makes no sender
silent.
"""
NANOSECONDS = 1e9
ALWAYS = float("inf")
STARTED = "started"
POSTGRESQL_STARTED = "SELECT extract(epoch FROM pg_postmaster_start_time())::float8"

State = Literal["live", "silent", "ended"]

_SENDERS, _WATERMARKS, _PROBES = tables.senders.c, tables.watermarks.c, tables.probes.c
_ALL = (
    select(tables.watermarks, _SENDERS.id, _SENDERS.host, _SENDERS.pid)
    .join(tables.senders, _SENDERS.key == _WATERMARKS.sender_key)
    .order_by(_WATERMARKS.sender_key)
)
_REGISTER = "INSERT INTO watermarks VALUES (?, ?, ?, NULL, NULL, ?, ?) ON CONFLICT (sender_key) DO NOTHING"
_REPORT = """
    UPDATE watermarks SET reported_at = ?, watermark = ?, clock_difference = ?, has_ended = ?, under_way = ?
    WHERE sender_key = ?
"""


@dataclass(frozen=True, slots=True)
class Watermark:
    """A sender, and how far it has written. Times are seconds since the epoch by the store's clock.

    Attributes:
        sender_key, sender_id, host, pid: the sender.
        state: `live` if it reports, `silent` if it stopped without a word, `ended` if it said that it ends.
        registered_at, reported_at: when it registered, and when it was last heard from.
        recorded_until: everything that had ended by then is stored; None while that is unknown.
        watermark: the same by the sender's own clock, in nanoseconds since the epoch.
        clock_difference: nanoseconds that the store's clock is ahead of the sender's.
        under_way: the generations that were unfinished then.
        silent_for: seconds since it was last heard from.
    """

    sender_key: int
    sender_id: str
    host: str
    pid: int
    state: State
    registered_at: float
    reported_at: float
    recorded_until: float | None
    watermark: int | None
    clock_difference: int | None
    under_way: Sequence[UnfinishedCalls]
    silent_for: float


def register(connection: Connection, sender_key: int) -> None:
    """Note that a sender exists, which will report; one that is known is left unchanged."""
    at = _nanoseconds(connection)
    change(connection, _REGISTER, (sender_key, at, at, False, "[]"))


def report(connection: Connection, sender_key: int, progress: Progress) -> int:
    """Store a sender's progress; returns the store's time, in nanoseconds since the epoch.

    Raises:
        InvalidRecord: the id of a loss is not a UUID.
    """
    at = _nanoseconds(connection)
    known = progress.store_time
    # A time to come is from before the store's clock was set back: it would make the watermark too late.
    differences = [] if known is None or known.time > at else [known.time - known.received_at]
    for (before,) in found(
        connection, tables.watermarks, ("watermark + clock_difference",), "sender_key", [sender_key]
    ):
        if before is not None and before <= at:
            # What was true stays so: an answer that took longer makes the difference smaller than the last one was.
            differences.append(int(before) - progress.watermark)
    difference = max(differences, default=None)
    under_way = to_json([(each.rollout_id, each.attempt_id, each.count) for each in progress.under_way])
    values = (at, progress.watermark, difference, progress.has_ended, rows.storable(under_way), sender_key)
    if not change(connection, _REPORT, values):
        register(connection, sender_key)
        change(connection, _REPORT, values)
    for each in progress.lost:
        columns = {
            "sender_key": sender_key,
            "rollout_id": rows.storable(each.rollout_id),
            "attempt_id": rows.storable(each.attempt_id),
            "count": each.count,
            "reason": rows.storable(each.reason),
        }
        insert_if_new(connection, tables.lost_calls, id=rows.uuid_bytes(each.id), **columns)
    return at


def all_of(connection: Connection) -> list[Watermark]:
    """Read the watermarks of all senders, in the order in which they registered."""
    at = now(connection)
    silent_before = _silent_before(connection, at)
    return [_watermark(row, at, silent_before) for row in connection.execute(_ALL)]


def recorded_until(connection: Connection) -> float:
    """Return the moment up to which every live sender has written everything that had ended.

    Returns:
        Seconds since the epoch by the store's clock; minus infinity while a live sender's watermark is unknown, and
        infinity where no sender is live.
    """
    at = now(connection)
    silent_before = _silent_before(connection, at)
    is_live = _WATERMARKS.has_ended.is_(False), _WATERMARKS.reported_at >= int(silent_before * NANOSECONDS)
    live = (_watermark(row, at, silent_before) for row in connection.execute(_ALL.where(*is_live)))
    return min((float("-inf") if each.recorded_until is None else each.recorded_until for each in live), default=ALWAYS)


def note_start(connection: Connection) -> None:
    """Note that a server of this store has started: while none ran, no sender could report."""
    at = now(connection)
    updated = tables.probes.update().where(_PROBES.name == STARTED).values(written_at=at)
    if not connection.execute(updated).rowcount:
        insert_if_new(connection, tables.probes, name=STARTED, written_at=at)


def _watermark(row: Any, at: float, silent_before: float) -> Watermark:
    reported_at = row.reported_at / NANOSECONDS
    until = None
    if row.watermark is not None and row.clock_difference is not None:
        # Never later than the report: a sender cannot know what ended after it.
        until = min(row.watermark + row.clock_difference, row.reported_at) / NANOSECONDS
    return Watermark(
        sender_key=row.sender_key,
        sender_id=rows.uuid_text(row.id),
        host=rows.text_of(row.host),
        pid=row.pid,
        state="ended" if row.has_ended else "silent" if reported_at < silent_before else "live",
        registered_at=row.registered_at / NANOSECONDS,
        reported_at=reported_at,
        recorded_until=until,
        watermark=row.watermark,
        clock_difference=row.clock_difference,
        under_way=[UnfinishedCalls(*each) for each in json.loads(rows.text_of(row.under_way))],
        silent_for=at - reported_at,
    )


def _silent_before(connection: Connection, at: float) -> float:
    """Return the time before which the last report of a silent sender was."""
    started = connection.execute(select(_PROBES.written_at).where(_PROBES.name == STARTED)).scalar() or 0.0
    if not is_single_writer(connection):
        started = max(started, connection.exec_driver_sql(POSTGRESQL_STARTED).scalar_one())
    if at - started >= SECONDS_UNTIL_SILENT:
        return at - SECONDS_UNTIL_SILENT
    # No sender could report while no store ran: those that were live when it stopped get their whole time again.
    before = select(func.max(_WATERMARKS.reported_at)).where(_WATERMARKS.reported_at < int(started * NANOSECONDS))
    last = connection.execute(before).scalar()
    return min(at, at if last is None else last / NANOSECONDS) - SECONDS_UNTIL_SILENT


def _nanoseconds(connection: Connection) -> int:
    return int(now(connection) * NANOSECONDS)
