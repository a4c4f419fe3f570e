"""Sessions: traces that are attempts, of a rollout that they name, or else of one of their own.

A session's spans come in any order and number of batches, from several processes, and its root, which is what may have
tags, comes last. So what it is part of may be learned late: then its own rollout was for the meantime, and its spans go
over. Everything here works inside a transaction of somebody else's.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, and_, bindparam, delete, exists, select, update

from agentlightning.store import attributes, rollouts
from agentlightning.store.database import insert_if_new
from agentlightning.store.spans import NewSpan, next_sequence_ids
from agentlightning.store.tables import sessions, span_sequences, spans

__all__ = ["Place", "end", "find", "join", "latest", "spans_of"]

Place = tuple[str, str]
"""The ids of a rollout and of an attempt of it, which is empty where the rollout is not known here."""


def join(connection: Connection, new: Sequence[NewSpan], project_id: str) -> dict[str, Place]:
    """Give a rollout and an attempt to spans that have none: those of their session, which may be new.

    Args:
        new: those that name a rollout have its attempt, too.

    Returns:
        Of the sessions that have a rollout of their own, by trace_id, where that is.
    """
    by_trace: defaultdict[str, list[NewSpan]] = defaultdict(list)
    for each in new:
        by_trace[each.trace_id].append(each)
    own: dict[str, Place] = {}
    # In one order, so that two who write the same wait for each other and not in a circle.
    for trace_id in sorted(by_trace):
        of_trace = by_trace[trace_id]
        named = next(((each.rollout_id, each.attempt_id or "") for each in of_trace if each.rollout_id), None)
        place, is_own = _place(connection, trace_id, named, project_id)
        for each in of_trace:
            if each.rollout_id is None:
                each.rollout_id, each.attempt_id = place
        if is_own:
            own[trace_id] = place
    return own


def end(connection: Connection, new: Sequence[NewSpan], own: dict[str, Place]) -> None:
    """End the attempts whose root is among the spans, which are kept by now: it is the last to end.

    Args:
        own: what `join` has returned.
    """
    for each in new:
        if each.parent_id is not None or each.trace_id not in own:
            continue
        rollout_id, attempt_id = own[each.trace_id]
        found = rollouts.find(connection, rollout_id)
        # What was sent twice, or what somebody has decided since, stays as it is.
        if found is not None and found.attempt_id == attempt_id and found.attempt_status in ("preparing", "running"):
            body = json.loads(each.body)
            failed = attributes.has_failed(body["attributes"], body["status"]["status_code"])
            if failed is None:
                failed = _is_left_in_error(connection, each)
            rollouts.update_attempt(connection, rollout_id, attempt_id, status="failed" if failed else "succeeded")


def find(connection: Connection, trace_id: str) -> Any | None:
    """The session's columns."""
    return connection.execute(select(sessions).where(sessions.c.trace_id == trace_id)).first()


def latest(connection: Connection, limit: int) -> Sequence[Any]:
    """The columns of the newest sessions, the newest first."""
    return connection.execute(select(sessions).order_by(sessions.c.key.desc()).limit(limit)).all()


def spans_of(connection: Connection, trace_id: str) -> Sequence[Any]:
    """The columns of a trace's spans, whatever rollouts they are of, as they began."""
    query = select(spans).where(spans.c.trace_id == trace_id)
    return connection.execute(query.order_by(spans.c.start_time, spans.c.key)).all()


def _place(connection: Connection, trace_id: str, named: Place | None, project_id: str) -> tuple[Place, bool]:
    """Where the session is, and whether in a rollout of its own."""
    unknown = {"rollout_id": "", "attempt_id": "", "is_own": False}
    if insert_if_new(connection, sessions, trace_id=trace_id, project_id=project_id, **unknown):
        place = named or _own(connection, trace_id, project_id)
        _set(connection, trace_id, place, is_own=named is None)
        # Spans that came without a token, before there was one.
        _move(connection, and_(spans.c.trace_id == trace_id, spans.c.rollout_id.is_(None)), place)
        return place, named is None
    query = select(sessions).where(sessions.c.trace_id == trace_id).with_for_update()
    found = connection.execute(query).one()
    if found.is_own and named is not None and found.project_id == project_id and _is_under_way(connection, found):
        _move(connection, spans.c.rollout_id == found.rollout_id, named)
        connection.execute(delete(span_sequences).where(span_sequences.c.rollout_id == found.rollout_id))
        rollouts.remove(connection, found.rollout_id)
        _set(connection, trace_id, named, is_own=False)
        return named, False
    return (found.rollout_id, found.attempt_id), found.is_own


def _is_under_way(connection: Connection, session: Any) -> bool:
    """Whether its attempt has not ended: what is known to have ended stays where it is."""
    found = rollouts.find(connection, session.rollout_id)
    return found is None or found.attempt_status in ("preparing", "running")


def _own(connection: Connection, trace_id: str, project_id: str) -> Place:
    about = json.dumps({"trace_id": trace_id})
    made = rollouts.NewRollout(input=about, metadata=json.dumps({attributes.PROJECT: project_id}))
    rollout_id = rollouts.start(connection, made, None)
    found = rollouts.find(connection, rollout_id)
    assert found is not None
    return rollout_id, found.attempt_id


def _is_left_in_error(connection: Connection, root: NewSpan) -> bool:
    """Whether the last span to end before the root had failed: what ends a program ends that one first."""
    query = select(spans.c.body).where(spans.c.trace_id == root.trace_id, spans.c.span_id != root.span_id)
    last = connection.execute(query.order_by(spans.c.end_time.desc(), spans.c.key.desc()).limit(1)).scalar()
    return last is not None and json.loads(last)["status"]["status_code"] == "ERROR"


def _set(connection: Connection, trace_id: str, place: Place, *, is_own: bool) -> None:
    changed = update(sessions).where(sessions.c.trace_id == trace_id)
    connection.execute(changed.values(rollout_id=place[0], attempt_id=place[1], is_own=is_own))


def _move(connection: Connection, which: ColumnElement[bool], place: Place) -> None:
    """Put spans that are kept under another rollout, in the order that they have."""
    there = spans.alias()
    is_there = and_(there.c.rollout_id == place[0], there.c.attempt_id == place[1], there.c.span_id == spans.c.span_id)
    # They came with the name of the rollout before, and then without.
    connection.execute(delete(spans).where(which, exists().where(is_there)))
    query = select(spans.c.key).where(which).order_by(spans.c.sequence_id, spans.c.start_time, spans.c.key)
    keys = connection.execute(query).scalars().all()
    if not keys:
        return
    numbers = next_sequence_ids(connection, place[0], len(keys))
    moved = update(spans).where(spans.c.key == bindparam("of_key"))
    connection.execute(
        # The numbers are no longer those of a sender.
        moved.values(rollout_id=place[0], attempt_id=place[1], sequence_id=bindparam("number"), is_numbered=False),
        [{"of_key": key, "number": number} for key, number in zip(keys, numbers, strict=True)],
    )
