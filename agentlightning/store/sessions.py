"""AgentOps sessions: traces that become attempts, of the rollout that they name or else of one of their own.

A session's spans arrive in any order and number of batches, from several processes, and its root, the only span that
may have tags, arrives last. So its rollout may become known late: until then a placeholder rollout holds its spans, and
then they move. The caller owns the transaction.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, and_, bindparam, delete, exists, select, update

from agentlightning.rollout_records import NewRollout
from agentlightning.store import attributes, changes, lifecycle, rollouts
from agentlightning.store.database import insert_if_new
from agentlightning.store.spans import NewSpan, next_sequence_ids
from agentlightning.store.tables import sessions, span_sequences, spans

__all__ = ["SessionPlace", "end", "find", "join", "latest", "outcome", "spans_of"]

SessionPlace = tuple[str, str]
"""Ids of a rollout and of one of its attempts; the latter is empty where this store does not know the rollout."""


def join(connection: Connection, new: Sequence[NewSpan], project_id: str) -> dict[str, SessionPlace]:
    """Assign the rollout and attempt of their session to spans that have none; the session may be new.

    Args:
        new: spans; one that names a rollout names its attempt, too.

    Returns:
        The place of each session that has a rollout of its own, by trace_id.
    """
    by_trace: defaultdict[str, list[NewSpan]] = defaultdict(list)
    for each in new:
        by_trace[each.trace_id].append(each)
    own: dict[str, SessionPlace] = {}
    # Sorted, so that two writers of the same sessions lock them in the same order.
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


def end(connection: Connection, new: Sequence[NewSpan], own: dict[str, SessionPlace]) -> None:
    """End the attempts whose root span is among the stored spans: the root is the last span of a session to end.

    Args:
        own: the result of `join`.
    """
    for each in new:
        if each.parent_id is not None or each.trace_id not in own:
            continue
        rollout_id, attempt_id = own[each.trace_id]
        found = rollouts.find(connection, rollout_id)
        # A span that was sent twice, or a state that was set since, changes nothing.
        if found is not None and found.attempt_id == attempt_id and found.attempt_status in ("preparing", "running"):
            lifecycle.update_attempt(connection, rollout_id, attempt_id, {"status": _outcome(connection, each)})


def find(connection: Connection, trace_id: str) -> Any | None:
    """Find a session's row."""
    return connection.execute(select(sessions).where(sessions.c.trace_id == trace_id)).first()


def latest(connection: Connection, limit: int) -> Sequence[Any]:
    """Read the rows of the newest sessions, newest first."""
    return connection.execute(select(sessions).order_by(sessions.c.key.desc()).limit(limit)).all()


def outcome(connection: Connection, trace_id: str) -> Literal["failed", "succeeded"] | None:
    """Tell how a session ended; None if its root span, the last to end, has not arrived."""
    query = select(spans).where(spans.c.trace_id == trace_id, spans.c.parent_id.is_(None))
    root = connection.execute(query.order_by(spans.c.end_time.desc(), spans.c.key.desc()).limit(1)).first()
    return None if root is None else _outcome(connection, root)


def spans_of(connection: Connection, trace_id: str) -> Sequence[Any]:
    """Read the rows of a trace's spans, whatever their rollouts, in the order of their start."""
    query = select(spans).where(spans.c.trace_id == trace_id)
    return connection.execute(query.order_by(spans.c.start_time, spans.c.key)).all()


def _place(
    connection: Connection, trace_id: str, named: SessionPlace | None, project_id: str
) -> tuple[SessionPlace, bool]:
    """Return the place of a session, and whether that is a rollout of its own."""
    unknown = {"rollout_id": "", "attempt_id": "", "is_own": False}
    if insert_if_new(connection, sessions, trace_id=trace_id, project_id=project_id, **unknown):
        place = named or _own(connection, trace_id, project_id)
        _set(connection, trace_id, place, is_own=named is None)
        # Spans that arrived without a token, before the session was known.
        _move(connection, and_(spans.c.trace_id == trace_id, spans.c.rollout_id.is_(None)), place)
        return place, named is None
    query = select(sessions).where(sessions.c.trace_id == trace_id).with_for_update()
    found = connection.execute(query).one()
    if found.is_own and named is not None and found.project_id == project_id and _is_under_way(connection, found):
        _move(connection, spans.c.rollout_id == found.rollout_id, named)
        connection.execute(delete(span_sequences).where(span_sequences.c.rollout_id == found.rollout_id))
        rollouts.remove(connection, found.rollout_id)
        changes.note_deletion(connection)
        _set(connection, trace_id, named, is_own=False)
        return named, False
    return (found.rollout_id, found.attempt_id), found.is_own


def _is_under_way(connection: Connection, session: Any) -> bool:
    """Tell whether a session's attempt has not ended; an ended session does not move."""
    found = rollouts.find(connection, session.rollout_id)
    return found is None or found.attempt_status in ("preparing", "running")


def _own(connection: Connection, trace_id: str, project_id: str) -> SessionPlace:
    made = NewRollout(input={"trace_id": trace_id}, metadata={attributes.PROJECT: project_id})
    rollout_id = lifecycle.start(connection, made, None)
    found = rollouts.find(connection, rollout_id)
    assert found is not None
    return rollout_id, found.attempt_id


def _outcome(connection: Connection, root: Any) -> Literal["failed", "succeeded"]:
    """Tell how the session of this root span ended."""
    body = json.loads(root.body)
    failed = attributes.has_failed(body["attributes"], body["status"]["status_code"])
    return "failed" if (_is_left_in_error(connection, root) if failed is None else failed) else "succeeded"


def _is_left_in_error(connection: Connection, root: Any) -> bool:
    """Tell whether the last span to end before the root had failed: an exception ends the inner span first."""
    query = select(spans.c.body).where(spans.c.trace_id == root.trace_id, spans.c.span_id != root.span_id)
    last = connection.execute(query.order_by(spans.c.end_time.desc(), spans.c.key.desc()).limit(1)).scalar()
    return last is not None and json.loads(last)["status"]["status_code"] == "ERROR"


def _set(connection: Connection, trace_id: str, place: SessionPlace, *, is_own: bool) -> None:
    changed = update(sessions).where(sessions.c.trace_id == trace_id)
    connection.execute(changed.values(rollout_id=place[0], attempt_id=place[1], is_own=is_own))


def _move(connection: Connection, which: ColumnElement[bool], place: SessionPlace) -> None:
    """Move stored spans to another rollout, in their order."""
    there = spans.alias()
    is_there = and_(there.c.rollout_id == place[0], there.c.attempt_id == place[1], there.c.span_id == spans.c.span_id)
    # The same spans arrived first with the name of the rollout, then without.
    connection.execute(delete(spans).where(which, exists().where(is_there)))
    query = select(spans.c.key).where(which).order_by(spans.c.sequence_id, spans.c.start_time, spans.c.key)
    keys = connection.execute(query).scalars().all()
    if not keys:
        return
    numbers = next_sequence_ids(connection, place[0], len(keys))
    moved = update(spans).where(spans.c.key == bindparam("of_key"))
    connection.execute(
        # The numbers no longer come from a sender.
        moved.values(rollout_id=place[0], attempt_id=place[1], sequence_id=bindparam("number"), is_numbered=False),
        [{"of_key": key, "number": number} for key, number in zip(keys, numbers, strict=True)],
    )
