"""Workers: the latest signs of life of each runner. The caller owns the transaction."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, case, select, update

from agentlightning.rollout_records import WorkerStatus
from agentlightning.store.database import insert_if_new, now
from agentlightning.store.documents import to_json
from agentlightning.store.pages import Listing, Logic, contains, matching
from agentlightning.store.rollouts import Document
from agentlightning.store.tables import workers

__all__ = ["busy", "find", "heartbeat", "idle", "listing", "note", "of_attempt", "without_work", "worker_fields"]


def find(connection: Connection, worker_id: str) -> Any | None:
    """Find a worker's row."""
    return connection.execute(select(workers).where(workers.c.worker_id == worker_id)).first()


def listing(
    status_in: Sequence[WorkerStatus] | None = None,
    worker_id_contains: str | None = None,
    filter_logic: Logic = "and",
) -> Listing:
    """List workers; a filter that is None lets everything through."""
    conditions = []
    if status_in is not None:
        conditions.append(workers.c.status.in_(status_in))
    if worker_id_contains is not None:
        conditions.append(contains(workers.c.worker_id, worker_id_contains))
    where = matching(conditions, filter_logic)
    return Listing(select(workers), workers.c.key, lambda _: where)


def worker_fields(row: Any, document: Document = json.loads) -> dict[str, Any]:
    """Return the JSON object of a worker."""
    found = dict(row._mapping)
    del found["key"]
    if row.heartbeat_stats is not None:
        found["heartbeat_stats"] = document(row.heartbeat_stats)
    return found


def heartbeat(connection: Connection, worker_id: str, heartbeat_stats: Any = None) -> Any:
    """Record a sign of life of a worker, which may be new.

    Args:
        heartbeat_stats: a JSON object; None leaves the one that is stored.

    Returns:
        The worker's row.
    """
    changes = {} if heartbeat_stats is None else {"heartbeat_stats": to_json(heartbeat_stats)}
    note(connection, worker_id, last_heartbeat_time=now(connection), **changes)
    return find(connection, worker_id)


def note(connection: Connection, worker_id: str, **columns: Any) -> None:
    """Set columns of a worker, which may be new."""
    known = update(workers).where(workers.c.worker_id == worker_id).values(**columns)
    if columns and connection.execute(known).rowcount:
        return
    insert_if_new(connection, workers, worker_id=worker_id, status="unknown")
    if columns:
        connection.execute(known)


def busy(at: float, rollout_id: str, attempt_id: str) -> dict[str, Any]:
    """Return the columns of a worker that works on this attempt."""
    return {
        "status": "busy",
        "last_busy_time": at,
        "current_rollout_id": rollout_id,
        "current_attempt_id": attempt_id,
    }


def idle(at: float, status: WorkerStatus = "idle") -> dict[str, Any]:
    """Return the columns of a worker without known work."""
    return {"status": status, "last_idle_time": at, "current_rollout_id": None, "current_attempt_id": None}


def without_work(at: float) -> dict[str, Any]:
    """Return the columns of a worker that found the queue empty; one that is idle already stays idle since then."""
    since = case((workers.c.status == "idle", workers.c.last_idle_time), else_=at)
    return {**idle(at), "last_idle_time": since}


def of_attempt(status: str, at: float, rollout_id: str, attempt_id: str) -> dict[str, Any]:
    """Return the columns of a worker whose attempt has reached this state."""
    if status in ("preparing", "running"):
        return busy(at, rollout_id, attempt_id)
    return idle(at, "idle" if status in ("succeeded", "failed") else "unknown")
