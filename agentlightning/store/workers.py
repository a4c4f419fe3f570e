"""Workers: what was heard of each runner last. Everything here works inside a transaction of somebody else's."""

from __future__ import annotations

from typing import Any, Literal

from sqlalchemy import Connection, case, update

from agentlightning.store.database import insert_if_new
from agentlightning.store.tables import workers

__all__ = ["WorkerStatus", "busy", "idle", "note", "of_attempt", "without_work"]

WorkerStatus = Literal["idle", "busy", "unknown"]


def note(connection: Connection, worker_id: str, **columns: Any) -> None:
    """Set what is known of a worker, which may be new."""
    known = update(workers).where(workers.c.worker_id == worker_id).values(**columns)
    if columns and connection.execute(known).rowcount:
        return
    insert_if_new(connection, workers, worker_id=worker_id, status="unknown")
    if columns:
        connection.execute(known)


def busy(now: float, rollout_id: str, attempt_id: str) -> dict[str, Any]:
    """The columns of one that works on this attempt."""
    return {
        "status": "busy",
        "last_busy_time": now,
        "current_rollout_id": rollout_id,
        "current_attempt_id": attempt_id,
    }


def idle(now: float, status: WorkerStatus = "idle") -> dict[str, Any]:
    """The columns of one that works on nothing that is known."""
    return {"status": status, "last_idle_time": now, "current_rollout_id": None, "current_attempt_id": None}


def without_work(now: float) -> dict[str, Any]:
    """The columns of one that has found the queue empty: who is idle already has been so since before."""
    since = case((workers.c.status == "idle", workers.c.last_idle_time), else_=now)
    return {**idle(now), "last_idle_time": since}


def of_attempt(status: str, now: float, rollout_id: str, attempt_id: str) -> dict[str, Any]:
    """The columns of one whose attempt has come to this status."""
    if status in ("preparing", "running"):
        return busy(now, rollout_id, attempt_id)
    return idle(now, "idle" if status in ("succeeded", "failed") else "unknown")
