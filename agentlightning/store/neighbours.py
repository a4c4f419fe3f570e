"""The rollouts beside one: before and after it, and those of the same task. The caller owns the transaction."""

from __future__ import annotations

from typing import Any, NamedTuple

from sqlalchemy import Connection, and_, func, select

from agentlightning.store import tables, texts

__all__ = ["Neighbours", "neighbours_of", "of_same_task"]

_ROLLOUTS, _GENERATIONS = tables.rollouts.c, tables.generations.c


class Neighbours(NamedTuple):
    """Ids of the rollouts before and after one; None where there is none."""

    before: str | None
    after: str | None


def neighbours_of(connection: Connection, rollout_id: str, row: Any | None) -> Neighbours:
    """Find the rollouts before and after one: in the order of the queue, or of calls if it was never queued.

    Args:
        row: its row; None if it is known only from its calls and spans.
    """
    if row is None:
        return _by_calls(connection, rollout_id)
    query = select(_ROLLOUTS.rollout_id).limit(1)
    before = query.where(_ROLLOUTS.key < row.key).order_by(_ROLLOUTS.key.desc())
    after = query.where(_ROLLOUTS.key > row.key).order_by(_ROLLOUTS.key)
    return Neighbours(connection.execute(before).scalar(), connection.execute(after).scalar())


def _by_calls(connection: Connection, rollout_id: str) -> Neighbours:
    key = texts.key_of(connection, rollout_id)
    finished_at, rollout_key = _GENERATIONS.finished_at, _GENERATIONS.rollout_key
    first, last = connection.execute(
        select(func.min(finished_at), func.max(finished_at)).where(rollout_key == (-1 if key is None else key))
    ).one()
    if first is None:
        return Neighbours(None, None)
    others = select(rollout_key).where(and_(rollout_key.is_not(None), rollout_key != key)).limit(1)
    before = connection.execute(others.where(finished_at < first).order_by(finished_at.desc())).scalar()
    after = connection.execute(others.where(finished_at > last).order_by(finished_at)).scalar()
    known = texts.texts_of(connection, (before, after))
    return Neighbours(known[before], known[after])


def of_same_task(connection: Connection, row: Any, limit: int) -> list[Any]:
    """List the latest other rollouts with the same input, each with its id, status and start."""
    query = (
        select(_ROLLOUTS.rollout_id, _ROLLOUTS.status, _ROLLOUTS.start_time)
        .where(_ROLLOUTS.input == row.input, _ROLLOUTS.key != row.key)
        .order_by(_ROLLOUTS.key.desc())
        .limit(limit)
    )
    return [*connection.execute(query)]
