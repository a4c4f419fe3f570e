"""Workers: the latest signs of life of each runner. The caller owns the transaction."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from sqlalchemy import Connection, select

from agentlightning.rollout_records import WorkerStatus
from agentlightning.store.database import now, run_many
from agentlightning.store.documents import to_json
from agentlightning.store.pages import Listing, Logic, contains, matching
from agentlightning.store.rollouts import Document
from agentlightning.store.tables import workers

__all__ = ["busy", "find", "heartbeat", "idle", "listing", "note", "note_all", "of_attempt", "worker_fields"]


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
    note_all(connection, {worker_id: columns})


def note_all(connection: Connection, columns: Mapping[str, Mapping[str, Any]], *, stay_idle: bool = False) -> None:
    """Set columns of workers, each of which may be new, by their ids.

    Args:
        stay_idle: one that is idle already stays idle since then.
    """
    by_names: defaultdict[tuple[str, ...], list[tuple[Any, ...]]] = defaultdict(list)
    # Sorted, so that two writers of the same workers lock them in the same order.
    for worker_id in sorted(columns):
        values = {"worker_id": worker_id, "status": "unknown", **columns[worker_id]}
        by_names[tuple(columns[worker_id])].append((*values.values(),))
    for names, values in by_names.items():
        run_many(connection, _upsert(names, stay_idle), values)


@lru_cache(64)
def _upsert(names: tuple[str, ...], stay_idle: bool) -> str:
    """Return the statement that sets these columns of a worker, which may be new."""
    columns = [*dict.fromkeys(("worker_id", "status", *names))]
    values = {name: f"excluded.{name}" for name in names or ("worker_id",)}
    if stay_idle:
        values["last_idle_time"] = (
            "CASE workers.status WHEN 'idle' THEN workers.last_idle_time ELSE excluded.last_idle_time END"
        )
    changes = ", ".join(f"{name} = {value}" for name, value in values.items())
    marks = ", ".join("?" * len(columns))
    return (
        f"INSERT INTO workers ({', '.join(columns)}) VALUES ({marks}) ON CONFLICT (worker_id) DO UPDATE SET {changes}"
    )


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


def of_attempt(status: str, at: float, rollout_id: str, attempt_id: str) -> dict[str, Any]:
    """Return the columns of a worker whose attempt has reached this state."""
    if status in ("preparing", "running"):
        return busy(at, rollout_id, attempt_id)
    return idle(at, "idle" if status in ("succeeded", "failed") else "unknown")
